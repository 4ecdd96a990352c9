"""Metrics of two weight matrices from their singular value decompositions, one decomposition per matrix.

Weights of more than two axes are read as matrices of (outputs) x (everything else), as a convolution acts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_wsl.errors import RebasinError

#: Share of the squared singular values that the compared subspaces hold, where no number of directions is given.
ENERGY = 0.9


@dataclass(frozen=True)
class Spectrum:
    """Thin singular value decomposition ``M = U diag(S) Vh`` of an (m, n) matrix in float64.

    Attributes:
        U: (m, r) left singular vectors, ``r = min(m, n)``.
        S: (r,) singular values, descending.
        Vh: (r, n) right singular vectors.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def rank(self) -> int:
        """Numerical rank (the usual cut-off: largest singular value times the larger side times epsilon)."""
        if self.S.numel() == 0 or float(self.S[0]) == 0.0:
            return 0
        cutoff = self.S[0] * max(self.U.shape[0], self.Vh.shape[1]) * torch.finfo(self.S.dtype).eps
        return int((cutoff < self.S).sum())

    def directions(self, energy: float = ENERGY) -> int:
        """Smallest number of leading directions that hold the given share of ``sum(S ** 2)``."""
        squares = torch.cumsum(self.S.square(), 0)
        if squares.numel() == 0 or float(squares[-1]) == 0.0:
            return 0
        return int((squares < energy * squares[-1]).sum()) + 1


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight of two or more axes as (outputs, everything else) in float64."""
    if tensor.ndim < 2:
        raise RebasinError(f"a tensor of shape {tuple(tensor.shape)} is not a matrix; use the vector metrics")
    return tensor.detach().reshape(tensor.shape[0], -1).to(torch.float64)


def spectrum(tensor: Tensor) -> Spectrum:
    """Singular value decomposition of a weight, in float64 on the tensor's own device."""
    return Spectrum(*torch.linalg.svd(as_matrix(tensor), full_matrices=False))


def spectrum_overlap(a: Spectrum, b: Spectrum) -> float:
    """Cosine of the two vectors of singular values: 1 for the same spectrum up to scale, whatever the directions."""
    norm = float(a.S.norm() * b.S.norm())
    return min(1.0, float(torch.dot(a.S, b.S)) / norm) if norm > 0 else math.nan


def _shared_directions(a: Spectrum, b: Spectrum, k: int | None) -> int:
    wanted = max(a.directions(), b.directions()) if k is None else k
    return min(wanted, a.rank, b.rank)


def left_subspace_overlap(a: Spectrum, b: Spectrum, k: int | None = None) -> float:
    """``|U1[:, :k]^T U2[:, :k]|_F / sqrt(k)``: 1 for the same output subspace, 0 for orthogonal ones.

    Args:
        a: decomposition of the first matrix.
        b: decomposition of the second matrix, of the same shape.
        k: number of leading directions; by default as many as hold 90 % of the energy of both. Never more than the
            rank of either, because the vectors beyond it are arbitrary.
    """
    k = _shared_directions(a, b, k)
    return min(1.0, float((a.U[:, :k].T @ b.U[:, :k]).norm()) / math.sqrt(k)) if k else math.nan


def right_subspace_overlap(a: Spectrum, b: Spectrum, k: int | None = None) -> float:
    """``|V1[:, :k]^T V2[:, :k]|_F / sqrt(k)``, the same for the input subspaces."""
    k = _shared_directions(a, b, k)
    return min(1.0, float((a.Vh[:k] @ b.Vh[:k].T).norm()) / math.sqrt(k)) if k else math.nan


def interaction_overlap(a: Spectrum, b: Spectrum) -> float:
    """``sum_ij s1_i s2_j |u1_i . u2_j| |v1_i . v2_j| / (|s1| |s2|)``, in [|cosine|, 1].

    How much the directions of one matrix meet those of the other on both sides at once, weighted by their strength:
    interference that the plain cosine can hide behind opposite signs. 1 for identical matrices.
    """
    norm = float(a.S.norm() * b.S.norm())
    if norm == 0:
        return math.nan
    meeting = (a.U.T @ b.U).abs() * (a.Vh @ b.Vh.T).abs()
    return min(1.0, float(a.S @ meeting @ b.S) / norm)


def matrix_metrics(a: Spectrum, b: Spectrum, k: int | None = None) -> dict[str, float]:
    """All metrics of a pair of matrices of the same shape.

    Returns:
        ``spectrum_overlap``, ``left_subspace_overlap``, ``right_subspace_overlap``, ``interaction_overlap``.

    Raises:
        RebasinError: the shapes differ.
    """
    if a.U.shape != b.U.shape or a.Vh.shape != b.Vh.shape:
        shapes = [(s.U.shape[0], s.Vh.shape[1]) for s in (a, b)]
        raise RebasinError(f"cannot compare matrices of shapes {shapes[0]} and {shapes[1]}")
    return {
        "spectrum_overlap": spectrum_overlap(a, b),
        "left_subspace_overlap": left_subspace_overlap(a, b, k),
        "right_subspace_overlap": right_subspace_overlap(a, b, k),
        "interaction_overlap": interaction_overlap(a, b),
    }


def is_matrix(tensor: Tensor) -> bool:
    """Whether the tensor is a real matrix in the sense of this module: two axes or more, neither trivial."""
    return tensor.is_floating_point() and tensor.ndim >= 2 and min(tensor.shape[0], tensor[0].numel()) > 1
