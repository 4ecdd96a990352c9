"""The way of matching that merges best on data wins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import apply_permutation, best_matching, infer_permutation_spec, midpoint_gap


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)
    )


X = [(torch.randn(40, 5, generator=torch.Generator().manual_seed(k)),) for k in range(3)]


@pytest.fixture
def spec():
    return infer_permutation_spec(net(), X[0])


def test_a_planted_permutation_is_recovered_and_closes_the_gap(spec):
    state = net().state_dict()
    other = apply_permutation(spec, spec.random_permutations(3), state)
    found = best_matching(spec, net(), state, other, X)
    aligned = apply_permutation(spec, found, other)
    assert all(torch.equal(aligned[name], tensor) for name, tensor in state.items())
    assert found.start.startswith("weights")
    assert midpoint_gap(net(), spec, state, other, X) > 0.01
    # statistics are estimated on the data, so even the mean of a model with itself is not the model to the last bit
    itself = midpoint_gap(net(), spec, state, state, X)
    assert midpoint_gap(net(), spec, state, aligned, X) == pytest.approx(itself, rel=1e-4)


def test_the_winner_has_the_smallest_gap_of_its_rivals(spec):
    from lit_wsl.rebasin import activation_matching, weight_matching

    a, b = net(1).state_dict(), net(2).state_dict()
    gaps = [
        midpoint_gap(net(), spec, a, apply_permutation(spec, found, b), X)
        for found in (
            best_matching(spec, net(), a, b, X),
            weight_matching(spec, a, b),
            activation_matching(spec, net(), a, b, X),
        )
    ]
    assert gaps[0] == min(gaps)


def test_no_batch_is_refused(spec):
    with pytest.raises(RebasinError, match="no "):
        midpoint_gap(net(), spec, net().state_dict(), net(1).state_dict(), [])
