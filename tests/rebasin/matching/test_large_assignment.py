"""Large assignment problems: the sum equals scipy's on easy, hard, tied and degenerate matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from lit_wsl.rebasin.matching import assignment
from lit_wsl.rebasin.matching.assignment import assign, assign_large, is_permutation

SIZE = 200


def families():
    g = torch.Generator().manual_seed(0)
    n = SIZE
    normal = torch.randn(n, n, generator=g)
    planted = normal.clone()
    planted[range(n), torch.randperm(n, generator=g).tolist()] += 3
    half = normal.clone()
    half[range(n // 2), range(n // 2)] += 50
    few = torch.randn(n, 3, generator=g)
    twins = torch.randn(n // 2, 40, generator=g).repeat(2, 1)
    scales = torch.rand(n, 1, generator=g).log().mul(-2).exp() * torch.rand(n, generator=g).log().mul(-2).exp()
    return {
        "normal": normal,
        "exponential": -torch.rand(n, n, generator=g).log(),
        "planted weakly": planted,
        "half of it planted": half,
        "whole numbers": torch.randint(0, 5, (n, n), generator=g).float(),
        "many ties": torch.randint(0, 500, (n, n), generator=g).float(),
        "constant": torch.ones(n, n),
        "distances": -torch.cdist(few, torch.randn(n, 3, generator=g)),
        "rank one": few[:, :1] @ torch.randn(1, n, generator=g),
        "twins": twins @ torch.randn(n // 2, 40, generator=g).repeat(2, 1).T,
        "heavy tails": normal * scales,
        "tiny": 1e-30 * normal,
        "huge": 1e30 * normal,
        "a silent unit": normal * (torch.arange(n) != 7),
        "double": normal.double(),
    }


@pytest.mark.parametrize("name", sorted(families()))
def test_sum_is_the_largest(name):
    matrix = families()[name]
    columns = assign_large(matrix)
    assert is_permutation(columns)
    exact = matrix.double().numpy()
    best = exact[np.arange(SIZE), linear_sum_assignment(exact, maximize=True)[1]].sum()
    found = exact[np.arange(SIZE), columns.numpy()].sum()
    assert found == pytest.approx(best, rel=1e-9, abs=1e-9 * np.abs(exact).max())


@pytest.mark.parametrize("name", ["normal", "half of it planted", "many ties", "planted weakly"])
def test_core_is_enough_for_what_weights_look_like(name, monkeypatch):
    monkeypatch.setattr(assignment, "_solve_dense", lambda *_: pytest.fail("the dense solver was asked"))
    assert is_permutation(assign_large(families()[name]))


def test_entries_missing_in_the_first_core_join_it(monkeypatch):
    matrix = families()["normal"]
    best = assign_large(matrix)
    rounds = []
    solve = assignment._solve_core
    monkeypatch.setattr(assignment, "_solve_core", lambda *a: rounds.append(1) or solve(*a))
    monkeypatch.setattr(assignment, "WIDTHS", (2.0,))
    monkeypatch.setattr(assignment, "_solve_dense", lambda *_: pytest.fail("the dense solver was asked"))
    assert torch.equal(assign_large(matrix), best)
    assert len(rounds) > 1


def test_large_problems_take_this_way(monkeypatch):
    monkeypatch.setattr("lit_wsl.rebasin.matching.assignment.MIN_SIZE", SIZE)
    monkeypatch.setattr(
        "lit_wsl.rebasin.matching.assignment.linear_sum_assignment", lambda *_: pytest.fail("solved densely")
    )
    matrix = families()["normal"]
    assert torch.equal(assign(matrix)[0], assign_large(matrix))
