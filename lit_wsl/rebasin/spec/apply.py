"""Applying permutations to state dicts: pure, norm buffers included."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.spec.axis import Permutations
from lit_wsl.rebasin.spec.spec import PermutationSpec


def permute_tensor(spec: PermutationSpec, permutations: Permutations, name: str, tensor: Tensor) -> Tensor:
    """One tensor with all its moved axes permuted; the tensor itself if nothing moves it.

    Raises:
        RebasinError: The tensor does not have the shape the spec knows.
    """
    by_axis = spec.axes.get(name)
    if not by_axis:
        return tensor
    shape = spec.shapes.get(name, tuple(tensor.shape))
    if tuple(tensor.shape) != tuple(shape):
        raise RebasinError(
            f"{name!r} has shape {tuple(tensor.shape)}, the permutation spec was made for {tuple(shape)}."
        )
    return permute_axes(spec, name, tensor, {axis: spec.index(permutations, name, axis) for axis in by_axis})


def permute_axes(spec: PermutationSpec, name: str, tensor: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    """One tensor with some of its axes taken from given positions (see :meth:`PermutationSpec.index`)."""
    by_axis = spec.axes[name]
    # Plain axes first: an index with an outer axis belongs to the new positions on that axis.
    for axis in sorted(indices, key=lambda a: (by_axis[a].outer_axis is not None, a)):
        index, spec_of = indices[axis].to(tensor.device), by_axis[axis]
        places = [a for a in (spec_of.stack_axis, spec_of.outer_axis) if a is not None] + [axis]
        if len(places) == 1:
            tensor = tensor.index_select(axis, index)
            continue
        order = sorted(range(len(places)), key=places.__getitem__)
        view = [n if a in places else 1 for a, n in enumerate(tensor.shape)]
        tensor = torch.take_along_dim(tensor, index.permute(order).reshape(view), dim=axis)
    return tensor


def apply_permutation(
    spec: PermutationSpec, permutations: Permutations, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Permute the units of a network; its function stays exactly the same.

    Args:
        spec: Permutation spec of the architecture.
        permutations: Group name -> permutation, from ``weight_matching``, ``spec.random_permutations`` or by hand.
        state_dict: Weights and buffers. Not changed. Entries that the spec does not move are passed on as they are.

    Returns:
        A new state dict with the same keys in the same order.

    Raises:
        RebasinError: A tensor that the spec moves is missing or has another shape; a permutation has the wrong shape or
            belongs to no group.
    """
    if unknown := sorted(set(permutations) - set(spec.groups)):
        raise RebasinError(f"No group of the spec is called {', '.join(map(repr, unknown[:5]))}.")
    if missing := sorted(set(spec.axes) - set(state_dict)):
        raise RebasinError(
            f"The state dict misses {len(missing)} tensors that the permutation spec moves: {', '.join(missing[:5])}."
        )
    return {name: permute_tensor(spec, permutations, name, tensor) for name, tensor in state_dict.items()}


def invert_permutations(spec: PermutationSpec, permutations: Permutations) -> dict[str, Tensor]:
    """The permutations that undo ``permutations``: applying both, in either order, changes nothing."""
    inverse: dict[str, Tensor] = {}
    for name in spec.groups:
        if name not in permutations:
            continue
        rows = permutations[name].argsort(dim=-1)
        inverse[name] = _rows_of_old_places(spec, permutations, name, rows)
    return inverse


def _rows_of_old_places(spec: PermutationSpec, permutations: Permutations, name: str, rows: Tensor) -> Tensor:
    """Bring row ``i`` (of the new place) to where the unit came from, for each level of nesting."""
    ancestors = spec.ancestors(name)
    if not ancestors:
        return rows
    sizes = spec.permutation_shape(name)[:-1]
    grid = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    path: list[Tensor] = []
    for level, ancestor in enumerate(ancestors):
        taken = permutations[ancestor][tuple(grid[: level + 1])] if ancestor in permutations else grid[level]
        path.append(taken)
    result = torch.empty_like(rows)
    result[tuple(path)] = rows
    return result


def compose_permutations(spec: PermutationSpec, first: Permutations, second: Permutations) -> dict[str, Tensor]:
    """The permutations whose application equals applying ``first`` and then ``second``."""
    identity = spec.identity()
    one, two = {**identity, **first}, {**identity, **second}
    result: dict[str, Tensor] = {}
    for name in spec.groups:
        sizes = spec.permutation_shape(name)
        grid = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
        path = []
        for level, member in enumerate((*spec.ancestors(name), name)):
            path.append(two[member][tuple(grid[: level + 1])])
        result[name] = one[name][tuple(path)]
    return result
