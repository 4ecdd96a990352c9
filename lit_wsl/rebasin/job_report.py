"""What an alignment job is asked and what it found, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.matching import MatchingResult
from lit_wsl.rebasin.metrics import VectorComparison
from lit_wsl.rebasin.spec import PermutationSpec

On = Literal["task_vectors", "weights"]
Merge = Literal["average", "task_arithmetic"]
Matching = Literal["weights", "best"]
StateDict = Mapping[str, Tensor]

MEAN_STATISTICS = (
    "the norm statistics of the merged model are the mean of the models', which does not describe it: estimate them "
    "anew on data with lit_wsl.rebasin.reestimate_batchnorm"
)


@dataclass(frozen=True)
class AlignOptions:
    """How to match and merge.

    Attributes:
        on: what is compared, and aligned for the comparison: task vectors, or the weights themselves.
        max_iter: most sweeps for each start of the matching.
        seed: of its random orders.
        restarts: further starts, see :func:`weight_matching`.
        spectra: also the metrics that need singular value decompositions.
        merge: how to merge the aligned models; None for not at all.
        merge_scale: factor of each task vector in task arithmetic; None for one over their number.
        matching: how whole weights are matched: on weights, or in the way that merges best on data
            (:func:`best_matching`), which :func:`align` is then given.
        device: where similarity matrices are computed.
        progress: show a progress bar; None for only on a terminal.
    """

    on: On = "task_vectors"
    max_iter: int = 100
    seed: int = 0
    restarts: int = 2
    spectra: bool = True
    merge: Merge | None = None
    merge_scale: float | None = None
    matching: Matching = "weights"
    device: str | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.on not in get_args(On):
            raise RebasinError(f"on={self.on!r} is not known: choose one of {', '.join(get_args(On))}")
        if self.merge is not None and self.merge not in get_args(Merge):
            raise RebasinError(
                f"merge={self.merge!r} is not known: choose one of {', '.join(get_args(Merge))}, or None"
            )
        if self.matching not in get_args(Matching):
            raise RebasinError(
                f"matching={self.matching!r} is not known: choose one of {', '.join(get_args(Matching))}"
            )
        if self.max_iter < 1:
            raise RebasinError(f"max_iter={self.max_iter} leaves nothing to do: at least one sweep")


@dataclass(frozen=True)
class Aligned:
    """One model next to the reference.

    Attributes:
        before: metrics against the reference as the model came.
        after: metrics after the alignment; None where it was not aligned.
        compared: the permutations that ``after`` speaks of (found on ``on``).
        on_weights: the permutations found on whole weights, which every merge uses.
        state_dict: the whole weights in the reference's order, found on whole weights; the function is the same.
        task_vector: the task vector, aligned by ``compared``; None without a pretrained model.
    """

    before: VectorComparison
    after: VectorComparison | None = None
    compared: MatchingResult | None = None
    on_weights: MatchingResult | None = None
    state_dict: dict[str, Tensor] | None = None
    task_vector: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class RebasinReport:
    """What a job found.

    Attributes:
        perm_matching: whether the models were aligned; if not, ``reason`` says why.
        reference: name of the model the others were aligned to.
        options: how it was done.
        models: the others by name.
        merged: the merged state dict, if it was asked for.
        merge_weights: names of the models that were merged.
        spec: the permutation spec that was used.
        reason: why the models were not aligned.
        notes: remarks for the reader.
        files: what was written, by kind.
    """

    perm_matching: bool
    reference: str
    options: AlignOptions
    models: dict[str, Aligned]
    merged: dict[str, Tensor] | None = None
    spec: PermutationSpec | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    def scalars(self, prefix: str = "rebasin", layers: bool = False) -> dict[str, float]:
        """Numbers for loggers: ``rebasin/<model>/before/cosine`` and so on; values without meaning are left out."""
        values = {f"{prefix}/perm_matching": float(self.perm_matching)}
        for name, model in self.models.items():
            for when, comparison in (("before", model.before), ("after", model.after)):
                if comparison is None:
                    continue
                plain = comparison.to_dict()
                parts = {"": plain["overall"]} | (plain["layers"] if layers else {})
                for layer, metrics in parts.items():
                    middle = f"{when}/{layer}" if layer else when
                    found = {f"{prefix}/{name}/{middle}/{k}": v for k, v in metrics.items() if v is not None}
                    values.update(found)
            if model.compared is not None:
                values[f"{prefix}/{name}/identity_share"] = model.compared.identity_share
            if model.on_weights is not None:
                values[f"{prefix}/{name}/identity_share_weights"] = model.on_weights.identity_share
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without tensors."""
        return {
            "perm_matching": self.perm_matching,
            "reason": self.reason,
            "on": self.options.on,
            "reference": self.reference,
            "seed": self.options.seed,
            "max_iter": self.options.max_iter,
            "restarts": self.options.restarts,
            "merge": self.options.merge if self.merged is not None else None,
            "spec": None if self.spec is None else _spec_summary(self.spec),
            "models": {name: _model_dict(model, self.options.on) for name, model in self.models.items()},
            "notes": list(self.notes),
            "files": self.files,
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def _spec_summary(spec: PermutationSpec) -> dict[str, Any]:
    return {
        "groups": len(spec.groups),
        "coverage": spec.coverage,
        "dropped": dict(spec.dropped),
        "frozen": {name: {str(axis): why for axis, why in axes.items()} for name, axes in spec.frozen.items()},
    }


def _model_dict(model: Aligned, on: On) -> dict[str, Any]:
    matchings = {on: model.compared, "weights": model.on_weights}
    return {
        "before": model.before.to_dict(),
        "after": None if model.after is None else model.after.to_dict(),
        "matching": {
            key: {
                "identity_share": found.identity_share,
                "objective_before": found.objective_before,
                "objective": found.objective,
                "sweeps": found.sweeps,
                "converged": found.converged,
                "certain": found.certain,
                "start": found.start,
            }
            for key, found in matchings.items()
            if found is not None
        },
    }
