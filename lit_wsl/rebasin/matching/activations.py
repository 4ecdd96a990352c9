"""Matching by data: units are the same where they respond to the same inputs.

The responses of a module's output channels over a data set are tensors ``(channels, samples)`` whose first axis is
moved like the first axis of the module's weight. So this is weight matching on another set of tensors, nested groups
included, and with nothing on the second axis it is solved in one pass. Better than weights where layers are narrow.

Both in one objective find more than either, but what a response is worth beside a weight depends on the network. Which
of several results is better (:func:`best_matching`) is not a question of their objectives, but of the merged model, and
needs no labels: the mean of two well aligned networks, repaired, answers like the mean of their answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.matching.descent import Descent, progress_bar
from lit_wsl.rebasin.matching.objective import norm
from lit_wsl.rebasin.matching.weights import (
    MatchingResult,
    for_whole_spec,
    identity_share,
    matched_names,
    weight_matching,
    without_constants,
)
from lit_wsl.rebasin.merging.merge import average, repair
from lit_wsl.rebasin.responses import Forward, Responses, call_on_inputs, module_responses, output_axis, same_positions
from lit_wsl.rebasin.spec.spec import PermutationSpec, apply_permutation


def activation_matching(
    spec: PermutationSpec,
    model: nn.Module,
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    max_samples: int = 8192,
    seed: int = 0,
    max_iter: int = 100,
    forward: Forward = call_on_inputs,
    progress: bool | None = None,
) -> MatchingResult:
    """Permutations that bring the units of ``other`` into the order of those of ``reference`` that respond alike.

    Each unit's responses are standardised, so the objective is the sum of the correlations of matched units. Groups
    that no module's output shows (inside a fused attention kernel) are matched on weights afterwards.

    Args:
        spec: permutation spec of the architecture.
        model: gives the architecture; it is copied, and the copy runs in eval mode.
        reference: state dict that stays as it is.
        other: state dict of the same shapes; the result permutes this one.
        batches: a dataloader or list of batches, iterated twice in the same order (so a shuffling loader is not fit).
        max_batches: stop after so many.
        max_samples: positions kept per module (images times pixels), drawn evenly from all batches seen so far.
        seed: of the positions drawn, and of the matching on weights.
        max_iter: maximum number of sweeps of the matching on weights.
        forward: how to call the model on a batch.
        progress: show a progress bar; by default only on a terminal.

    Raises:
        RebasinError: no group shows in the output of a module, or the two passes saw different data.
    """
    whole, spec = spec, without_constants(spec, reference, other)
    data = Responses(model, batches, forward, max_batches)
    a, b = (module_responses(spec, data, state, max_samples=max_samples, seed=seed) for state in (reference, other))
    same_positions(a, b)
    if not a:
        raise RebasinError("no permutation group shows in the output of a module: use weight_matching instead")
    shown = PermutationSpec(
        groups=spec.groups,
        axes={name: {0: spec.axes[name][output_axis(model, name)]} for name in a},
        shapes={name: tuple(x.shape) for name, x in a.items()},
        parameters=tuple(a),
    )
    answers = Descent(shown, a, b)
    names = matched_names(spec, reference, other)
    weights = Descent(spec, {n: reference[n] for n in names}, {n: other[n] for n in names})
    before = answers.objective
    with progress_bar(progress) as bar:
        bar.start("matching: activations", len(answers.trees))
        answers.sweep(range(len(answers.trees)), bar)
        hidden = [i for i, root in enumerate(weights.trees) if not _shows(shown, answers, root)]
        weights.move(answers.permutations)
        sweeps, gained = 1, bool(hidden)
        while gained and sweeps <= max_iter:
            bar.start(f"matching: weights of hidden groups, sweep {sweeps}", len(hidden))
            gained = weights.sweep(hidden, bar)
            sweeps += 1
    permutations = dict(weights.permutations)
    certain = answers.certain and not hidden
    share = identity_share(permutations)
    found = MatchingResult(permutations, answers.objective, before, share, sweeps, not gained, certain, "activations")
    return for_whole_spec(whole, found)


def _shows(shown: PermutationSpec, answers: Descent, root: str) -> bool:
    """Whether the responses say something about every group of a tree."""
    terms = answers.trees[root].terms if root in answers.trees else ()
    said = {group for term in terms for group in term.groups}
    return all(group in said or shown.children(group) for group in answers.trees[root].groups)


def joint_matching(
    spec: PermutationSpec,
    model: nn.Module,
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    share: float = 1.0,
    max_iter: int = 100,
    seed: int = 0,
    restarts: int = 2,
    max_batches: int | None = None,
    max_samples: int = 8192,
    forward: Forward = call_on_inputs,
    progress: bool | None = None,
) -> MatchingResult:
    """Match on the weights and the responses of units together.

    The objective is that of :func:`weight_matching` plus, for every weight whose module's output shows a group, the sum
    of the correlations of matched units times ``share * |A| |B| / units``, with the norms of that weight in both
    models: a unit's response counts ``share`` times as much as its incoming weights do.

    Args:
        spec: permutation spec of the architecture.
        model: gives the architecture; it is copied, and the copy runs in eval mode.
        reference: state dict that stays as it is.
        other: state dict of the same shapes; the result permutes this one.
        batches: a list or loader, iterated twice in the same order.
        share: what responses count; 0 is :func:`weight_matching`.
        max_iter: maximum number of sweeps for each start.
        seed: of the random orders and of the positions that are drawn from activations.
        restarts: further starts in other random orders.
        max_batches: stop after so many batches.
        max_samples: positions kept per module (images times pixels).
        forward: how to call the model on a batch.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        The permutations; the objective is that of the sum, ``start`` begins with ``weights and activations``.

    Raises:
        RebasinError: the models do not fit the spec, or the two passes saw different data.
    """
    whole, spec = spec, without_constants(spec, reference, other)
    names = matched_names(spec, reference, other)
    data = Responses(model, batches, forward, max_batches)
    answers = [module_responses(spec, data, state, max_samples=max_samples, seed=seed) for state in (reference, other)]
    same_positions(*answers)
    vectors = [{name: state[name] for name in names} for state in (reference, other)]
    both, (a, b) = with_responses(spec, model, vectors, answers, share)
    with torch.no_grad():
        found = weight_matching(both, a, b, max_iter, seed, restarts=restarts, progress=progress)
    found = for_whole_spec(whole, found)
    return replace(found, start=f"weights and activations (share {share:g}), {found.start}")


def with_responses(
    spec: PermutationSpec,
    model: nn.Module,
    vectors: Sequence[Mapping[str, Tensor]],
    answers: Sequence[Mapping[str, Tensor]],
    share: float,
) -> tuple[PermutationSpec, list[dict[str, Tensor]]]:
    """Responses beside the weights as further tensors, scaled as :func:`joint_matching` says."""
    axes, shapes = dict(spec.axes), {name: tuple(tensor.shape) for name, tensor in vectors[0].items()}
    extended = [dict(vector) for vector in vectors]
    for name in answers[0]:
        axis, label = output_axis(model, name), f"responses of {name}"
        for vector, rows in zip(extended, answers):
            scale = math.sqrt(share / vector[name].shape[axis]) * norm(vector[name])
            vector[label] = rows[name].to(vector[name].device) * scale
        axes[label], shapes[label] = {0: spec.axes[name][axis]}, tuple(answers[0][name].shape)
    return PermutationSpec(groups=spec.groups, axes=axes, shapes=shapes, parameters=tuple(extended[0])), extended


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
        max_iter: maximum number of sweeps for each start of the matching on weights.
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
    used = batches if max_batches is None else list(islice(batches, max_batches))
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
        spec: permutation spec of the architecture, for :func:`~lit_wsl.rebasin.merging.merge.repair`.
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
