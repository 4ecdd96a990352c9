"""A whole job: align several models to a reference, compare them before and after, and merge them.

Shared by :class:`lit_wsl.callbacks.RebasinCallback` and the command line. Pure: files are written by
:func:`~lit_wsl.rebasin.job.write_results` only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from lit_wsl.checkpoint import atomic_save, atomic_write_text
from lit_wsl.errors import RebasinError, Summarised
from lit_wsl.rebasin.matching.many import match_many
from lit_wsl.rebasin.matching.weights import (
    CONSTANT,
    MatchingResult,
    apply_permutation_to_task_vectors,
    for_whole_spec,
    task_vector,
    weight_matching_for_task_vectors,
    without_constants,
)
from lit_wsl.rebasin.merging.merge import average, is_statistic, task_arithmetic
from lit_wsl.rebasin.metrics import VectorComparison, compare_vectors
from lit_wsl.rebasin.spec.spec import PermutationSpec, apply_permutation

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
    """How to match and merge."""

    on: On = "task_vectors"  # what is compared, and aligned for the comparison: task vectors, or the weights themselves
    max_iter: int = 100  # maximum number of sweeps for each start of the matching
    seed: int = 0  # of its random orders
    restarts: int = 2  # further starts, see :func:`weight_matching`
    spectra: bool = True  # also the metrics that need singular value decompositions
    merge: Merge | None = None  # how to merge the aligned models; None for not at all
    merge_scale: float | None = None  # factor of each task vector in task arithmetic; None for one over their number
    # how much each model counts in the merged one, the reference first, relative to their sum; None for equally
    merge_weights: tuple[float, ...] | None = None
    # how whole weights are matched: on weights, or in the way that merges best on data (:func:`best_matching`), which
    # :func:`align` is then given
    matching: Matching = "weights"
    device: str | None = None  # where similarity matrices are computed
    progress: bool | None = None  # show a progress bar; None for only on a terminal

    def __post_init__(self) -> None:
        for name, kind in (("on", On), ("merge", Merge), ("matching", Matching)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known and not (name == "merge" and value is None):
                also = ", or None" if name == "merge" else ""
                raise RebasinError(f"{name}={value!r} is not known: choose one of {', '.join(known)}{also}")
        if self.max_iter < 1:
            raise RebasinError(f"max_iter={self.max_iter} leaves nothing to do: at least one sweep")
        if self.restarts < 0:
            raise RebasinError(f"restarts={self.restarts} is no number of further starts: 0 for none")
        if self.merge_weights is not None and (min(self.merge_weights, default=-1) < 0 or not sum(self.merge_weights)):
            raise RebasinError(
                f"merge_weights={list(self.merge_weights)}: one weight per model, none negative and not all zero"
            )
        if self.merge_weights is not None and self.merge is None:
            raise RebasinError("merge_weights say nothing without a merged model: choose merge='average'")

    def search(self) -> dict[str, Any]:
        """What every matching is told: sweeps, seed, further starts, progress."""
        return {key: getattr(self, key) for key in ("max_iter", "seed", "restarts", "progress")}

    def shares(self, count: int) -> list[float]:
        """How much each of so many models counts; the sum is one."""
        weights = self.merge_weights or (1.0,) * count
        if len(weights) != count:
            raise RebasinError(
                f"{len(weights)} merge_weights for {count} models: give one for each, the reference first"
            )
        return [weight / sum(weights) for weight in weights]


#: Models, and metrics of each, that a summary shows; ``to_dict`` has all of them.
SHOWN, METRICS = 20, ("cosine", "l2", "sign_conflict")


@dataclass(frozen=True, repr=False)
class Aligned:
    """One model next to the reference."""

    before: VectorComparison  # metrics against the reference as the model came
    after: VectorComparison | None = None  # metrics after the alignment; None where it was not aligned
    compared: MatchingResult | None = None  # the permutations that ``after`` speaks of (found on ``on``)
    on_weights: MatchingResult | None = None  # the permutations found on whole weights, which every merge uses
    # the whole weights in the reference's order, found on whole weights; the function is the same
    state_dict: dict[str, Tensor] | None = None
    # the task vector, aligned by ``compared``; None without a pretrained model
    task_vector: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        before = self.before.to_dict()["overall"]
        after = self.after.to_dict()["overall"] if self.after is not None else {}
        told = []
        for metric in METRICS:
            values = [part[metric] for part in (before, after) if isinstance(part.get(metric), (int, float))]
            if values:
                told.append(f"{metric} " + " -> ".join(f"{value:.4g}" for value in values))
        if self.on_weights is not None:
            told.append(f"{self.on_weights.identity_share:.1%} of the units in place")
        return ", ".join(told)


@dataclass(frozen=True, repr=False)
class RebasinReport(Summarised):
    """What a job found.

    Attributes:
        perm_matching: whether the models were aligned; if not, ``reason`` says why.
        reference: name of the model the others were aligned to.
        options: how it was done.
        models: the others by name.
        merged: the merged state dict, if it was asked for.
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

    def summary(self) -> str:
        """What was compared with what, before and after the alignment, as text."""
        if self.perm_matching:
            head = f"aligned to {self.reference!r}, on {self.options.on}"
        else:
            head = f"compared with {self.reference!r} as they are, not aligned: {self.reason}"
        lines = [head, *([] if self.spec is None else [repr(self.spec)])]
        lines += [f"  {name}: {model!r}" for name, model in list(self.models.items())[:SHOWN]]
        lines += [f"  and {len(self.models) - SHOWN} more"] if len(self.models) > SHOWN else []
        lines += [f"merged: {', '.join(self.models)} into {self.reference!r}"] if self.merged is not None else []
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        state = "aligned" if self.perm_matching else "not aligned"
        return f"<RebasinReport {', '.join(self.models)} {state} to {self.reference}>"

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


