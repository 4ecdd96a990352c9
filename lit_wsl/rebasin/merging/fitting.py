"""A task vector fitted to data, layer by layer and without labels.

The fine-tuned model says by how much the response of each layer to the batches changes. Brought into the units of the
new base, that is what the new base's response should change by; with the inputs that the layer now gets, the change of
its weights that achieves it is a ridge regression in closed form, with the turned task vector as the prior. From the
first layer to the last, so later layers make up for what earlier ones missed.

Brought into other units it is by orthogonal maps. A permutation is the most that keeps a network's function, but a
difference of weights need not keep one: it may be turned by the map that brings one base nearest to the other
(Procrustes; Schoenemann 1966), on the objective of :func:`~lit_wsl.rebasin.joint_matching`, one group at a time. Groups
that other groups are nested in (heads) are permuted; the innermost ones are turned.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_wsl.rebasin.responses import Responses, channel_axis, drawn
from lit_wsl.rebasin.spec.axis import AxisSpec, AxisUse
from lit_wsl.rebasin.spec.spec import PermutationSpec

Maps = Mapping[str, Tensor]
"""Innermost group -> float64 ``(units of all ancestors, size, size)``; each matrix is orthogonal."""

#: Most passes over all groups, and the gain of a pass, as a share of the objective, below which they end.
SWEEPS, ENOUGH = 10, 1e-3


def identity_maps(spec: PermutationSpec) -> dict[str, Tensor]:
    """The maps that turn nothing, for the groups that nothing is nested in."""
    shapes = {group: spec.permutation_shape(group) for group in spec.groups if not spec.children(group)}
    return {
        group: torch.eye(shape[-1], dtype=torch.float64).expand(math.prod(shape[:-1]), -1, -1).clone()
        for group, shape in shapes.items()
    }


def turn_tensor(
    spec: PermutationSpec, maps: Maps, name: str, tensor: Tensor, *, scale: bool = False, skip: int | None = None
) -> Tensor:
    """A tensor with its moved axes turned; one that scales units is a diagonal matrix, of which the diagonal stays."""
    for axis, axis_spec in spec.axes.get(name, {}).items():
        if axis == skip:
            continue
        for group in axis_spec.groups:
            for use in spec.uses(group) if group in maps else ():
                if use.tensor == name and use.axis == axis:
                    tensor = _turn(use, maps[group].to(device=tensor.device), tensor, scale)
    return tensor


def procrustes(
    spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    scales: Collection[str] = (),
) -> dict[str, Tensor]:
    """The maps that bring ``other``, whose units stand in the reference's order where they can, nearest to it."""
    names = [n for n in spec.axes if n in reference and n in other and n not in scales]
    pairs = {n: (reference[n].detach().float(), other[n].detach().float()) for n in names}
    weights = {n: 1.0 / max(float(a.norm() * b.norm()), 1e-30) for n, (a, b) in pairs.items()}
    counted = replace(spec, axes={n: spec.axes[n] for n in names})
    maps = identity_maps(spec)
    before = -math.inf
    for _ in range(SWEEPS):
        value = 0.0
        for group in maps:
            cross = torch.zeros_like(maps[group])
            for use in counted.uses(group):
                a, b = pairs[use.tensor]
                turned = turn_tensor(counted, maps, use.tensor, b, skip=use.axis)
                product = _rows(use, a) @ _rows(use, turned).transpose(1, 2)
                cross += product.double().cpu() * weights[use.tensor]
            if cross.any():
                left, sizes, right = torch.linalg.svd(cross)
                maps[group], value = left @ right, value + float(sizes.sum())
        if not value > before + ENOUGH * abs(value):
            break
        before = value
    return maps


def _rows(use: AxisUse, tensor: Tensor) -> Tensor:
    """A tensor as ``(units of the ancestors, size, entries)``, as one group acts on one axis."""
    if use.stack is not None:
        tensor = tensor.narrow(*use.stack, 1)
    positions, outer = _positions(use, tensor)
    if outer is None:
        return tensor.movedim(use.axis, 0)[positions].reshape(*positions.shape[:2], -1)
    parts = [tensor.index_select(use.outer_axis or 0, o).movedim(use.axis, 0)[p] for p, o in zip(positions, outer)]
    return torch.stack([part.reshape(len(part), -1) for part in parts])


def _turn(use: AxisUse, turns: Tensor, tensor: Tensor, scale: bool) -> Tensor:
    """A tensor whose rows, as :func:`_rows` lays them out, are multiplied by the matrix of their ancestor unit."""
    turns = turns.square() if scale else turns
    rows = (turns.to(tensor.dtype) @ _rows(use, tensor)).contiguous()
    positions, outer = _positions(use, tensor)
    result = tensor.clone()
    written = result if use.stack is None else result.narrow(*use.stack, 1)  # a view
    if outer is None:
        moved = written.movedim(use.axis, 0)
        moved[positions] = rows.reshape(*positions.shape, *moved.shape[1:])
        return result
    for number, (place, above) in enumerate(zip(positions, outer)):
        part = written.index_select(use.outer_axis or 0, above)
        moved = part.movedim(use.axis, 0)
        moved[place] = rows[number].reshape(*place.shape, *moved.shape[1:])
        written.index_copy_(use.outer_axis or 0, above, part)
    return result


