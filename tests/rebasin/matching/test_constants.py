"""Buffers that all models share are the architecture's: no alignment moves them, so no merge mixes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_wsl.rebasin import (
    activation_matching,
    apply_permutation,
    average,
    best_matching,
    infer_permutation_spec,
    joint_matching,
    match_many,
    rebase,
    task_vector,
    weight_matching,
)
from lit_wsl.rebasin.job import AlignOptions, align

BATCHES = [torch.randn(16, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


class Masked(nn.Module):
    """Two masked layers, as of an autoregressive density, and a plain hidden layer behind them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        degrees = torch.tensor([0, 1, 0, 1, 1, 0])
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 3)
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)
        self.register_buffer("reads", (degrees[:, None] >= torch.arange(3)).float())
        self.register_buffer("writes", (torch.arange(3)[:, None] > degrees).float())

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.first.weight * self.reads, self.first.bias).relu()
        out = nn.functional.linear(hidden, self.second.weight * self.writes, self.second.bias)
        return self.down(self.up(out).relu())


SPEC = infer_permutation_spec(Masked(0), (BATCHES[0],))
MASKED, FREE = SPEC.axes["reads"][0].groups[0], SPEC.axes["up.weight"][0].groups[0]


def states(count: int) -> list[dict[str, Tensor]]:
    return [Masked(seed).state_dict() for seed in range(count)]


def by_weights(a, b):
    return weight_matching(SPEC, a, b)


def by_activations(a, b):
    return activation_matching(SPEC, Masked(0), a, b, BATCHES)


def by_both(a, b):
    return joint_matching(SPEC, Masked(0), a, b, BATCHES)


def by_the_best(a, b):
    return best_matching(SPEC, Masked(0), a, b, BATCHES)


@pytest.mark.parametrize("match", [by_weights, by_activations, by_both, by_the_best])
def test_masks_of_both_models_stay_and_other_units_are_matched(match):
    a, other = states(2)
    planted = {FREE: SPEC.random_permutations(seed=1)[FREE]}
    b = apply_permutation(SPEC, planted, {n: other[n] if n in ("reads", "writes") else t for n, t in a.items()})
    found = match(a, b)
    assert set(found) == set(SPEC.groups)
    back = apply_permutation(SPEC, found, b)
    assert all(torch.equal(back[name], tensor) for name, tensor in a.items())


@pytest.mark.parametrize("data", [{}, {"model": Masked(0), "batches": BATCHES}])
def test_many_models_are_merged_with_their_masks_whole(data):
    models = states(3)
    found = match_many(SPEC, models, **data)
    merged = average([apply_permutation(SPEC, one, state) for one, state in zip(found, models, strict=True)])
    assert all(torch.equal(merged[name], models[0][name]) for name in ("reads", "writes"))
    assert any(bool((one[FREE] != torch.arange(8)).any()) for one in found)


def test_a_fine_tuning_is_not_carried_across_the_masks():
    old, new = states(2)
    tuned = {name: t + 0.1 * torch.randn_like(t) if "weight" in name else t for name, t in old.items()}
    result = rebase(SPEC, task_vector(tuned, old), old, new, method="permute")
    assert torch.equal(result.matching[MASKED], torch.arange(6))
    assert not torch.equal(result.matching[FREE], torch.arange(8))


@pytest.mark.parametrize("on", ["weights", "task_vectors"])
def test_a_job_says_what_stays_and_merges_whole_masks(on):
    base, *tuned = states(3)
    models = {name: {n: base[n] + t for n, t in state.items()} for name, state in zip("ab", tuned, strict=True)}
    models = {name: {**state, "reads": base["reads"], "writes": base["writes"]} for name, state in models.items()}
    report = align(models, base, SPEC, AlignOptions(on=on, merge="average"))
    assert any(MASKED in note and "same in all models" in note for note in report.notes)
    assert torch.equal(report.merged["reads"], base["reads"])
    assert torch.equal(report.models["b"].compared[MASKED], torch.arange(6))


def test_masks_that_moved_with_their_units_are_moved_back():
    """They differ between the models, so they are no constants: pruned weights, statistics."""
    a = states(1)[0]
    b = apply_permutation(SPEC, SPEC.random_permutations(seed=2), a)
    assert not torch.equal(a["reads"], b["reads"])
    back = apply_permutation(SPEC, weight_matching(SPEC, a, b), b)
    assert all(torch.equal(back[name], tensor) for name, tensor in a.items())


def test_equal_statistics_of_frozen_norms_bind_nothing():
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval())
        nets[-1][1].running_mean.copy_(torch.arange(8.0))
    spec = infer_permutation_spec(nets[0], (BATCHES[0],))
    found = weight_matching(spec, nets[0].state_dict(), nets[1].state_dict())
    assert found.identity_share < 1
