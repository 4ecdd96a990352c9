"""Several ways of matching, judged by data: which of them leaves the least between the two models.

Weights and activations each find orders of units that the other misses, most of all where layers are narrow; both in
one objective find more than either, but what a response is worth beside a weight depends on the network. Which result
is better is not a question of the objectives, which cannot be compared, but of the merged model. It needs no labels:
the mean of two well aligned networks, repaired, answers like the mean of their answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_wsl.rebasin.matching.activations import activation_matching, joint_matching
from lit_wsl.rebasin.matching.weights import MatchingResult, weight_matching
from lit_wsl.rebasin.merging.merge import average
from lit_wsl.rebasin.merging.repair import repair
from lit_wsl.rebasin.responses import Forward, Responses, call_on_inputs
from lit_wsl.rebasin.spec.apply import apply_permutation
from lit_wsl.rebasin.spec.spec import PermutationSpec

#: What a unit's responses count beside its incoming weights, in the candidates that are matched on both.
SHARES = (0.1, 0.3, 1.0)


def best_matching(
    spec: PermutationSpec,
    model: nn.Module,
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    max_iter: int = 100,
    seed: int = 0,
    restarts: int = 2,
    max_batches: int | None = None,
    forward: Forward = call_on_inputs,
    progress: bool | None = None,
) -> MatchingResult:
    """Match on weights, on activations, and on both together; keep what merges best on data.

    The judge is :func:`midpoint_gap`. More work than one of them alone: all are run, those on both together for each
    share of :data:`SHARES`, and the mean of each candidate is repaired.

    Args:
        spec: permutation spec of the architecture.
        model: gives the architecture; it is copied.
        reference: state dict that stays as it is.
        other: state dict of the same shapes; the result permutes this one.
        batches: a list or loader that gives the same batches in the same order each time.
        max_iter: most sweeps for each start of the matching on weights.
        seed: of random orders and of the positions that are drawn from activations.
        restarts: further starts of each matching in which weights count.
        max_batches: stop after so many batches.
        forward: how to call the model on a batch.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        The best candidate; its ``start`` begins with how it was found: ``weights``, ``activations`` or
        ``weights and activations``.

    Raises:
        RebasinError: there is no batch, or the models do not fit the spec.
    """
    used = [batch for _, batch in zip(range(max_batches), batches)] if max_batches is not None else batches
    on_weights = weight_matching(spec, reference, other, max_iter, seed, restarts=restarts, progress=progress)
    candidates = [replace(on_weights, start=f"weights, {on_weights.start}")]
    if not on_weights.certain:
        models = (spec, model, reference, other, used)
        options: dict[str, Any] = {"seed": seed, "max_iter": max_iter, "forward": forward, "progress": progress}
        candidates.append(activation_matching(*models, **options))
        candidates += [joint_matching(*models, share=share, restarts=restarts, **options) for share in SHARES]
    if len(candidates) == 1:
        return candidates[0]
    gaps = [
        midpoint_gap(model, spec, reference, apply_permutation(spec, found, other), used, forward=forward)
        for found in candidates
    ]
    return candidates[min(range(len(gaps)), key=gaps.__getitem__)]


@torch.no_grad()
def midpoint_gap(
    model: nn.Module,
    spec: PermutationSpec,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    forward: Forward = call_on_inputs,
) -> float:
    """How far the repaired mean of two aligned models is from the mean of their outputs.

    ``sum |f((a + b) / 2) - (f(a) + f(b)) / 2|^2 / sum |(f(a) + f(b)) / 2|^2``, outputs centred by their mean over the
    data; 0 for equal models. No labels are needed.

    Args:
        model: gives the architecture; it is copied.
        spec: permutation spec of the architecture, for :func:`~lit_wsl.rebasin.merging.repair.repair`.
        a: a state dict.
        b: another one, its units in the order of the first's.
        batches: a list or loader, iterated several times.
        forward: how to call the model on a batch.

    Raises:
        RebasinError: there is no batch, or the model returns no floating tensor.
    """
    return merged_gap(model, spec, [a, b], batches, forward=forward)


@torch.no_grad()
def merged_gap(
    model: nn.Module,
    spec: PermutationSpec,
    aligned: Sequence[Mapping[str, Tensor]],
    batches: Iterable[Any],
    *,
    forward: Forward = call_on_inputs,
) -> float:
    """:func:`midpoint_gap` of any number of aligned models: of their repaired mean from the mean of their outputs."""
    data = Responses(model, batches, forward)
    outputs = [data.outputs(state) for state in aligned]
    merged = data.under(average(aligned))
    repair(merged, aligned, spec, batches, forward=forward)
    between = data.outputs(merged.state_dict())
    gap = scale = 0.0
    for number, found in enumerate(between):
        mean = torch.stack([output[number] for output in outputs]).mean(dim=0)
        gap += float((found - mean).square().sum())
        scale += float((mean - mean.mean(dim=0, keepdim=True)).square().sum())
    return gap / scale if scale > 0 else gap
