"""Merging as pure functions: statistics of norms, complex tensors, TIES, the arc between two models."""

from __future__ import annotations

import pytest
import torch

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import average, interpolate, slerp, task_arithmetic, task_vector, ties


def normed(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "norm.weight": torch.randn(6, generator=generator),
        "norm.running_mean": torch.randn(6, generator=generator),
        "norm.running_var": torch.rand(6, generator=generator) + 0.01,
        "norm.num_batches_tracked": torch.tensor(seed),
    }


def test_statistics_stay_out_of_sums_of_task_vectors():
    base = normed(0)
    vectors = [task_vector(normed(seed), base) for seed in (1, 2, 3)]
    for merged in (task_arithmetic(base, vectors, 2.0), ties(base, vectors, scale=2.0)):
        for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
            assert torch.equal(merged[name], base[name])
        assert not torch.equal(merged["norm.weight"], base["norm.weight"])


def test_a_negative_variance_is_refused_with_its_name():
    with pytest.raises(RebasinError, match=r"'norm.running_var' of shape \(6,\).*negative"):
        average([normed(0), normed(1)], [-1.0, 2.0])
    with pytest.raises(RebasinError, match="variance"):
        interpolate(normed(0), normed(1), 9.0)


def test_complex_tensors_are_averaged_and_subtracted_like_real_ones():
    a, b = ({"w": torch.tensor([x, 1j * x], dtype=torch.complex64)} for x in (1.0, 3.0))
    assert torch.equal(average([a, b])["w"], torch.tensor([2.0, 2.0j], dtype=torch.complex64))
    vector = task_vector(b, a)
    assert torch.equal(task_arithmetic(a, [vector])["w"], b["w"])
    assert torch.equal(slerp(a, b, 1.0)["w"], b["w"])
    assert torch.equal(ties(a, [vector], density=1.0)["w"], b["w"])
    assert torch.equal(ties(a, [vector], density=0.5)["w"], b["w"])  # the parts of one that are zero are left out


def test_ties_of_one_whole_task_vector_is_task_arithmetic():
    base, tuned = normed(0), normed(1)
    vector = task_vector(tuned, base)
    one, other = ties(base, [vector], density=1.0), task_arithmetic(base, [vector])
    for name in base:
        torch.testing.assert_close(one[name], other[name])


def test_ties_trims_elects_and_averages_what_agrees():
    base = {"w": torch.zeros(4)}
    vectors = [{"w": torch.tensor(v)} for v in ([3.0, 1.0, 0.1, 0.0], [1.0, -4.0, 0.2, 0.0], [-1.0, 2.0, 5.0, 0.0])]
    assert torch.equal(ties(base, vectors, density=1.0)["w"], torch.tensor([2.0, -4.0, sum([0.1, 0.2, 5.0]) / 3, 0.0]))
    # half of each vector stays: [3, 1], [1, -4], [2, 5]
    assert torch.equal(ties(base, vectors, density=0.5)["w"], torch.tensor([2.0, -4.0, 5.0, 0.0]))
    weighted = ties(base, vectors, density=1.0, weights=[1.0, 0.0, 2.0])
    torch.testing.assert_close(weighted["w"][:2], torch.tensor([3.0, 5 / 3]))
    with pytest.raises(RebasinError, match="density=0"):
        ties(base, vectors, density=0)
    with pytest.raises(RebasinError, match="3 task vectors but 1"):
        ties(base, vectors, weights=[1.0])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_the_arc_keeps_the_length_and_turns_evenly(alpha):
    generator = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.nn.functional.normalize(torch.randn(9, generator=generator), dim=0)} for _ in range(2))
    point = slerp(a, b, alpha)["w"]
    whole = torch.arccos(a["w"] @ b["w"])
    assert float(point.norm()) == pytest.approx(1.0, abs=1e-6)
    assert float(torch.arccos((a["w"] @ point).clamp(-1, 1))) == pytest.approx(float(alpha * whole), abs=1e-3)
    double = slerp(a, {"w": 3 * b["w"]}, alpha)["w"]
    torch.testing.assert_close(double, point * (1 + 2 * alpha))


def test_the_arc_between_parallel_models_is_the_line():
    a = {"w": torch.tensor([1.0, 2.0]), "n.running_var": torch.tensor([1.0, 2.0])}
    b = {"w": torch.tensor([2.0, 4.0]), "n.running_var": torch.tensor([4.0, 1.0])}
    for alpha in (0.3, 0.5):
        for name, tensor in interpolate(a, b, alpha).items():
            torch.testing.assert_close(slerp(a, b, alpha)[name], tensor)
    with pytest.raises(RebasinError, match="alpha=2"):
        slerp(a, b, 2)
