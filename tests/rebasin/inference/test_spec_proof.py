"""The proof of a spec: a wrong group does not pass, whatever is drawn, and the risk is stated."""

from __future__ import annotations

import pytest
import small_nets as nets
import torch
from torch import nn

from lit_wsl.rebasin import (
    PermutationSpec,
    PermutationSpecBuilder,
    Proof,
    infer_permutation_spec,
    verify_permutation_spec,
)
from lit_wsl.rebasin.inference.verify import odd_permutations


def two_layers(size: int) -> tuple[nn.Module, PermutationSpecBuilder]:
    model = nn.Sequential(nn.Linear(4, size), nn.Tanh(), nn.Linear(size, 2))
    return model, PermutationSpecBuilder(model).linear("0", "P", None).linear("2", None, "P")


@pytest.mark.parametrize("size", [2, 6, 1200])
def test_the_risk_is_stated_and_more_of_it_takes_fewer_draws(size):
    model, builder = two_layers(size)
    found = verify_permutation_spec(builder.build(), model, (torch.ones(1, 4),))
    assert (found.ok, found.passes) == (True, found.draws + 2)
    assert 0 < found.risk < 1e-6
    assert found.spec.proof == Proof(found.draws, found.risk)
    daring = verify_permutation_spec(builder.build(), model, (torch.ones(1, 4),), risk=0.3)
    assert daring.draws < found.draws
    assert found.risk < daring.risk <= 0.3


class Volumes(nn.Module):
    """Two determinants: their product keeps its sign where the rows of both are exchanged oddly, or of neither."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.linalg.det(self.one) * torch.linalg.det(self.two)


@pytest.mark.parametrize("seed", range(8))
def test_parities_of_large_groups_that_are_coupled_never_pass(seed):
    model = Volumes()
    spec = PermutationSpecBuilder(model).axis("one", 0, "one").axis("two", 0, "two").build()
    found = verify_permutation_spec(spec, model, (torch.ones(1, 4),), seed=seed)
    assert not found.spec.groups


class Turned(nn.Module):
    """Slices of one parameter that are used alike but for their order: each with the next one."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(count, 3, 5)), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [(x @ part).sin() for part in self.weight]
        return self.out(sum(a * (b - 2 * a).cos() for a, b in zip(parts, [*parts[1:], parts[0]], strict=True)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [2, 3])
def test_slices_of_unlike_use_never_pass(count, seed):
    """Half of the permutations keep the function: of three slices the rotations."""
    model = Turned(count)
    if count == 2:
        model.forward = lambda x: model.out((x @ model.weight[0]) - (x @ model.weight[1]).sin())
    spec = PermutationSpecBuilder(model).axis("weight", 0, "slices").build()
    found = verify_permutation_spec(spec, model, (torch.randn(4, 3),), seed=seed)
    assert found.dropped == ("slices",)
    assert not found.spec.groups
    assert "slices" not in [name for g in infer_permutation_spec(model, (torch.randn(4, 3),)).groups for name in g]


@pytest.mark.parametrize("seed", range(8))
def test_what_must_move_together_are_not_two_groups(seed):
    """Both exchanged is right, one alone is not: the identity of one must be drawn beside the exchange of the other."""
    model, builder = two_layers(2)
    model.gain = nn.Parameter(torch.randn(2))
    model.forward = lambda x: model[2]((model[0](x) * model.gain).sin())
    builder = PermutationSpecBuilder(model).linear("0", "one", None).linear("2", None, "one").axis("gain", 0, "two")
    found = verify_permutation_spec(builder.build(), model, (torch.randn(4, 4),), seed=seed)
    assert not found.spec.groups


@pytest.mark.parametrize("example", [torch.ones(1, 4), torch.zeros(1, 4)])
def test_an_example_of_equal_values_hides_nothing(example):
    model, builder = two_layers(8)
    spec = builder.axis("0.weight", 1, "inputs").build()
    found = verify_permutation_spec(spec, model, (example,))
    assert found.dropped == ("inputs",)
    assert set(found.spec.groups) == {"P"}


def test_a_model_that_needs_its_example_as_it_is_is_proven_on_that():
    class Stepwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, step: torch.Tensor) -> torch.Tensor:
            if not bool((step == step.round()).all()):
                raise ValueError("whole steps only")
            return self.b(self.a(self.table(step.long())).tanh())

    spec = infer_permutation_spec(Stepwise(), (torch.tensor([1.0, 3.0]),))
    assert sorted(group.size for group in spec.groups.values()) == [6, 8]
    assert spec.proof is not None


def test_odd_permutations_leave_no_row_as_it_is():
    spec = infer_permutation_spec(nets.Transformer(), (torch.randint(0, 11, (2, 5)),), verify=False)
    for seed in range(10):
        for name, permutation in odd_permutations(spec, seed).items():
            for row in permutation.reshape(-1, permutation.shape[-1]):
                assert torch.equal(row.sort().values, torch.arange(len(row))), name
                assert torch.linalg.det(torch.eye(len(row))[row]) < 0


def test_what_is_not_proven_says_so():
    model, builder = two_layers(8)
    spec = builder.build()
    assert spec.proof is None
    assert "unproven" in repr(spec)
    assert "Not proven" in spec.summary()
    proven = verify_permutation_spec(spec, model, (torch.randn(1, 4),)).spec
    assert "unproven" not in repr(proven)
    assert f"{proven.proof.risk:.0e}" in proven.summary()
    assert PermutationSpec.from_json(proven.to_json()).proof == proven.proof
    assert proven == spec
    assert infer_permutation_spec(model, (torch.randn(1, 4),), verify=False).proof is None


def test_complex_weights_and_outputs_are_compared():
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(3, 6, dtype=torch.cfloat))
            self.b = nn.Parameter(torch.randn(6, 2, dtype=torch.cfloat))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.to(self.a.dtype) @ self.a).tanh() @ self.b

    model, args = Waves(), (torch.randn(4, 3),)
    builder = PermutationSpecBuilder(model).axis("a", 1, "P").axis("b", 0, "P")
    assert verify_permutation_spec(builder.build(), model, args).ok
    assert infer_permutation_spec(model, args).axes.keys() == {"a", "b"}
    wrong = PermutationSpecBuilder(model).axis("a", 1, "P").build()
    assert verify_permutation_spec(wrong, model, args).dropped == ("P",)
