"""Weights and activations in one objective: what units do with their inputs, and how they answer to data.

Weights see how a unit is wired to both sides, but not which of its inputs ever vary; activations see what it answers,
but not where that goes. Each fails at other units. Both are tensors that a permutation group moves along one axis, so
their inner products add up, and the descent on the sum is weight matching on a larger set of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_wsl.rebasin.activation import output_axis, responses
from lit_wsl.rebasin.batch_statistics import Forward, call_on_inputs
from lit_wsl.rebasin.matching import MatchingResult, matched_names, weight_matching
from lit_wsl.rebasin.similarity import norm
from lit_wsl.rebasin.spec import PermutationSpec


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
    first, second = responses(spec, model, reference, other, batches, max_batches, max_samples, seed, forward)
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
