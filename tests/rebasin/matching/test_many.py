"""Many models in one order: consistent, exact where an order was planted, and judged by data where there is some."""

from __future__ import annotations

import pytest
import torch
from handmade_specs import ALL, tensors
from torch import nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import apply_permutation, average, infer_permutation_spec, match_many, weight_matching
from lit_wsl.rebasin.matching.activations import merged_gap, midpoint_gap
from lit_wsl.rebasin.matching.objective import dot


@pytest.mark.parametrize("name", ["attention", "grouped_queries", "mlp"])
def test_planted_orders_of_four_models_are_recovered(name):
    spec = ALL[name]
    first = tensors(spec, 0)
    others = [apply_permutation(spec, spec.random_permutations(seed), first) for seed in (1, 2, 3)]
    found = match_many(spec, [first, *others])
    assert found[0].identity_share == 1.0
    for one, state in zip(found, [first, *others]):
        aligned = apply_permutation(spec, one, state)
        assert all(torch.equal(aligned[k], first[k]) for k in first)


def pairs(states):
    return sum(dot(a[name], b[name]) for i, a in enumerate(states) for b in states[i + 1 :] for name in a)


def test_all_pairs_together_are_worth_at_least_what_matching_to_the_first_is():
    spec = ALL["mlp"]
    states = [tensors(spec, seed) for seed in range(4)]
    found = match_many(spec, states)
    together = [apply_permutation(spec, one, state) for one, state in zip(found, states)]
    to_first = [states[0], *(apply_permutation(spec, weight_matching(spec, states[0], s), s) for s in states[1:])]
    assert pairs(together) >= pairs(to_first)
    assert all(torch.equal(together[0][name], tensor) for name, tensor in states[0].items())


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))


X = [(torch.randn(40, 5, generator=torch.Generator().manual_seed(k)),) for k in range(3)]


def test_with_data_the_candidate_that_merges_best_wins():
    spec = infer_permutation_spec(net().eval(), X[0])
    states = [net(seed).state_dict() for seed in range(3)]

    def gap(found):
        return merged_gap(net(), spec, [apply_permutation(spec, p, s) for p, s in zip(found, states)], X)

    judged = match_many(spec, states, model=net(), batches=X, restarts=0)
    assert gap(judged) <= gap(match_many(spec, states, restarts=0)) + 1e-9
    assert judged[1].start.endswith("3 models")
    same = average(states[:2])
    assert midpoint_gap(net(), spec, same, same, X) == merged_gap(net(), spec, [same, same], X)


def test_what_cannot_be_matched_is_refused():
    spec = ALL["mlp"]
    with pytest.raises(RebasinError, match="1 model"):
        match_many(spec, [tensors(spec, 0)])
    with pytest.raises(RebasinError, match="model="):
        match_many(spec, [tensors(spec, 0), tensors(spec, 1)], batches=X)
