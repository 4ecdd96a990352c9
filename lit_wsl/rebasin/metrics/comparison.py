"""Compare two task vectors (or whole weights): every metric, per layer and for the model as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lit_wsl.rebasin.metrics.matrices import is_matrix, matrix_metrics, spectrum
from lit_wsl.rebasin.metrics.vectors import mapping_moments, total, vector_metrics

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
    for key in ("spectrum_overlap", "left_subspace_overlap", "right_subspace_overlap", "interaction_overlap"):
        values = [v[key] for v in layers.values() if key in v and not math.isnan(v[key])]
        if values:
            means[key] = sum(values) / len(values)
    return means


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
