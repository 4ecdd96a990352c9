"""Two specs of one model as one: what either of them moves, moves.

Where two orders are in each other's way (heads and the dimensions that all heads share, the two sides of an outer
product, experts and what they put out), one labelling follows the one, another labelling the other. Both keep the
function, and so does one after the other. On an axis that both move, the two are independent where a unit of the one
has positions of every unit of the other, in the same order in each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_wsl.rebasin.spec.axis import AxisSpec, PermutationGroup
from lit_wsl.rebasin.spec.spec import PermutationSpec


def united(first: PermutationSpec, second: PermutationSpec) -> PermutationSpec:
    """The first spec, and what only the second one moves."""
    for name in second.groups:
        first = _with_group(first, second, name)
    return first


def _with_group(first: PermutationSpec, second: PermutationSpec, name: str) -> PermutationSpec:
    group = second.groups[name]
    used = {(use.tensor, use.axis) for use in second.uses(name)}
    known = {(tensor, axis): first.axes.get(tensor, {}).get(axis) for tensor, axis in sorted(used)}
    like = {(tensor, axis): second.axes[tensor][axis] for tensor, axis in known}
    new = any(
        axis is None or bool(((like[place].coordinate(name) >= 0) & ~axis.touched).any())
        for place, axis in known.items()
    )
    if not new or group.parent is not None or second.children(name):
        return first
    label, count = name, 1
    while label in first.groups:
        label, count = f"{name}/{count}", count + 1
    group = PermutationGroup(label, group.size)
    made = {place: _beside(axis, group, like[place].coordinate(name), like[place]) for place, axis in known.items()}
    axes = {place: axis for place, axis in made.items() if axis is not None}
    return first.with_group(group, axes) if len(axes) == len(made) else first


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