REPORT_FILE = "rebasin.json"


def write_results(report: RebasinReport, folder: str | Path, *, weights: bool = True) -> RebasinReport:
    """Write ``rebasin.json``, one aligned checkpoint per model and the merged one.

    An aligned checkpoint has ``state_dict`` (whole weights in the reference's order, ready to merge),
    ``permutations`` (found on whole weights) and, where task vectors were compared, ``task_vector`` and
    ``task_vector_permutations``. They are for comparing only.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    if weights:
        for name, model in report.models.items():
            if model.state_dict is None or model.on_weights is None or model.compared is None:
                continue
            content: dict[str, Any] = {
                "state_dict": _saveable(model.state_dict),
                "permutations": _saveable(model.on_weights),
                "reference": report.reference,
            }
            if model.task_vector is not None:
                content["task_vector"] = _saveable(model.task_vector)
                content["task_vector_permutations"] = _saveable(model.compared)
            files[f"aligned/{name}"] = f"rebasin_aligned_{name}.ckpt"
            atomic_save(content, folder / files[f"aligned/{name}"])
        if report.merged is not None:
            files["merged"] = "rebasin_merged.ckpt"
            merged_of = [report.reference, *report.models]
            atomic_save({"state_dict": _saveable(report.merged), "merged": merged_of}, folder / files["merged"])
    report = replace(report, files={**files, "report": REPORT_FILE})
    atomic_write_text(folder / REPORT_FILE, report.to_json() + "\n")
    return report


def _saveable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """Short, different names for checkpoints: the file's stem, with as many parent folders as it takes.

    >>> names_of(["runs/a/last.ckpt", "runs/b/last.ckpt", "other.pt"])
    ['a_last', 'b_last', 'other']
    """
    parts = [[*Path(p).parts[:-1], Path(p).stem] for p in paths]
    names = []
    for number, own in enumerate(parts):
        others = [other for i, other in enumerate(parts) if i != number]
        depth = 1
        while depth < len(own) and any(other[-depth:] == own[-depth:] for other in others):
            depth += 1
        names.append("_".join(part.strip("/") for part in own[-depth:]))
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[i] = f"{name}_{seen[name]}"
    return names


def under_names_of(own: Mapping[str, Any], state: StateDict, what: str) -> dict[str, Tensor]:
    """The tensors of a state dict under the model's names: as they are, or less or plus one prefix, in any shape."""
    renamings = {"": list(state)}
    ends = sorted({name.split(".", 1)[0] + "." for name in state if "." in name})
    renamings.update({f"less {end}": [n[len(end) :] if n.startswith(end) else "" for n in state] for end in ends})
    starts = sorted({name.split(".", 1)[0] + "." for name in own if "." in name})
    renamings.update({f"plus {start}": [start + n for n in state] for start in starts})
    best: dict[str, str] = {}
    for renamed in renamings.values():
        found = {new: old for old, new in zip(state, renamed) if new in own}
        if len(found) > len(best):
            best = found
    fitting = {new: state[best[new]] for new in own if new in best}
    if not any(tensor.shape == own[name].shape for name, tensor in fitting.items()):
        raise RebasinError(
            f"{what}: none of its {len(state)} tensors has the name and shape of one of the model's. "
            "Bring it to this model first: lit-wsl map and lit-wsl convert do that."
        )
    return fitting


Matcher: TypeAlias = Callable[[Sequence[StateDict]], Sequence[MatchingResult]]


