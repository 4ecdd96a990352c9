"""Optimal assignment, and how much worse the best alternative would be."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

FORBIDDEN = 1e6


def assign(cost: np.ndarray) -> list[tuple[int, int, float]]:
    """Solve the linear assignment problem and tell the margin of every pair.

    The margin of a pair is half the cost of the cheapest change of the whole assignment that breaks the pair: the
    cheapest alternating cycle through it in the residual graph (all-pairs shortest paths), half of it because the
    cheapest cycle is nearly always a swap, which changes two pairs.

    Args:
        cost: Matrix ``(n, m)``; entries of at least ``FORBIDDEN`` are impossible.

    Returns:
        ``(row, column, margin)`` of every possible pair, by row.

    >>> assign(np.array([[0.0, 1.0], [1.0, 0.0]]))
    [(0, 0, 1.0), (1, 1, 1.0)]
    >>> assign(np.array([[0.5, 0.5], [0.5, 0.5]]))[0][2]
    0.0
    """
    n, m = cost.shape
    size = max(n, m)
    square = np.zeros((size, size))  # missing rows and columns cost nothing, wherever they go
    square[:n, :m] = np.minimum(cost, FORBIDDEN)
    rows, columns = linear_sum_assignment(square)
    sigma = np.empty(size, dtype=int)
    sigma[rows] = columns
    own = square[np.arange(size), sigma]
    step = square[:, sigma] - own[:, None]  # (size, size): row i takes the column of row k
    np.fill_diagonal(step, np.inf)
    best = step.copy()
    for k in range(size):  # Floyd-Warshall; no negative cycles at the optimum
        np.minimum(best, best[:, k, None] + best[None, k, :], out=best)
    margins = np.diagonal(best) / 2
    return [
        (i, int(sigma[i]), float(min(max(margins[i], 0.0), 1.0)) if size > 1 else 1.0)
        for i in range(n)
        if sigma[i] < m and square[i, sigma[i]] < FORBIDDEN
    ]
