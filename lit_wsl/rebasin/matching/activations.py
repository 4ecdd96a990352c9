"""Activation matching: units are the same where they respond to the same inputs.

The responses of a module's output channels over a data set are tensors ``(channels, samples)`` whose first axis is
moved like the first axis of the module's weight. So this is weight matching on another set of tensors, nested groups
included, and with nothing on the second axis it is solved in one pass. Better than weights where layers are narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.matching.descent import Descent, progress_bar
from lit_wsl.rebasin.matching.objective import norm
from lit_wsl.rebasin.matching.weights import MatchingResult, identity_share, matched_names, weight_matching
from lit_wsl.rebasin.responses import Forward, call_on_inputs, module_responses, output_axis, same_positions
from lit_wsl.rebasin.spec.spec import PermutationSpec


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
        max_iter: most sweeps of the matching on weights.
        forward: how to call the model on a batch.
        progress: show a progress bar; by default only on a terminal.

    Raises:
        RebasinError: no group shows in the output of a module, or the two passes saw different data.
    """
    drawing: dict[str, Any] = {"max_batches": max_batches, "max_samples": max_samples, "seed": seed, "forward": forward}
    a, b = (module_responses(spec, model, state, batches, **drawing) for state in (reference, other))
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
    return MatchingResult(
        permutations,
        answers.objective,
        before,
        identity_share(permutations),
        sweeps,
        not gained,
        certain,
        "activations",
    )


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
        max_iter: most sweeps for each start.
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
    names = matched_names(spec, reference, other)
    a, b = ({name: state[name] for name in names} for state in (reference, other))
    drawing: dict[str, Any] = {"max_batches": max_batches, "max_samples": max_samples, "seed": seed, "forward": forward}
    first, second = (module_responses(spec, model, state, batches, **drawing) for state in (reference, other))
    same_positions(first, second)
    axes, shapes = dict(spec.axes), {name: tuple(a[name].shape) for name in names}
    for name in first:
        axis = output_axis(model, name)
        scale = math.sqrt(share * norm(reference[name]) * norm(other[name]) / reference[name].shape[axis])
        answer = f"responses of {name}"
        a[answer], b[answer] = (rows[name].to(reference[name].device) * scale for rows in (first, second))
        axes[answer], shapes[answer] = {0: spec.axes[name][axis]}, tuple(first[name].shape)
    both = PermutationSpec(groups=spec.groups, axes=axes, shapes=shapes, parameters=tuple(a))
    with torch.no_grad():
        found = weight_matching(both, a, b, max_iter, seed, restarts=restarts, progress=progress)
    return replace(found, start=f"weights and activations (share {share:g}), {found.start}")
