"""Exact linear assignment: maximise ``sum_i S[i, p[i]]`` over permutations ``p``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lit_wsl.rebasin.matching.large_assignment import MIN_SIZE, assign_large


def is_permutation(index: Tensor) -> bool:
    """Whether every value of ``0 .. n-1`` occurs once in a LongTensor ``(n,)``."""
    return bool((torch.bincount(index, minlength=index.numel()) == 1).all())


def assign(similarity: Tensor, potential: Tensor | None = None) -> tuple[Tensor, bool]:
    """The best permutation for a square similarity matrix.

    If the best column of every row is another one, these columns are the optimum, and no assignment problem has to be
    solved: the case of a planted permutation and of fine-tuned pairs. A potential makes the case more frequent. Taking
    ``potential[j]`` off column ``j`` changes no difference between permutations; with half the squared norm of what
    stands behind the column, "the largest inner product" becomes "the nearest neighbour".

    Rows that cannot be told apart are in the answer as the solver leaves them.

    Args:
        similarity: (n, n), any device and floating dtype.
        potential: (n,), taken off the columns.

    Returns:
        LongTensor (n,) on the CPU with the column of each row, and whether the row-wise maxima were the answer.

    >>> assign(torch.tensor([[1.0, 5.0], [2.0, 3.0]]))
    (tensor([1, 0]), False)
    """
    best = (similarity if potential is None else similarity - potential).argmax(dim=1)
    if is_permutation(best):
        return best.cpu(), True
    if len(similarity) >= MIN_SIZE:
        return assign_large(similarity.detach()), False
    # The solver starts with prices of zero. Prices at the columns' maxima are closer to the optimal ones, and it needs
    # half the time; prices at half the squared norms would cost it several times as much.
    reduced = similarity - similarity.amax(dim=0)
    solved = linear_sum_assignment(reduced.detach().cpu().numpy(), maximize=True)[1]
    return torch.from_numpy(solved).long(), False


def assign_lazily(upper: np.ndarray, value: Callable[[int, int], float]) -> np.ndarray:
    """The best permutation where the entries are expensive, each an optimum of its own, but cheap to bound.

    Solve with the upper bounds; put the exact values of the chosen entries in their place; solve again; until all
    chosen entries are exact. The last solution is then an optimum of the exact matrix, because no other permutation
    can be worth more than its bound says. Usually little more than one exact value per row is computed.

    Args:
        upper: (n, n) float64, no entry smaller than its value.
        value: the exact entry at a row and column.

    Returns:
        (n,) the column of each row.
    """
    matrix = upper.copy()
    exact = np.zeros(matrix.shape, dtype=bool)
    rows = np.arange(len(matrix))
    while True:
        columns = linear_sum_assignment(matrix, maximize=True)[1]
        open_rows = rows[~exact[rows, columns]]
        if len(open_rows) == 0:
            return columns
        for row in open_rows:
            matrix[row, columns[row]] = min(matrix[row, columns[row]], value(int(row), int(columns[row])))
            exact[row, columns[row]] = True
