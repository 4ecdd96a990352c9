"""Verification finds what is wrong in a spec, names it, and leaves the rest."""

from __future__ import annotations

import pytest
import small_nets as nets
import torch
from torch import nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import PermutationSpecBuilder, infer_permutation_spec, verify_permutation_spec
from lit_wsl.rebasin.inference.verify import perturbed_state

IMAGE = torch.randn(1, 3, 4, 4)


def residual_builder(model: nn.Module) -> PermutationSpecBuilder:
    builder = PermutationSpecBuilder(model)
    builder.conv("stem", "stream", None).norm("norm", "stream").conv("a", "inner", "stream").norm("inner", "inner")
    return builder.conv("b", "stream", "inner").linear("head", None, ("stream", 16))


def test_a_right_spec_keeps_the_outputs():
    model = nets.Residual()
    found = verify_permutation_spec(residual_builder(model).build(), model, (IMAGE,))
    assert found.ok
    assert found.difference < 1e-12
    assert found.tolerance < 1e-5


def test_only_the_group_that_breaks_the_function_goes():
    model = nets.Residual()
    builder = residual_builder(model)
    builder._layouts["b.weight"].pop(1)  # the inner channels move, but not where they are read
    found = verify_permutation_spec(builder.build(), model, (IMAGE,))
    assert found.dropped == ("inner",)
    assert not found.ok
    assert set(found.spec.groups) == {"stream"}
    assert found.spec.dropped == {"inner": "breaks the function"}
    assert found.difference <= found.tolerance


def test_several_wrong_groups_are_all_found():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(7)))
    builder = PermutationSpecBuilder(model)
    for k in range(7):
        inp = None if k == 0 or k - 1 in (1, 4) else f"p{k - 1}"
        builder.linear(str(k), None if k == 6 else f"p{k}", inp)
    found = verify_permutation_spec(builder.build(), model, (torch.randn(3, 6),))
    assert set(found.dropped) == {"p1", "p4"}
    assert set(found.spec.groups) == {"p0", "p2", "p3", "p5"}


@pytest.mark.parametrize("left", ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"])
def test_errors_do_not_hide_behind_ones_and_zeros(left):
    """Fresh batch norm has gain one, bias zero, mean zero, variance one: leaving one of them behind changes nothing."""
    model = nets.Residual()
    builder = residual_builder(model)
    builder._layouts.pop(left)
    assert verify_permutation_spec(builder.build(), model, (IMAGE,)).dropped == ("stream",)


def test_a_nested_group_goes_with_its_parent():
    model = nets.Transformer()
    tokens = torch.randint(0, 11, (2, 5))
    spec = infer_permutation_spec(model, (tokens,), verify=False)
    (heads,) = {g.parent for g in spec.groups.values() if g.parent}
    axes = {name: dict(by_axis) for name, by_axis in spec.axes.items()}
    del axes["attention.table"]  # the bias of each head would stay behind
    broken = type(spec)(spec.groups, axes, spec.shapes, spec.parameters)
    found = verify_permutation_spec(broken, model, (tokens,))
    assert heads in found.dropped
    assert set(found.dropped) == {heads, *spec.children(heads)}


def test_cached_biases_do_not_spoil_the_comparison():
    model, args = nets.CachedBias().eval(), (torch.randn(2, 4),)
    with torch.no_grad():
        model(*args)  # fills the cache with the bias of the old weights
    spec = infer_permutation_spec(model, args, verify=False)
    assert [group.size for group in spec.groups.values()] == [6]
    assert verify_permutation_spec(spec, model, args).ok


def test_perturbed_state_has_no_ones_zeros_or_negative_variances():
    model = nets.Residual()
    state = perturbed_state(model)
    assert state["norm.running_var"].min() > 0
    for name in ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        assert state[name].dtype == torch.float64
        assert len(state[name].unique()) == state[name].numel()
    assert torch.equal(model.norm.weight, torch.ones(8))


def test_dropout_and_the_random_state_do_not_matter():
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 2)).train()
    before = torch.random.get_rng_state()
    spec = infer_permutation_spec(model, (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),))
    assert [group.size for group in spec.groups.values()] == [6]
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training


def test_a_model_that_fails_in_float64_is_named():
    class Picky(nn.Linear):
        def forward(self, x):
            if self.weight.dtype == torch.float64:
                raise ValueError("only float32 here")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(3, 4), Picky(4, 2))
    with pytest.raises(RebasinError, match="only float32 here"):
        infer_permutation_spec(model, (torch.randn(1, 3),))
    assert infer_permutation_spec(model, (torch.randn(1, 3),), verify=False).groups
