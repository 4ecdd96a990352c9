"""Orthogonal maps in place of permutations: what a task vector may be turned by, and weights never.

A permutation is the most that keeps a network's function. Between two trainings no permutation matches well where one
unit's work is spread over several others, as in a residual stream. A difference of weights need not keep a function: it
may be turned by the orthogonal map that brings one base nearest to the other (Procrustes; Schoenemann 1966).

Groups that other groups are nested in (heads) are permuted; the innermost ones are turned, inside each head on their
own. The objective is that of :func:`~lit_wsl.rebasin.joint_matching`: tensors of both bases, and responses to data
where there are some, each divided by its norms; one group at a time is solved exactly with all others fixed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lit_wsl.rebasin.spec.axis import AxisUse
from lit_wsl.rebasin.spec.spec import PermutationSpec

Maps = Mapping[str, Tensor]
"""Innermost group -> float64 ``(units of all ancestors, size, size)``; each matrix is orthogonal."""

#: Most passes over all groups, and the gain of a pass, as a share of the objective, below which they end.
SWEEPS, ENOUGH = 10, 1e-3


def innermost(spec: PermutationSpec) -> list[str]:
    """The groups that nothing is nested in."""
    return [group for group in spec.groups if not spec.children(group)]


def identity_maps(spec: PermutationSpec) -> dict[str, Tensor]:
    """The maps that turn nothing."""
    shapes = {group: spec.permutation_shape(group) for group in innermost(spec)}
    return {
        group: torch.eye(shape[-1], dtype=torch.float64).expand(math.prod(shape[:-1]), -1, -1).clone()
        for group, shape in shapes.items()
    }


def turn_tensor(
    spec: PermutationSpec, maps: Maps, name: str, tensor: Tensor, *, scale: bool = False, skip: int | None = None
) -> Tensor:
    """A tensor with its moved axes turned.

    Args:
        spec: the spec, with the tensor's axes under ``name``.
        maps: how to turn each group.
        name: name of the tensor.
        tensor: the tensor.
        scale: whether it multiplies its units one by one (the gain of a norm): a diagonal matrix, of which after
            turning the diagonal is kept.
        skip: an axis that stays.
    """
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
    """The maps that bring ``other``, whose units are in the reference's order as far as permutations go, nearest to it.

    Args:
        spec: has the axes of all tensors that count.
        reference: the tensors that stay.
        other: tensors of the same names and shapes.
        scales: names of tensors that multiply units one by one; they have no say.
    """
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
