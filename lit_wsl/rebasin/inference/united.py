"""Two specs of one model as one: what either of them moves, moves.

Where two orders are in each other's way (heads and the dimensions that all heads share, the two sides of an outer
product, experts and what they put out), one labelling follows the one, another labelling the other. Both keep the
function, and so does one after the other. On an axis that both move, the two are independent where a unit of the one
has positions of every unit of the other, in the same order in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lit_wsl.rebasin.spec.axis import AxisSpec, PermutationGroup
from lit_wsl.rebasin.spec.spec import PermutationSpec

Place = tuple[str, int]


def united(first: PermutationSpec, second: PermutationSpec) -> PermutationSpec:
    """The first spec, and what only the second one moves."""
    for name in second.groups:
        first = _with_group(first, second, name)
    return first


def _with_group(first: PermutationSpec, second: PermutationSpec, name: str) -> PermutationSpec:
    group, places = second.groups[name], dict(_places(second, name))
    new = any(
        axis not in first.axes.get(tensor, {}) or bool(((coordinate >= 0) & ~first.axes[tensor][axis].touched).any())
        for (tensor, axis), coordinate in places.items()
    )
    if not new or group.parent is not None or second.children(name):
        return first
    label, count = name, 1
    while label in first.groups:
        label, count = f"{name}/{count}", count + 1
    axes = {tensor: dict(by_axis) for tensor, by_axis in first.axes.items()}
    for (tensor, axis), coordinate in places.items():
        beside = axes.setdefault(tensor, {}).get(axis)
        made = _beside(beside, PermutationGroup(label, group.size), coordinate, second.axes[tensor][axis])
        if made is None:
            return first
        axes[tensor][axis] = made
    groups = {**first.groups, label: PermutationGroup(label, group.size)}
    return replace(first, groups=groups, axes=axes, frozen=_less(first.frozen, axes))


def _places(spec: PermutationSpec, name: str) -> list[tuple[Place, Tensor]]:
    return [
        ((tensor, number), axis.coordinate(name))
        for tensor, by_axis in spec.axes.items()
        for number, axis in by_axis.items()
        if name in axis.groups
    ]


def _beside(axis: AxisSpec | None, group: PermutationGroup, coordinate: Tensor, like: AxisSpec) -> AxisSpec | None:
    """An axis that a further group moves; None where that is in the way of what moves it already."""
    if axis is None:
        return AxisSpec((group.name,), coordinate[None], like.outer_axis, like.stack_axis)
    if (axis.outer_axis, axis.stack_axis) != (None, None) or (like.outer_axis, like.stack_axis) != (None, None):
        return None
    cells: dict[tuple[int, ...], list[int]] = {}
    for position in torch.nonzero(coordinate >= 0).flatten().tolist():
        cells.setdefault(tuple(axis.coords[:, position].tolist()), []).append(int(coordinate[position]))
    orders: dict[tuple[bool, ...], list[int]] = {}
    for cell, order in cells.items():
        counts = torch.bincount(torch.tensor(order), minlength=group.size)
        kind = tuple(unit >= 0 for unit in cell)
        if len(set(counts.tolist())) > 1 or orders.setdefault(kind, order) != order:
            return None
    return AxisSpec((*axis.groups, group.name), torch.cat([axis.coords, coordinate[None]]))


def _less(
    frozen: Mapping[str, Mapping[int, str]], axes: Mapping[str, Mapping[int, AxisSpec]]
) -> dict[str, dict[int, str]]:
    """The reasons of axes that still stay."""
    return {
        tensor: {
            axis: why
            for axis, why in reasons.items()
            if axis not in axes.get(tensor, {}) or not bool(axes[tensor][axis].touched.all())
        }
        for tensor, reasons in frozen.items()
    }