def _positions(use: AxisUse, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positions ``(ancestors, size, k)`` on the axis, and ``(ancestors, k2)`` on the outer one."""
    positions = use.positions.reshape(-1, *use.positions.shape[-2:]).to(tensor.device)
    if use.outer_positions is None:
        return positions, None
    outer = use.outer_positions.reshape(-1, use.outer_positions.shape[-1]).to(tensor.device)
    return positions, outer.repeat_interleave(len(positions) // len(outer), dim=0)


StateDict = Mapping[str, Tensor]

#: What a change beside the prior costs: this share of the mean square of a layer's inputs.
RIDGE = 0.1
#: Positions (images times pixels, sequences times tokens) that a layer is fitted to, over all batches.
SAMPLES = 8192


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and plain convolution layers by path, but for those that share their weight with another module."""
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear or (type(module) in (nn.Conv1d, nn.Conv2d) and _is_plain(module))
        if isinstance(module.weight, nn.Parameter) and names[id(module.weight)] == 1
    }


def _is_plain(module: nn.Module) -> bool:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class Samples:
    """Inputs ``(features, samples)`` and responses ``(channels, samples)`` of layers, at the same positions."""

    def __init__(self, responses: Responses, quota: int, seed: int) -> None:
        self.responses, self.quota, self.seed = responses, quota, seed

    def inputs(self, state_dict: StateDict, path: str) -> Tensor:
        """What one layer gets, convolutions unfolded; the last row of ones stands for the bias."""
        module = self.responses.model.get_submodule(path)
        parts: list[Tensor] = []

        def listen(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            parts.append(drawn(_unfolded(module, arguments[0]), self.quota, self.seed + len(parts)))

        self.responses.listen(state_dict, {path: listen})
        found = torch.cat(parts, dim=1).double()
        if module.bias is None:
            return found
        return torch.cat([found, found.new_ones(1, found.shape[1])])

    def outputs(self, state_dict: StateDict, paths: Collection[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What all layers answer, in the order of execution; and what the model does."""
        kept: dict[str, list[Tensor]] = {}

        def listen(path: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            parts = kept.setdefault(path, [])
            columns = output.movedim(channel_axis(module, output), 0).flatten(1)
            parts.append(drawn(columns, self.quota, self.seed + len(parts)))

        final = self.responses.listen(state_dict, {path: partial(listen, path) for path in paths})
        return {path: torch.cat(parts, dim=1) for path, parts in kept.items()}, final


def _unfolded(module: nn.Module, inputs: Tensor) -> Tensor:
    """``(features, positions)``: the columns that the flattened weight is multiplied with."""
    if isinstance(module, nn.Linear):
        return inputs.movedim(-1, 0).flatten(1)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    options: list[Any] = [module.kernel_size, module.dilation, module.padding, module.stride]
    if isinstance(module, nn.Conv1d):  # a row of one pixel's height
        inputs = inputs.unsqueeze(-2)
        options = [(first, *value) for first, value in zip((1, 1, 0, 1), options)]
    return F.unfold(inputs, *options).movedim(1, 0).flatten(1)


def fit_task_vector(
    spec: PermutationSpec,
    samples: Samples,
    states: tuple[StateDict, StateDict, StateDict],
    maps: Maps,
    vector: StateDict,
    fresh: Collection[str] = (),
) -> dict[str, Tensor]:
    """The turned task vector, with the layers that the fine-tuning changed fitted to data."""
    new, old, tuned = (samples.responses.with_statistics(state) for state in states)
    model = samples.responses.model
    paths = [p for p in layers(model) if vector.get(f"{p}.weight", torch.zeros(1)).any() or f"{p}.weight" in fresh]
    wanted, _ = samples.outputs(new, paths)
    before, after = (samples.outputs(state, paths)[0] for state in (old, tuned))
    for path in wanted:
        change = after[path] if f"{path}.weight" in fresh else after[path] - before[path]
        change = _turned(spec, maps, spec.axes.get(f"{path}.weight", {}).get(0), change)
        wanted[path] = change if f"{path}.weight" in fresh else wanted[path] + change
    fitted = dict(vector)
    for path in list(wanted):
        state = {name: t + fitted[name].to(t) if name in fitted else t for name, t in new.items()}
        inputs = samples.inputs(samples.responses.with_statistics(state), path)
        weight = _joined(state, path)
        change = _ridge(inputs, wanted.pop(path).double() - weight.to(inputs) @ inputs)
        if f"{path}.bias" in new:
            bias = fitted.get(f"{path}.bias", torch.zeros_like(new[f"{path}.bias"]))
            fitted[f"{path}.bias"] = bias + change[:, -1].to(bias)
            change = change[:, :-1]
        before_it = fitted.get(f"{path}.weight", torch.zeros_like(new[f"{path}.weight"]))
        fitted[f"{path}.weight"] = before_it + change.reshape(before_it.shape).to(before_it)
    return fitted


def _turned(spec: PermutationSpec, maps: Maps, axis_spec: AxisSpec | None, columns: Tensor) -> Tensor:
    """Responses with their channels turned like the axis of the weight that they come from."""
    if axis_spec is None or axis_spec.outer_axis is not None or axis_spec.stack_axis is not None:
        return columns
    lone = PermutationSpec(
        groups=spec.groups, axes={"responses": {0: axis_spec}}, shapes={"responses": tuple(columns.shape)}
    )
    return turn_tensor(lone, maps, "responses", columns)


def _joined(state: StateDict, path: str) -> Tensor:
    """A layer's weight as a float64 matrix, its bias the last column."""
    weight = state[f"{path}.weight"].double().flatten(1)
    bias = state.get(f"{path}.bias")
    return weight if bias is None else torch.cat([weight, bias.double()[:, None]], dim=1)


def _ridge(inputs: Tensor, missing: Tensor) -> Tensor:
    """The small matrix that takes the inputs near to what is missing."""
    square = inputs @ inputs.T
    square.diagonal().add_(RIDGE * square.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.solve(square, inputs @ missing.T).T