def align(
    models: Mapping[str, StateDict],
    pretrained: StateDict | None = None,
    spec: PermutationSpec | None = None,
    options: AlignOptions | None = None,
    *,
    parameters: Collection[str] | None = None,
    reason: str | None = None,
    matcher: Matcher | None = None,
) -> RebasinReport:
    """Align models to the first one, compare before and after, and merge if asked.

    The comparison speaks of task vectors or weights as ``options.on`` says. Permutations for whole weights are found
    on whole weights in any case: only these are right for merging.
    """
    options = options or AlignOptions()
    if len(models) < 2:
        raise RebasinError(
            f"nothing to align: {len(models)} model given; a reference and at least one other are needed"
        )
    if options.on == "task_vectors" and pretrained is None:
        raise RebasinError("task vectors need the pretrained model: give it, or choose on='weights'")
    if options.merge == "task_arithmetic" and pretrained is None:
        raise RebasinError("task arithmetic needs the pretrained model: give it, or choose merge='average'")
    reference = next(iter(models))
    if options.merge is not None:
        options.shares(len(models))
    if parameters is None and spec is not None:
        parameters = spec.parameters or None
    vectors = {name: _vector(_only(state, parameters), pretrained, options) for name, state in models.items()}
    notes = _left_out(_only(models[reference], parameters), vectors[reference])
    before = {
        name: compare_vectors(vectors[reference], vectors[name], spectra=options.spectra)
        for name in models
        if name != reference
    }
    if spec is None:
        aligned = {name: Aligned(comparison) for name, comparison in before.items()}
        if options.merge is not None:
            notes += ("nothing was merged: models whose units may stand in different orders do not average",)
        return RebasinReport(
            False, reference, options, aligned, reason=reason or "no permutation spec was given", notes=notes
        )
    settings = {"device": options.device, **options.search()}
    steady = without_constants(spec, *models.values())
    if fixed := [name for name in spec.groups if name not in steady.groups]:
        notes += (f"{len(fixed)} of {len(spec.groups)} groups stay, each {CONSTANT}: {', '.join(fixed[:5])}",)
    found = (matcher or partial(match_on_weights, spec, settings))(list(models.values()))
    aligned = {}
    for (name, comparison), on_weights in zip(before.items(), list(found)[1:]):
        compared = on_weights
        if options.on == "task_vectors":
            pair = [vectors[reference], vectors[name]]
            compared = for_whole_spec(spec, weight_matching_for_task_vectors(steady, pair, **settings)[1])
        (moved,) = apply_permutation_to_task_vectors(spec, [compared], [vectors[name]])
        aligned[name] = Aligned(
            before=comparison,
            after=compare_vectors(vectors[reference], moved, spectra=options.spectra),
            compared=compared,
            on_weights=on_weights,
            state_dict=apply_permutation(spec, on_weights, models[name]),
            task_vector=moved if options.on == "task_vectors" else None,
        )
    merged = _merge([models[reference], *(m.state_dict or {} for m in aligned.values())], pretrained, options)
    if merged is not None and any(name not in spec.parameters for name in spec.axes):
        notes += (MEAN_STATISTICS,)
    return RebasinReport(True, reference, options, aligned, merged, spec, notes=notes)


def match_on_weights(
    spec: PermutationSpec, settings: Mapping[str, Any], states: Sequence[StateDict]
) -> list[MatchingResult]:
    """Whole weights of two models, or of more at once, in the order of the first."""
    if len(states) > 2:
        return match_many(spec, states, **{key: value for key, value in settings.items() if key != "device"})
    return weight_matching_for_task_vectors(spec, states, **settings)


def _only(state: StateDict, names: Collection[str] | None) -> StateDict:
    return state if names is None else {name: tensor for name, tensor in state.items() if name in names}


def _vector(state: StateDict, pretrained: StateDict | None, options: AlignOptions) -> dict[str, Tensor]:
    if options.on == "weights":
        return {name: tensor.detach() for name, tensor in state.items() if tensor.is_floating_point()}
    assert pretrained is not None  # refused before
    return task_vector(state, pretrained, strict=False)


def _left_out(state: StateDict, vector: StateDict) -> tuple[str, ...]:
    left = [name for name, tensor in state.items() if tensor.is_floating_point() and name not in vector]
    if not left:
        return ()
    shown = ", ".join(f"{name} {tuple(state[name].shape)}" for name in left[:5])
    return (f"not in the task vectors, since the pretrained model lacks them or has another shape: {shown}",)


def _merge(
    states: Sequence[StateDict], pretrained: StateDict | None, options: AlignOptions
) -> dict[str, Tensor] | None:
    if options.merge is None:
        return None
    shares = options.shares(len(states))
    if options.merge == "average" or pretrained is None:
        return average(states, shares)
    vectors = [task_vector(state, pretrained, strict=False) for state in states]
    whole = 1.0 if options.merge_scale is None else options.merge_scale * len(vectors)
    scale = [share * whole for share in shares]
    merged = task_arithmetic({n: t for n, t in pretrained.items() if n in states[0]}, vectors, scale)
    mean = average(states, shares)  # for statistics, and for what only the models have, such as a new head
    summed = {name for name in vectors[0] if not is_statistic(name)}
    return {name: merged[name] if name in summed else tensor for name, tensor in mean.items()}
