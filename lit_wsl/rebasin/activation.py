"""Activation matching: units are the same where they respond to the same inputs.

The responses of a module's output channels over a data set are tensors ``(channels, samples)`` whose first axis is
moved like the first axis of the module's weight. So this is weight matching on another set of tensors, nested groups
included, and with nothing on the second axis it is solved in one pass. Better than weights where layers are narrow.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.batch_statistics import Forward, call_on_inputs
from lit_wsl.rebasin.descent import Descent
from lit_wsl.rebasin.matching import MatchingResult, identity_share, matched_names
from lit_wsl.rebasin.progress import progress_bar
from lit_wsl.rebasin.spec import PermutationSpec


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
    a, b = responses(spec, model, reference, other, batches, max_batches, max_samples, seed, forward)
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


def responses(
    spec: PermutationSpec,
    model: nn.Module,
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    batches: Iterable[Any],
    max_batches: int | None,
    max_samples: int,
    seed: int,
    forward: Forward,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Standardised responses ``(channels, samples)`` of both models by the name of the weight that makes them.

    Raises:
        RebasinError: the two passes saw different data.
    """
    a, b = (
        _responses(spec, model, state, batches, max_batches, max_samples, seed, forward) for state in (reference, other)
    )
    if any(a[name].shape != b[name].shape for name in a):
        raise RebasinError("the two passes over the batches saw different amounts of data: use a list or fixed loader")
    return a, b


def _shows(shown: PermutationSpec, answers: Descent, root: str) -> bool:
    """Whether the responses say something about every group of a tree."""
    terms = answers.trees[root].terms if root in answers.trees else ()
    said = {group for term in terms for group in term.groups}
    return all(group in said or shown.children(group) for group in answers.trees[root].groups)


def output_axis(model: nn.Module, name: str) -> int:
    """Axis of a module's weight (given by its full name) that the module's output channels lie on."""
    module = model.get_submodule(name.rpartition(".")[0])
    return 1 if isinstance(module, _ConvTransposeNd) else 0


def channel_axis(module: nn.Module, output: Tensor) -> int:
    """Axis of a module's output that holds its channels: the second for convolutions and batch norms, else the last."""
    return 1 if isinstance(module, (_ConvNd, _NormBase, nn.GroupNorm)) and output.ndim > 1 else output.ndim - 1


@torch.no_grad()
def _responses(
    spec: PermutationSpec,
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    batches: Iterable[Any],
    max_batches: int | None,
    max_samples: int,
    seed: int,
    forward: Forward,
) -> dict[str, Tensor]:
    """Standardised responses ``(channels, samples)`` by the name of the weight whose first axis they share."""
    probe = copy.deepcopy(model).eval()
    probe.load_state_dict(dict(state_dict))
    kept: dict[str, list[Tensor]] = {}
    hooks = []
    number = 0

    def listen(name: str, length: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            axis = channel_axis(module, output)
            if output.shape[axis] != length:
                return
            columns = output.detach().movedim(axis, 0).reshape(length, -1)
            generator = torch.Generator().manual_seed(hash((seed, number, columns.shape[1])))
            draw = torch.randperm(columns.shape[1], generator=generator)[: max(1, max_samples // 4)]
            kept.setdefault(name, []).append(columns[:, draw.to(columns.device)].float())

        return hook

    for path, module in probe.named_modules():
        name = f"{path}.weight" if path else "weight"
        if name not in spec.axes or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        axis = output_axis(probe, name)
        if axis in spec.axes[name] and spec.axes[name][axis].outer_axis is None:
            hooks.append(module.register_forward_hook(listen(name, spec.axes[name][axis].length)))
    for batch in batches:
        if max_batches is not None and number >= max_batches:
            break
        forward(probe, batch)
        number += 1
    for handle in hooks:
        handle.remove()
    return {name: _standardise(torch.cat(parts, dim=1), max_samples) for name, parts in kept.items()}


def _standardise(responses: Tensor, max_samples: int) -> Tensor:
    """Each row with mean 0 and norm 1 (silent units stay 0), from at most so many columns, evenly spaced."""
    if responses.shape[1] > max_samples:
        pick = torch.linspace(0, responses.shape[1] - 1, max_samples).round().long()
        responses = responses[:, pick.to(responses.device)]
    centred = responses.double() - responses.double().mean(dim=1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-12, centred / norm.clamp_min(1e-300), 0.0).float()
