"""Metrics of two vectors that are spread over many tensors, accumulated in float64.

All of them follow from a handful of sums (:class:`PairMoments`). The sums add up: those of a model are the sums of
those of its layers, so every tensor is read once however many metrics are wanted, per layer and globally.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_wsl.errors import RebasinError


@dataclass(frozen=True)
class PairMoments:
    """Sums over the entries of two vectors ``a`` and ``b`` of the same length.

    Attributes:
        dot: ``sum(a * b)``.
        sq_a: ``sum(a ** 2)``.
        sq_b: ``sum(b ** 2)``.
        sq_diff: ``sum((a - b) ** 2)``; kept apart, because ``sq_a + sq_b - 2 dot`` cancels for nearly equal vectors.
        conflicts: entries whose signs are opposite.
        active: entries that are non-zero in both.
        numel: number of entries.
    """

    dot: float = 0.0
    sq_a: float = 0.0
    sq_b: float = 0.0
    sq_diff: float = 0.0
    conflicts: int = 0
    active: int = 0
    numel: int = 0

    def __add__(self, other: PairMoments) -> PairMoments:
        return PairMoments(
            self.dot + other.dot,
            self.sq_a + other.sq_a,
            self.sq_b + other.sq_b,
            self.sq_diff + other.sq_diff,
            self.conflicts + other.conflicts,
            self.active + other.active,
            self.numel + other.numel,
        )


def pair_moments(a: Tensor, b: Tensor) -> PairMoments:
    """Sums behind the vector metrics of two tensors of the same shape, in float64.

    Args:
        a: any shape and real dtype.
        b: same shape as ``a``.

    Raises:
        RebasinError: the shapes differ.
    """
    if a.shape != b.shape:
        raise RebasinError(f"cannot compare tensors of shapes {tuple(a.shape)} and {tuple(b.shape)}")
    x = a.detach().reshape(-1).to(torch.float64)
    y = b.detach().reshape(-1).to(device=x.device, dtype=torch.float64)
    product = torch.sign(x) * torch.sign(y)  # of signs, so that tiny entries cannot underflow to "no conflict"
    diff = x - y
    sums = torch.stack((torch.dot(x, y), torch.dot(x, x), torch.dot(y, y), torch.dot(diff, diff)))
    dot, sq_a, sq_b, sq_diff = sums.tolist()
    return PairMoments(dot, sq_a, sq_b, sq_diff, int((product < 0).sum()), int((product != 0).sum()), x.numel())


def mapping_moments(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, PairMoments]:
    """:func:`pair_moments` of every floating-point tensor, by name.

    Raises:
        RebasinError: the names or shapes differ.
    """
    missing = sorted(set(a) ^ set(b))
    if missing:
        raise RebasinError(f"{len(missing)} tensors are in one of the vectors only, the first is {missing[0]!r}")
    try:
        return {name: pair_moments(a[name], b[name]) for name in a if a[name].is_floating_point()}
    except RebasinError as error:
        bad = next(name for name in a if a[name].shape != b[name].shape)
        raise RebasinError(f"{bad!r}: {error}") from None


def total(moments: Mapping[str, PairMoments]) -> PairMoments:
    """Moments of the concatenation of all tensors."""
    return sum(moments.values(), PairMoments())


# The metrics. A metric without meaning (the angle to a zero vector) is nan, never a number that looks like an answer.


def cosine_similarity(m: PairMoments) -> float:
    """``<a, b> / (|a| |b|)``, in [-1, 1].

    >>> cosine_similarity(pair_moments(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])))  # doctest: +ELLIPSIS
    0.7071...
    """
    norm = math.sqrt(m.sq_a * m.sq_b)
    return max(-1.0, min(1.0, m.dot / norm)) if norm > 0 else math.nan


def dot_product(m: PairMoments) -> float:
    """``<a, b>``."""
    return m.dot


def l2_distance(m: PairMoments) -> float:
    """``|a - b|``."""
    return math.sqrt(m.sq_diff)


def angle(m: PairMoments) -> float:
    """Angle between the vectors in degrees, in [0, 180]."""
    cosine = cosine_similarity(m)
    return math.degrees(math.acos(cosine)) if not math.isnan(cosine) else math.nan


def magnitude_ratio(m: PairMoments) -> float:
    """``|b| / |a|``: how long the second vector is, the first being one."""
    return math.sqrt(m.sq_b / m.sq_a) if m.sq_a > 0 else math.nan


def sign_conflict(m: PairMoments) -> float:
    """Share of the entries, among those non-zero in both, whose signs are opposite (as in TIES-Merging)."""
    return m.conflicts / m.active if m.active else math.nan


def stack_singular_values(m: PairMoments) -> tuple[float, float]:
    """Singular values of the 2 x n matrix that stacks both vectors, from its Gram matrix.

    The Gram matrix is ``[[|a|^2, <a,b>], [<a,b>, |b|^2]]``; its eigenvalues are the squares of the singular values.

    >>> stack_singular_values(pair_moments(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])))
    (4.0, 3.0)
    """
    mean, half = (m.sq_a + m.sq_b) / 2, (m.sq_a - m.sq_b) / 2
    largest = mean + math.hypot(half, m.dot)
    # The smaller one from the determinant: a difference of two large numbers would lose it for parallel vectors.
    smallest = max(0.0, m.sq_a * m.sq_b - m.dot**2) / largest if largest > 0 else 0.0
    return math.sqrt(largest), math.sqrt(smallest)


def effective_rank(singular_values: Tensor | tuple[float, ...]) -> float:
    """``exp(H(p))`` with ``p = sigma / sum(sigma)`` (Roy and Vetterli 2007); between 1 and the rank.

    >>> effective_rank((1.0, 1.0))
    2.0
    """
    values = [float(v) for v in singular_values]
    norm = sum(values)
    if norm <= 0:
        return math.nan
    entropy = -sum(v / norm * math.log(v / norm) for v in values if v > 0)
    return math.exp(entropy)


def stable_rank(singular_values: Tensor | tuple[float, ...]) -> float:
    """``|M|_F^2 / |M|_2^2``."""
    squares = [float(v) ** 2 for v in singular_values]
    return sum(squares) / max(squares) if squares and max(squares) > 0 else math.nan


def participation_ratio(singular_values: Tensor | tuple[float, ...]) -> float:
    """``(sum sigma^2)^2 / sum sigma^4``: the number of directions that share the energy."""
    squares = [float(v) ** 2 for v in singular_values]
    fourth = sum(v * v for v in squares)
    return sum(squares) ** 2 / fourth if fourth > 0 else math.nan


def spectral_gap(singular_values: Tensor | tuple[float, ...]) -> float:
    """``sigma_1 - sigma_2``, the distance of the two largest singular values."""
    values = sorted((float(v) for v in singular_values), reverse=True)
    return values[0] - values[1] if len(values) > 1 else math.nan


def vector_metrics(m: PairMoments) -> dict[str, float]:
    """All metrics of a pair of vectors.

    Returns:
        ``cosine``, ``l2``, ``dot``, ``angle`` (degrees), ``magnitude_ratio``, ``sign_conflict`` of the pair, and
        ``effective_rank``, ``stable_rank``, ``participation_ratio``, ``spectral_gap`` of the stack of the two.
    """
    stack = stack_singular_values(m)
    return {
        "cosine": cosine_similarity(m),
        "l2": l2_distance(m),
        "dot": dot_product(m),
        "angle": angle(m),
        "magnitude_ratio": magnitude_ratio(m),
        "sign_conflict": sign_conflict(m),
        "effective_rank": effective_rank(stack),
        "stable_rank": stable_rank(stack),
        "participation_ratio": participation_ratio(stack),
        "spectral_gap": spectral_gap(stack),
    }
