"""Metrics against their definitions on plain tensors, and the promises about identical inputs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import metrics as m

SEEDS = st.integers(0, 2**31)


def pair(seed, shape=(7, 5)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_vector_metrics_against_numpy_like_definitions(seed):
    a, b = pair(seed)
    x, y = a.double().flatten(), b.double().flatten()
    values = m.vector_metrics(m.pair_moments(a, b))
    assert values["dot"] == pytest.approx(float(x @ y))
    assert values["cosine"] == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)))
    assert values["l2"] == pytest.approx(float((x - y).norm()))
    assert math.cos(math.radians(values["angle"])) == pytest.approx(values["cosine"])
    assert values["magnitude_ratio"] == pytest.approx(float(y.norm() / x.norm()))
    assert values["sign_conflict"] == pytest.approx(float((x * y < 0).double().mean()))
    sigma = torch.linalg.svdvals(torch.stack([x, y]))
    p = sigma / sigma.sum()
    assert values["effective_rank"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
    assert values["stable_rank"] == pytest.approx(float((sigma**2).sum() / sigma[0] ** 2))
    assert values["participation_ratio"] == pytest.approx(float((sigma**2).sum() ** 2 / (sigma**4).sum()))
    assert values["spectral_gap"] == pytest.approx(float(sigma[0] - sigma[1]))


def test_identical_vectors():
    a, _ = pair(0)
    values = m.vector_metrics(m.pair_moments(a, a))
    assert (values["cosine"], values["angle"], values["l2"], values["sign_conflict"]) == (1.0, 0.0, 0.0, 0.0)
    assert values["effective_rank"] == values["stable_rank"] == values["participation_ratio"] == pytest.approx(1.0)


def test_sums_are_kept_in_float64():
    # In float32, 1e8 + 1 is 1e8; and the distance of nearly equal vectors would cancel.
    a = torch.tensor([1e4, 1.0])
    assert m.pair_moments(a, a).sq_a == 1e8 + 1
    close = m.pair_moments(torch.full((1000,), 1.0), torch.full((1000,), 1.0) + 2**-23)
    assert m.l2_distance(close) == pytest.approx(2**-23 * math.sqrt(1000))


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_global_value_is_that_of_the_concatenation(seed):
    a, b = pair(seed, (40,))
    split = {"x": slice(0, 11), "y": slice(11, 40)}
    parts = m.compare_vectors({k: a[s] for k, s in split.items()}, {k: b[s] for k, s in split.items()})
    whole = m.vector_metrics(m.pair_moments(a, b))
    assert parts.overall == pytest.approx(whole)
    assert set(parts.layers) == {"x", "y"}


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_matrix_metrics_of_identical_matrices_are_one(seed):
    a, _ = pair(seed, (6, 4, 3))
    values = m.matrix_metrics(m.spectrum(a), m.spectrum(a))
    assert values == pytest.approx(dict.fromkeys(values, 1.0))
    low = torch.outer(a[:, 0, 0], a[0, :, 0])  # of rank one
    assert m.matrix_metrics(m.spectrum(low), m.spectrum(low)) == pytest.approx(dict.fromkeys(values, 1.0))


def test_subspace_overlap_tells_left_from_right():
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    a = m.spectrum(torch.outer(basis[0], basis[1]))
    same_output = m.spectrum(torch.outer(basis[0], basis[2]))
    assert m.left_subspace_overlap(a, same_output) == pytest.approx(1.0)
    assert m.right_subspace_overlap(a, same_output) == pytest.approx(0.0, abs=1e-6)
    assert m.spectrum_overlap(a, same_output) == pytest.approx(1.0)
    assert m.interaction_overlap(a, same_output) == pytest.approx(0.0, abs=1e-6)


def test_left_overlap_is_the_formula():
    a, b = (m.spectrum(t) for t in pair(3, (8, 6)))
    expected = float(torch.linalg.matrix_norm(a.U[:, :2].T @ b.U[:, :2])) / math.sqrt(2)
    assert m.left_subspace_overlap(a, b, k=2) == pytest.approx(expected)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_interaction_lies_between_the_cosine_and_one(seed):
    a, b = pair(seed)
    value = m.interaction_overlap(m.spectrum(a), m.spectrum(b))
    assert abs(m.cosine_similarity(m.pair_moments(a, b))) - 1e-9 <= value <= 1.0


def test_one_decomposition_per_matrix(monkeypatch):
    calls = []
    real = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or real(*a, **k))
    a, b = pair(1)
    m.compare_vectors({"w": a, "b": a[0]}, {"w": b, "b": b[0]})
    assert len(calls) == 2
    calls.clear()
    collection = m.task_vector_metrics()
    collection.update({"w": a}, {"w": b})
    collection.compute()
    assert len(calls) == 2


def test_meaningless_values_are_nan_and_null_in_json():
    zero = torch.zeros(3, 3)
    comparison = m.compare_vectors({"w": zero}, {"w": torch.ones(3, 3)})
    assert math.isnan(comparison.layers["w"]["cosine"])
    assert math.isnan(comparison.layers["w"]["left_subspace_overlap"])
    plain = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert plain["layers"]["w"]["cosine"] is None


def test_large_matrices_are_named_not_silently_skipped():
    a, b = pair(0, (9, 9))
    comparison = m.compare_vectors({"w": a}, {"w": b}, max_side=8)
    assert comparison.undecomposed == ("w",)
    assert "spectrum_overlap" not in comparison.layers["w"]


def test_classes_equal_the_functions_and_accumulate():
    a, b = pair(5)
    other_a, other_b = pair(6, (4, 4))
    collection = m.task_vector_metrics(prefix="tv/")
    collection.update({"w": a}, {"w": b})
    collection.update(other_a, other_b)
    values = {k.removeprefix("tv/"): float(v) for k, v in collection.compute().items()}
    expected = m.compare_vectors({"w": a, "v": other_a}, {"w": b, "v": other_b}).overall
    assert values == pytest.approx(expected)


@pytest.mark.parametrize("cls", [m.VectorAngle, m.MagnitudeRatio, m.StackSpectralGap, m.LeftSubspaceOverlap])
def test_single_classes(cls):
    a, b = pair(8)
    metric = cls()
    metric.update(a, b)
    expected = {
        m.VectorAngle: lambda: m.angle(m.pair_moments(a, b)),
        m.MagnitudeRatio: lambda: m.magnitude_ratio(m.pair_moments(a, b)),
        m.StackSpectralGap: lambda: m.vector_metrics(m.pair_moments(a, b))["spectral_gap"],
        m.LeftSubspaceOverlap: lambda: m.left_subspace_overlap(m.spectrum(a), m.spectrum(b)),
    }[cls]()
    assert float(metric.compute()) == pytest.approx(expected)
    assert metric.compute().dtype == torch.float64


def test_errors_name_what_differs():
    with pytest.raises(RebasinError, match=r"\(2,\).*\(3,\)"):
        m.pair_moments(torch.zeros(2), torch.zeros(3))
    with pytest.raises(RebasinError, match="'v'"):
        m.compare_vectors({"w": torch.zeros(2)}, {"w": torch.zeros(2), "v": torch.zeros(2)})
    with pytest.raises(RebasinError, match="'w'"):
        m.compare_vectors({"w": torch.zeros(2)}, {"w": torch.zeros(3)})
