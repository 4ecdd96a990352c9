from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lit_wsl.rebasin.matching.assignment import assign, assign_lazily, is_permutation


def brute_force(matrix):
    n = len(matrix)
    return max(sum(matrix[i][p[i]] for i in range(n)) for p in itertools.permutations(range(n)))


@pytest.mark.parametrize("seed", range(5))
def test_assign_is_optimal_with_and_without_potential(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    for potential in (None, torch.randn(6, generator=generator, dtype=torch.float64)):
        columns, _ = assign(matrix, potential)
        assert is_permutation(columns)
        assert float(matrix[torch.arange(6), columns].sum()) == pytest.approx(brute_force(matrix.tolist()))


def test_row_maxima_are_taken_without_solving():
    p = torch.tensor([2, 0, 1])
    assert assign(torch.eye(3)[p])[1] is True
    assert torch.equal(assign(torch.eye(3)[p])[0], p)


def test_half_squared_norms_turn_inner_products_into_nearest_neighbours():
    # The long row wins every inner product; as a distance, everyone finds their own.
    rows = torch.tensor([[1.0, 0.0], [10.0, 10.0]])
    inner = rows @ rows.T
    assert assign(inner)[1] is False
    assert assign(inner, 0.5 * rows.square().sum(1))[1] is True


@pytest.mark.parametrize("seed", range(20))
def test_lazy_assignment_is_exact_and_lazy(seed):
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(6, 6))
    upper = exact + rng.exponential(0.2, size=(6, 6))
    asked = []

    def value(i, j):
        asked.append((i, j))
        return exact[i, j]

    columns = assign_lazily(upper, value)
    assert exact[np.arange(6), columns].sum() == pytest.approx(brute_force(exact.tolist()))
    assert len(asked) == len(set(asked)) <= 36
