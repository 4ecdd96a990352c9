"""Planted permutations are recovered; steps never lose; results are honest and deterministic."""

from __future__ import annotations

import itertools

import pytest
import torch
from handmade_specs import ALL, attention, experts, mlp, plain, spec_of, tensors

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import apply_permutation
from lit_wsl.rebasin.matching.descent import Descent, progress_bar
from lit_wsl.rebasin.matching.objective import dot
from lit_wsl.rebasin.matching.weights import identity_share, weight_matching

every_spec = pytest.mark.parametrize("name", sorted(ALL))


def noisy(state, seed, share):
    generator = torch.Generator().manual_seed(seed)
    return {k: v + share * v.std() * torch.randn(v.shape, generator=generator) for k, v in state.items()}


def objective(a, b):
    return sum(dot(a[name], b[name]) for name in a)


@every_spec
@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_permutation_is_recovered(name, noise, seed):
    spec = ALL[name]
    a = tensors(spec, seed)
    b = apply_permutation(spec, spec.random_permutations(seed + 7), a)
    found = weight_matching(spec, a, noisy(b, seed + 50, noise), seed=seed)
    back = apply_permutation(spec, found, b)
    assert all(torch.equal(back[key], a[key]) for key in a)
    assert found.converged


@every_spec
def test_result_reports_its_own_objective_and_never_loses(name):
    spec = ALL[name]
    a, b = tensors(spec, 1), tensors(spec, 2)  # unrelated
    found = weight_matching(spec, a, b, seed=3)
    assert found.objective_before == pytest.approx(objective(a, b), rel=1e-9)
    assert found.objective == pytest.approx(objective(a, apply_permutation(spec, found, b)), rel=1e-6)
    assert found.objective >= found.objective_before


@every_spec
def test_same_seed_same_answer_and_arguments_untouched(name):
    spec = ALL[name]
    a, b = tensors(spec, 1), tensors(spec, 2)
    kept = {key: value.clone() for key, value in b.items()}
    state = torch.get_rng_state()
    first, second = weight_matching(spec, a, b, seed=5), weight_matching(spec, a, b, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[g], second[g]) for g in spec.groups)
    assert all(torch.equal(b[key], kept[key]) for key in b)


@every_spec
def test_identity_of_equal_models_takes_one_sweep(name):
    spec = ALL[name]
    a = tensors(spec, 4)
    found = weight_matching(spec, a, noisy(a, 5, 0.05))
    assert found.start == "identity"
    assert found.sweeps == 1
    assert found.identity_share == 1.0


def exhaustive(spec, a, b):
    """The best objective over all elements of the group, by trying them all."""
    choices = []
    for group in spec.groups:
        shape = spec.permutation_shape(group)
        rows = list(itertools.permutations(range(shape[-1])))
        count = torch.Size(shape[:-1]).numel()
        choices.append([torch.tensor(c).reshape(shape) for c in itertools.product(rows, repeat=count)])
    best = -float("inf")
    for element in itertools.product(*choices):
        best = max(best, objective(a, apply_permutation(spec, dict(zip(spec.groups, element)), b)))
    return best


def tiny_heads():
    """One tree: heads, and inside them one permutation of q and k and one of v and o; the stream is fixed."""
    full = attention(heads=2, dim=3, width=4)
    axes = {"qkv": {0: full.axes["qkv"][0]}, "o": {1: full.axes["o"][1]}}
    groups = {"h": (2, None), "qk": (3, "h"), "v": (3, "h")}
    return spec_of(groups, axes, {"qkv": full.shapes["qkv"], "o": full.shapes["o"]})


@pytest.mark.parametrize("spec", [tiny_heads(), experts(count=3, hidden=3, width=2)], ids=["heads", "experts"])
@pytest.mark.parametrize("seed", range(2))
def test_one_step_solves_a_nested_tree_exactly(spec, seed):
    a, b = tensors(spec, seed), tensors(spec, seed + 100)
    descent = Descent(spec, a, b)
    (tree,) = descent.trees.values()
    descent.step(tree)
    assert descent.objective == pytest.approx(exhaustive(spec, a, b), rel=1e-6)


def test_evidence_first_recovers_a_deep_chain_in_one_pass_where_a_random_order_does_not():
    width, depth = 32, 8
    shapes = {"in": (width, 2), **{f"{i}": (width, width) for i in range(depth)}, "out": (40, width)}
    axes = {"in": {0: plain("g0", width)}, "out": {1: plain(f"g{depth}", width)}}
    for i in range(depth):
        axes[f"{i}"] = {0: plain(f"g{i + 1}", width), 1: plain(f"g{i}", width)}
    spec = spec_of({f"g{i}": (width, None) for i in range(depth + 1)}, axes, shapes)
    a = tensors(spec, 0)
    descent = Descent(spec, a, apply_permutation(spec, spec.random_permutations(1), a))
    with progress_bar(False) as bar:
        descent.sweep(torch.randperm(depth + 1, generator=torch.Generator().manual_seed(0)).tolist(), bar)
        after_one_sweep = descent.objective
        descent.reset()
        descent.resolve_first(bar)
    assert after_one_sweep < 0.9 * objective(a, a)
    assert descent.objective == pytest.approx(objective(a, a), rel=1e-6)


def test_buffers_have_no_say_but_need_not_be_there():
    spec = mlp(6)
    shapes = {**spec.shapes, "stat": (6,)}
    axes = {**spec.axes, "stat": {0: plain("a", 6)}}
    with_buffer = type(spec)(spec.groups, axes, shapes, tuple(spec.shapes))
    a, b = tensors(spec, 0), tensors(spec, 1)
    expected = weight_matching(spec, a, b)
    extreme = {"stat": torch.arange(6.0) * 1e6}
    found = weight_matching(with_buffer, {**a, **extreme}, {**b, "stat": 2 * extreme["stat"]})
    assert all(torch.equal(found[g], expected[g]) for g in spec.groups)
    assert all(torch.equal(weight_matching(with_buffer, a, b)[g], expected[g]) for g in spec.groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    spec = ALL["attention"]
    a = {k: v.to(dtype) for k, v in tensors(spec, 0).items()}
    b = apply_permutation(spec, spec.random_permutations(3), a)
    back = apply_permutation(spec, weight_matching(spec, a, b), b)
    assert all(torch.equal(back[k], a[k]) for k in a)


def test_errors_name_the_tensor():
    spec = mlp()
    a = tensors(spec, 0)
    with pytest.raises(RebasinError, match=r"1\.weight.*missing"):
        weight_matching(spec, a, {k: v for k, v in a.items() if k != "1.weight"})
    with pytest.raises(RebasinError, match=r"1\.weight.*\(3, 3\)"):
        weight_matching(spec, a, {**a, "1.weight": torch.zeros(3, 3)})
    with pytest.raises(RebasinError, match=r"2\.weight.*not finite"):
        weight_matching(spec, a, {**a, "2.weight": torch.full_like(a["2.weight"], float("nan"))})


def test_identity_share():
    assert identity_share({}) == 1.0
    assert identity_share({"a": torch.tensor([1, 0]), "b": torch.arange(6)}) == 0.75
