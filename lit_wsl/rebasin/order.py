"""The other model in its present order: permutations that grow step by step, tensors gathered only when looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lit_wsl.rebasin.apply import permute_axes
from lit_wsl.rebasin.spec import PermutationSpec
from lit_wsl.rebasin.terms import Term, tree_roots


class PresentOrder:
    """Tensors as they came, and the permutations that they stand under.

    No permuted copy is kept: what a step compares is gathered when it is compared, along the axes that were moved so
    far. Besides the tensors themselves only index vectors live on.

    Args:
        spec: permutation spec.
        tensors: the tensors as they came; not changed.
    """

    def __init__(self, spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.tensors = tensors
        self._roots = tree_roots(spec)
        self._roots_on = {
            (name, axis): tuple(dict.fromkeys(self._roots[g] for g in axis_spec.groups))
            for name in tensors
            for axis, axis_spec in spec.axes[name].items()
        }
        self.permutations: dict[str, Tensor] = {}
        self._indices: dict[tuple[str, int], Tensor | None] = {}
        self.reset()

    def reset(self) -> None:
        """Back to the order in which the tensors came."""
        self.permutations = self.spec.identity()
        self._indices = dict.fromkeys(self._roots_on)

    def move(self, permutations: Mapping[str, Tensor]) -> None:
        """Replace the permutations of some groups."""
        roots = {self._roots[group] for group in permutations}
        self.permutations.update({group: p.to("cpu", torch.long) for group, p in permutations.items()})
        for key, on_axis in self._roots_on.items():
            if not roots.isdisjoint(on_axis):
                self._indices.pop(key, None)

    def tensor(self, name: str) -> Tensor:
        """One tensor in the present order."""
        return self._permuted(name, self.spec.axes[name])

    def behind(self, term: Term) -> Tensor:
        """The tensor of a term in the present order, except that the term's own group stands as it came.

        Only for groups without ancestors whose tree moves no other axis of the tensor: the unit that a row belongs to
        is then the one the row came from, however often the group was moved.
        """
        name, own = term.tensor, term.axis
        indices = {
            axis: index
            for axis in self.spec.axes[name]
            if axis != own
            if (index := self._index(name, axis)) is not None
        }
        tensor = permute_axes(self.spec, name, self.tensors[name], indices)
        if not term.trees:  # nobody else moves the group's positions
            return tensor
        others = {g: p for g, p in self.permutations.items() if g not in term.groups}
        index = self.spec.index(others, name, own)
        return permute_axes(self.spec, name, tensor, {own: index})

    def followed_by(self, groups: Iterable[str], later: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Permutations of groups (with all their ancestors) that further ones follow."""
        result = {}
        for group in groups:
            family = (*self.spec.ancestors(group), group)
            if not any(member in later for member in family):
                continue
            shape = self.spec.permutation_shape(group)
            grid = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
            path = tuple(
                later[member][tuple(grid[: level + 1])] if member in later else grid[level]
                for level, member in enumerate(family)
            )
            result[group] = self.permutations[group][path]
        return result

    def _permuted(self, name: str, axes: Iterable[int]) -> Tensor:
        indices = {axis: index for axis in axes if (index := self._index(name, axis)) is not None}
        return permute_axes(self.spec, name, self.tensors[name], indices)

    def _index(self, name: str, axis: int) -> Tensor | None:
        """Positions that an axis takes from; None where it stands as it came."""
        key = (name, axis)
        if key not in self._indices:
            index = self.spec.index(self.permutations, name, axis)
            moved = not bool((index == torch.arange(index.shape[-1])).all())
            self._indices[key] = index.to(self.tensors[name].device) if moved else None
        return self._indices[key]
