"""Inner products: between the units of two models as matrices, between two tensors as a number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Similarity entries that are held at once; beyond it, nested blocks are computed pair by pair.
MAX_ENTRIES = 2**28
#: Terms of at most so many entries per unit are put side by side before they are multiplied.
THIN = 64


class Similarity:
    """Inner products between the units of both models, for every pair of ancestor units.

    Rows of the terms are added one after the other and not kept, unless there are too many pairs to hold at once.
    Thin terms (biases, gains) wait for each other: one product with all of them writes the matrix once.

    Args:
        ancestors: units of all ancestors together.
        size: units (for a coupled pair, the product of both sizes).
        potential: (ancestors, size) half the squared norm of the other model's rows over all terms to come, where it
            is known already.
    """

    def __init__(self, ancestors: int, size: int, potential: Tensor | None = None) -> None:
        self.ancestors, self.size = ancestors, size
        self._keep_rows = ancestors > 1 and (ancestors * size) ** 2 > MAX_ENTRIES
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._thin: list[tuple[Tensor, Tensor]] = []
        self._whole: Tensor | None = None
        self._potential = potential
        self._potential_known = potential is not None

    def add(self, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        """Add a term: its rows ``(ancestors, size, entries)`` of the reference and of the other model."""
        if not self._potential_known:
            squares = torch.linalg.vector_norm(b, dim=2).square_().float().mul_(0.5 * weight)
            self._potential = squares if self._potential is None else self._potential.add_(squares)
        if self._keep_rows:
            self._pairs.append((a * weight if weight != 1.0 else a, b))
            return
        flat_a, flat_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        if flat_a.shape[1] <= THIN:
            self._thin.append((flat_a * weight if weight != 1.0 else flat_a, flat_b))
        else:
            self._multiply(flat_a, flat_b, weight)

    def _multiply(self, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        if self._whole is None:
            self._whole = a @ b.T
            if weight != 1.0:
                self._whole.mul_(weight)
        else:
            self._whole.addmm_(a.to(self._whole.dtype), b.T.to(self._whole.dtype), alpha=weight)

    @property
    def whole(self) -> Tensor:
        """(ancestors * size, ancestors * size) all inner products."""
        if self._thin:
            thin, self._thin = self._thin, []
            self._multiply(torch.cat([a for a, _ in thin], dim=1), torch.cat([b for _, b in thin], dim=1))
        assert self._whole is not None
        return self._whole

    @property
    def potential(self) -> Tensor:
        """(ancestors, size) half the squared norm of the other model's rows."""
        assert self._potential is not None
        return self._potential

    def worth(self, columns: Tensor) -> float:
        """What a permutation is worth, without ancestors, in float64."""
        return worth(self.whole, columns)

    def block(self, i: int, j: int) -> Tensor:
        """(size, size) inner products between ancestor unit ``i`` of the reference and ``j`` of the other model."""
        if not self._keep_rows:
            return self.whole[i * self.size : (i + 1) * self.size, j * self.size : (j + 1) * self.size]
        result = self._pairs[0][0][i] @ self._pairs[0][1][j].T
        for a, b in self._pairs[1:]:
            result = result.addmm_(a[i], b[j].T)
        return result

    def bounds(self) -> np.ndarray:
        """(ancestors, ancestors) float64: what the best permutation between two ancestor units can't exceed."""
        result = np.empty((self.ancestors, self.ancestors))
        for i in range(self.ancestors):
            for j in range(self.ancestors):
                potential = self.potential[j]
                best = (self.block(i, j) - potential).amax(dim=1).double().sum()
                result[i, j] = float(best + potential.double().sum())
        return result


def worth(block: Tensor, columns: Tensor) -> float:
    """``sum_i block[i, columns[i]]`` in float64."""
    chosen = block.gather(1, columns.to(block.device)[:, None])
    return float(chosen.double().sum())


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of the same shape, accumulated in float64."""
    x, y = a.reshape(-1), b.reshape(-1)
    # Pieces that stay in the cache when converted, and are too small to be worth waiting for other threads.
    chunk = 2**15 if x.device.type == "cpu" else 2**24
    parts = [torch.dot(x[i : i + chunk].double(), y[i : i + chunk].double()) for i in range(0, x.numel(), chunk)]
    return float(torch.stack(parts).sum()) if parts else 0.0


def norm(tensor: Tensor) -> float:
    """Root of the sum of squares, in float32 at least."""
    return float(torch.linalg.vector_norm(tensor if tensor.dtype == torch.float64 else tensor.float()))


def spread(tensor: Tensor) -> float:
    """Standard deviation; 0 for single values."""
    return float(tensor.float().std(correction=0)) if tensor.numel() > 1 else 0.0
