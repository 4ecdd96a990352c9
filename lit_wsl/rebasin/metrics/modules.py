"""The metrics as torchmetrics classes: they accumulate over tensors, sync over processes and combine in collections.

>>> import torch
>>> metrics = task_vector_metrics()
>>> metrics.update({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])})
>>> round(metrics.compute()["angle"].item(), 6)
90.0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.metrics import functional
from lit_wsl.rebasin.metrics.functional import (
    MATRIX_METRICS,
    PairMoments,
    is_matrix,
    matrix_metrics,
    pair_moments,
    spectrum,
)

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
    """Cosine of the angle between two vectors spread over tensors; see :func:`functional.cosine_similarity`."""

    formula = staticmethod(functional.cosine_similarity)


class VectorL2Distance(_VectorMetric):
    """Euclidean distance; see :func:`functional.l2_distance`."""

    formula = staticmethod(functional.l2_distance)


class VectorDotProduct(_VectorMetric):
    """Inner product; see :func:`functional.dot_product`."""

    formula = staticmethod(functional.dot_product)


class VectorAngle(_VectorMetric):
    """Angle in degrees; see :func:`functional.angle`."""

    formula = staticmethod(functional.angle)


class MagnitudeRatio(_VectorMetric):
    """Length of the second vector over that of the first; see :func:`functional.magnitude_ratio`."""

    formula = staticmethod(functional.magnitude_ratio)


class SignConflict(_VectorMetric):
    """Share of opposite signs; see :func:`functional.sign_conflict`."""

    formula = staticmethod(functional.sign_conflict)


class StackEffectiveRank(_VectorMetric):
    """Effective rank of the stack of both vectors, in [1, 2]; see :func:`functional.effective_rank`."""

    formula = staticmethod(lambda m: functional.effective_rank(functional.stack_singular_values(m)))


class StackStableRank(_VectorMetric):
    """Stable rank of the stack of both vectors, in [1, 2]; see :func:`functional.stable_rank`."""

    formula = staticmethod(lambda m: functional.stable_rank(functional.stack_singular_values(m)))


class StackParticipationRatio(_VectorMetric):
    """Participation ratio of the stack of both vectors, in [1, 2]; see :func:`functional.participation_ratio`."""

    formula = staticmethod(lambda m: functional.participation_ratio(functional.stack_singular_values(m)))


class StackSpectralGap(_VectorMetric):
    """Difference of the two singular values of the stack of both vectors; see :func:`functional.spectral_gap`."""

    formula = staticmethod(lambda m: functional.spectral_gap(functional.stack_singular_values(m)))


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
    """Cosine of the singular-value vectors, mean over matrices; see :func:`functional.spectrum_overlap`."""

    key = "spectrum_overlap"


class LeftSubspaceOverlap(_MatrixMetric):
    """Overlap of the output subspaces, mean over matrices; see :func:`functional.left_subspace_overlap`."""

    key = "left_subspace_overlap"


class RightSubspaceOverlap(_MatrixMetric):
    """Overlap of the input subspaces, mean over matrices; see :func:`functional.right_subspace_overlap`."""

    key = "right_subspace_overlap"


class InteractionOverlap(_MatrixMetric):
    """Interaction overlap, mean over matrices; see :func:`functional.interaction_overlap`."""

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
