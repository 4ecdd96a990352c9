"""Metrics of two task vectors or of two weight matrices, as functions and as torchmetrics classes; and the comparison.

Those of vectors that are spread over many tensors follow from a handful of sums in float64 (:class:`PairMoments`). The
sums add up: those of a model are the sums of those of its layers, so every tensor is read once. Those of matrices
follow from one singular value decomposition per matrix; weights of more axes are read as (outputs) x (everything else).
The classes accumulate over tensors, sync over processes and combine in collections.

>>> metrics = task_vector_metrics()
>>> metrics.update({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])})
>>> round(metrics.compute()["angle"].item(), 6)
90.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lit_wsl.errors import RebasinError

__path__: list[str] = []  # a package once, whose modules are looked up in lit_wsl.former_paths

#: Share of the squared singular values that the compared subspaces hold, where no number of directions is given.
ENERGY = 0.9
MATRIX_METRICS = ("spectrum_overlap", "left_subspace_overlap", "right_subspace_overlap", "interaction_overlap")


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

    def directions(self) -> int:
        """Smallest number of leading directions that hold :data:`ENERGY` of ``sum(S ** 2)``."""
        squares = torch.cumsum(self.S.square(), 0)
        if squares.numel() == 0 or float(squares[-1]) == 0.0:
            return 0
        return int((squares < ENERGY * squares[-1]).sum()) + 1


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
        Their values by the names of :data:`MATRIX_METRICS`.

    Raises:
        RebasinError: the shapes differ.
    """
    if a.U.shape != b.U.shape or a.Vh.shape != b.Vh.shape:
        shapes = [(s.U.shape[0], s.Vh.shape[1]) for s in (a, b)]
        raise RebasinError(f"cannot compare matrices of shapes {shapes[0]} and {shapes[1]}")
    left, right = left_subspace_overlap(a, b, k), right_subspace_overlap(a, b, k)
    return dict(zip(MATRIX_METRICS, (spectrum_overlap(a, b), left, right, interaction_overlap(a, b)), strict=True))


def is_matrix(tensor: Tensor) -> bool:
    """Whether the tensor is a real matrix in the sense of this module: two axes or more, neither trivial."""
    return tensor.is_floating_point() and tensor.ndim >= 2 and min(tensor.shape[0], tensor[0].numel()) > 1


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
        return PairMoments(*(x + y for x, y in zip(astuple(self), astuple(other))))


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


#: Matrices whose smaller side is larger are not decomposed unless asked: the cost grows with its cube.
MAX_SIDE = 1024


