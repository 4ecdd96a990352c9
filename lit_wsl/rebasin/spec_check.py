"""Checks that a permutation spec is consistent in itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lit_wsl.errors import RebasinError

if TYPE_CHECKING:
    from lit_wsl.rebasin.spec import PermutationSpec
    from lit_wsl.rebasin.spec_axis import AxisSpec


def validate(spec: PermutationSpec) -> None:
    """Check that a spec is consistent in itself.

    Raises:
        RebasinError: A group is unknown or misses its parent, a coordinate is out of range, the units of a group have
            different numbers of positions, or an axis does not have the length that ``shapes`` says.
    """
    seen: set[str] = set()
    for name, group in spec.groups.items():
        if group.name != name or group.size < 1:
            raise RebasinError(f"Group {name!r} is listed with name {group.name!r} and size {group.size}.")
        if group.parent is not None and group.parent not in seen:
            raise RebasinError(f"Group {name!r} is nested in {group.parent!r}, which must be listed before it.")
        seen.add(name)
    for tensor, by_axis in spec.axes.items():
        for axis, axis_spec in by_axis.items():
            _validate_axis(spec, tensor, axis, axis_spec)


def _validate_axis(spec: PermutationSpec, tensor: str, axis: int, axis_spec: AxisSpec) -> None:
    place = f"axis {axis} of {tensor!r}"
    shape = spec.shapes.get(tensor)
    if shape is not None and (axis >= len(shape) or shape[axis] != axis_spec.length):
        raise RebasinError(f"{place} has length {axis_spec.length} in the spec, but the tensor's shape is {shape}.")
    if axis_spec.coords.shape[0] != len(axis_spec.groups) or len(set(axis_spec.groups)) != len(axis_spec.groups):
        raise RebasinError(f"{place}: one row of coordinates for each group, each group once.")
    outer = spec.axes[tensor].get(axis_spec.outer_axis) if axis_spec.outer_axis is not None else None
    for row, group in enumerate(axis_spec.groups):
        if group not in spec.groups:
            raise RebasinError(f"{place} is moved by {group!r}, which is not among the groups.")
        coordinate = axis_spec.coords[row]
        touched = coordinate >= 0
        for ancestor in spec.ancestors(group):
            if ancestor in axis_spec.groups[:row]:
                if bool((axis_spec.coordinate(ancestor)[touched] < 0).any()):
                    raise RebasinError(f"{place}: {group!r} acts where its parent {ancestor!r} does not.")
            elif outer is None or ancestor not in outer.groups or bool((outer.coordinate(ancestor) < 0).any()):
                raise RebasinError(f"{place}: {group!r} is nested in {ancestor!r}, which must come before it there.")
        family = [g for g in (*spec.ancestors(group), group) if g in axis_spec.groups]
        code = torch.zeros(int(touched.sum()), dtype=torch.long)
        cells = 1
        for member in family:
            values, size = axis_spec.coordinate(member)[touched], spec.groups[member].size
            if values.numel() and int(values.max()) >= size:
                raise RebasinError(f"{place}: unit {int(values.max())} of group {member!r}, which has {size}.")
            code, cells = code * size + values, cells * size
        counts = torch.bincount(code, minlength=cells)
        if bool((counts != counts[0]).any()) or int(counts[0]) == 0:
            raise RebasinError(f"{place}: the units of group {group!r} do not have the same number of positions.")
