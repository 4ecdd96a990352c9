"""A whole job: align several models to a reference, compare them before and after, and merge them.

Shared by :class:`lit_wsl.callbacks.RebasinCallback` and the command line. Pure: files are written by
:func:`~lit_wsl.rebasin.job_files.write_results` only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.apply import apply_permutation
from lit_wsl.rebasin.job_files import REPORT_FILE, fit_names, names_of, write_results
from lit_wsl.rebasin.job_report import (
    MEAN_STATISTICS,
    Aligned,
    AlignOptions,
    Matching,
    Merge,
    On,
    RebasinReport,
    StateDict,
)
from lit_wsl.rebasin.matching import MatchingResult, weight_matching
from lit_wsl.rebasin.merging import average, task_arithmetic
from lit_wsl.rebasin.metrics import compare_vectors
from lit_wsl.rebasin.spec import PermutationSpec
from lit_wsl.rebasin.task_vectors import (
    apply_permutation_to_task_vectors,
    task_vector,
    weight_matching_for_task_vectors,
)

__all__ = [
    "MEAN_STATISTICS",
    "REPORT_FILE",
    "AlignOptions",
    "Aligned",
    "Matcher",
    "Matching",
    "Merge",
    "On",
    "RebasinReport",
    "align",
    "fit_names",
    "names_of",
    "write_results",
]

Matcher: TypeAlias = Callable[[StateDict, StateDict], MatchingResult]


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

    Args:
        models: state dicts by name, the reference first.
        pretrained: what the task vectors are taken from; not needed with ``on="weights"`` unless for task arithmetic.
        spec: permutation spec of the architecture; None to compare without aligning.
        options: how to match and merge.
        parameters: names of the tensors to compare; by default the spec's, or all without a spec. Statistics of norms
            are better left out: their scale would drown the weights.
        reason: why there is no spec.
        matcher: finds the permutations of whole weights from the reference's and another model's; by default
            :func:`weight_matching`.

    Raises:
        RebasinError: the models don't fit each other, or something that is needed is not given.
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
    settings: dict[str, Any] = {
        "max_iter": options.max_iter,
        "seed": options.seed,
        "restarts": options.restarts,
        "device": options.device,
        "progress": options.progress,
    }
    match: Matcher = matcher or partial(weight_matching, spec, **settings)
    aligned = {}
    for name, comparison in before.items():
        on_weights = match(models[reference], models[name])
        compared = on_weights
        if options.on == "task_vectors":
            pair = [vectors[reference], vectors[name]]
            compared = weight_matching_for_task_vectors(spec, pair, **settings)[1]
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


def _only(state: StateDict, names: Collection[str] | None) -> StateDict:
    return state if names is None else {name: tensor for name, tensor in state.items() if name in names}


def _vector(state: StateDict, pretrained: StateDict | None, options: AlignOptions) -> dict[str, Tensor]:
    if options.on == "weights":
        return {name: tensor.detach() for name, tensor in state.items() if tensor.is_floating_point()}
    if pretrained is None:
        raise RebasinError("task vectors need the pretrained model")
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
    if options.merge == "average" or pretrained is None:
        return average(states)
    vectors = [task_vector(state, pretrained, strict=False) for state in states]
    scale = 1.0 / len(vectors) if options.merge_scale is None else options.merge_scale
    merged = task_arithmetic({n: t for n, t in pretrained.items() if n in states[0]}, vectors, scale)
    mean = average(states)  # for what the pretrained model does not have, such as a new head
    return {name: merged[name] if name in vectors[0] else tensor for name, tensor in mean.items()}