@dataclass(frozen=True)
class VectorComparison:
    """Metrics of a pair of vectors that are spread over named tensors.

    Attributes:
        layers: metrics by tensor name.
        overall: vector metrics of the concatenation of all tensors; for the metrics of matrices, the mean over the
            matrices that have a value.
        undecomposed: matrices that were too large for a decomposition; they have vector metrics only.
    """

    layers: dict[str, dict[str, float]]
    overall: dict[str, float]
    undecomposed: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, where an undefined value is ``None``."""
        return {
            "overall": _plain(self.overall),
            "layers": {name: _plain(values) for name, values in self.layers.items()},
            "undecomposed": list(self.undecomposed),
        }


def compare_vectors(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, spectra: bool = True, max_side: int | None = MAX_SIDE
) -> VectorComparison:
    """All metrics of two task vectors, per layer and global, in float64.

    Args:
        a: first vector by tensor name; tensors that are not floating point are skipped.
        b: second vector, same names and shapes.
        spectra: also the metrics that need singular value decompositions, one decomposition per matrix.
        max_side: matrices whose smaller side is larger are not decomposed, and named in ``undecomposed``; None for
            no limit.

    Raises:
        RebasinError: names or shapes differ.
    """
    moments = mapping_moments(a, b)
    layers = {name: vector_metrics(m) for name, m in moments.items()}
    undecomposed = []
    for name in layers if spectra else ():
        if not is_matrix(a[name]):
            continue
        if max_side is not None and min(a[name].shape[0], a[name][0].numel()) > max_side:
            undecomposed.append(name)
            continue
        layers[name] |= matrix_metrics(spectrum(a[name]), spectrum(b[name]))
    overall = vector_metrics(total(moments)) | _means(layers)
    return VectorComparison(layers, overall, tuple(undecomposed))


def _means(layers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    means = {}
    for key in MATRIX_METRICS:
        values = [v[key] for v in layers.values() if key in v and not math.isnan(v[key])]
        if values:
            means[key] = sum(values) / len(values)
    return means


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


# The metrics as classes.

Vector = Tensor | Mapping[str, Tensor]


def _pairs(a: Vector, b: Vector) -> list[tuple[Tensor, Tensor]]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [(a, b)]
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        raise RebasinError("give two tensors or two mappings of tensors, not one of each")
    if set(a) != set(b):
        raise RebasinError(f"tensors in one of the vectors only: {sorted(set(a) ^ set(b))[:5]}")
    return [(a[name], b[name]) for name in a if a[name].is_floating_point()]


_SUMS = tuple(field.name for field in fields(PairMoments))


class _VectorMetric(Metric):
    """Accumulates :class:`PairMoments`; all subclasses have the same states, so that a collection shares them."""

    is_differentiable = False
    full_state_update = False
    formula: Callable[[PairMoments], float]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in _SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, a: Vector, b: Vector) -> None:
        """Add one tensor of each vector, or all of them as mappings by name."""
        for x, y in _pairs(a, b):
            m = pair_moments(x, y)
            for name, value in asdict(m).items():
                getattr(self, name).add_(value)

    def compute(self) -> Tensor:
        """The metric of everything added so far, a float64 scalar (nan where it has no meaning)."""
        moments = PairMoments(*(getattr(self, name).item() for name in _SUMS))
        return torch.tensor(type(self).formula(moments), dtype=torch.float64)


class VectorCosineSimilarity(_VectorMetric):
    """Cosine of the angle between two vectors spread over tensors; see :func:`cosine_similarity`."""

    formula = staticmethod(cosine_similarity)


class VectorL2Distance(_VectorMetric):
    """Euclidean distance; see :func:`l2_distance`."""

    formula = staticmethod(l2_distance)


class VectorDotProduct(_VectorMetric):
    """Inner product; see :func:`dot_product`."""

    formula = staticmethod(dot_product)


class VectorAngle(_VectorMetric):
    """Angle in degrees; see :func:`angle`."""

    formula = staticmethod(angle)


class MagnitudeRatio(_VectorMetric):
    """Length of the second vector over that of the first; see :func:`magnitude_ratio`."""

    formula = staticmethod(magnitude_ratio)


class SignConflict(_VectorMetric):
    """Share of opposite signs; see :func:`sign_conflict`."""

    formula = staticmethod(sign_conflict)


class StackEffectiveRank(_VectorMetric):
    """Effective rank of the stack of both vectors, in [1, 2]; see :func:`effective_rank`."""

    formula = staticmethod(lambda m: effective_rank(stack_singular_values(m)))


class StackStableRank(_VectorMetric):
    """Stable rank of the stack of both vectors, in [1, 2]; see :func:`stable_rank`."""

    formula = staticmethod(lambda m: stable_rank(stack_singular_values(m)))


class StackParticipationRatio(_VectorMetric):
    """Participation ratio of the stack of both vectors, in [1, 2]; see :func:`participation_ratio`."""

    formula = staticmethod(lambda m: participation_ratio(stack_singular_values(m)))


class StackSpectralGap(_VectorMetric):
    """Difference of the two singular values of the stack of both vectors; see :func:`spectral_gap`."""

    formula = staticmethod(lambda m: spectral_gap(stack_singular_values(m)))


class _MatrixMetric(Metric):
    """Mean over matrices; all subclasses have the same states, so that a collection decomposes each matrix once."""

    is_differentiable = False
    full_state_update = False
    key: str
    sums: Tensor
    counts: Tensor

    def __init__(self, k: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k
        self.add_state("sums", torch.zeros(len(MATRIX_METRICS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(MATRIX_METRICS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, a: Vector, b: Vector) -> None:
        """Add a pair of matrices, or all matrices of two mappings; tensors that are no matrices are passed over."""
        for x, y in _pairs(a, b):
            if not is_matrix(x):
                continue
            values = matrix_metrics(spectrum(x), spectrum(y), self.k)
            row = torch.tensor([values[key] for key in MATRIX_METRICS], dtype=torch.float64, device=self.sums.device)
            self.sums += torch.nan_to_num(row)
            self.counts += ~torch.isnan(row)

    def compute(self) -> Tensor:
        """Mean over the matrices that have a value, a float64 scalar; nan without any."""
        index = MATRIX_METRICS.index(self.key)
        return self.sums[index] / self.counts[index]


class SpectrumOverlap(_MatrixMetric):
    """Cosine of the singular-value vectors, mean over matrices; see :func:`spectrum_overlap`."""

    key = "spectrum_overlap"


class LeftSubspaceOverlap(_MatrixMetric):
    """Overlap of the output subspaces, mean over matrices; see :func:`left_subspace_overlap`."""

    key = "left_subspace_overlap"


class RightSubspaceOverlap(_MatrixMetric):
    """Overlap of the input subspaces, mean over matrices; see :func:`right_subspace_overlap`."""

    key = "right_subspace_overlap"


class InteractionOverlap(_MatrixMetric):
    """Interaction overlap, mean over matrices; see :func:`interaction_overlap`."""

    key = "interaction_overlap"


_VECTOR_METRICS: dict[str, type[Metric]] = {
    "cosine": VectorCosineSimilarity,
    "l2": VectorL2Distance,
    "dot": VectorDotProduct,
    "angle": VectorAngle,
    "magnitude_ratio": MagnitudeRatio,
    "sign_conflict": SignConflict,
    "effective_rank": StackEffectiveRank,
    "stable_rank": StackStableRank,
    "participation_ratio": StackParticipationRatio,
    "spectral_gap": StackSpectralGap,
}
_MATRIX_METRICS: dict[str, type[Metric]] = {
    metric.key: metric for metric in (SpectrumOverlap, LeftSubspaceOverlap, RightSubspaceOverlap, InteractionOverlap)
}


def task_vector_metrics(*, spectra: bool = True, prefix: str | None = None) -> MetricCollection:
    """All metrics in one collection that reads every tensor once and decomposes every matrix once.

    Args:
        spectra: also the metrics that need singular value decompositions.
        prefix: put in front of the names, as in torchmetrics.
    """
    groups = [list(_VECTOR_METRICS)] + ([list(_MATRIX_METRICS)] if spectra else [])
    classes = _VECTOR_METRICS | (_MATRIX_METRICS if spectra else {})
    # The groups are given, not found: torchmetrics would update every metric on its own the first time.
    return MetricCollection({name: cls() for name, cls in classes.items()}, prefix=prefix, compute_groups=groups)
