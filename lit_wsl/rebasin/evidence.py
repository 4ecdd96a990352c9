"""The order in which the resolved-first pass settles the trees of a permutation spec."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lit_wsl.rebasin.spec import PermutationSpec
from lit_wsl.rebasin.terms import Term, Tree, tree_roots


class Evidence:
    """Which trees are settled, and how much the settled ones say about the others.

    The evidence for a tree is the number of entries per unit that can be compared: those of the tensors it moves whose
    other coordinates nothing moves, or only settled trees do.
    """

    def __init__(self, spec: PermutationSpec, trees: Mapping[str, Tree], tensors: Mapping[str, Tensor]) -> None:
        self.trees = trees
        self.roots = tree_roots(spec)
        self.axes = {name: spec.axes[name] for name in tensors}
        self.open = dict.fromkeys(trees)
        self.free = {
            (name, axis): (axis_spec.coords < 0).all(dim=0)
            for name, axes in self.axes.items()
            for axis, axis_spec in axes.items()
        }
        self.sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._strength = {root: self._measure(root) for root in trees}
        self._neighbours = {name: [r for r in trees if name in trees[r].tensors] for name in tensors}

    def strongest(self) -> str:
        """The open tree with the most evidence; the first of the spec among equals."""
        return max(self.open, key=self._strength.__getitem__)

    def settle(self, root: str) -> None:
        """Count a tree as settled."""
        del self.open[root]
        again: dict[str, None] = {}
        for name in self.trees[root].tensors:
            if name not in self.axes:
                continue
            for axis, axis_spec in self.axes[name].items():
                if any(self.roots[g] == root for g in axis_spec.groups):
                    self.free[name, axis] = self._free(name, axis)
            again.update(dict.fromkeys(self._neighbours[name]))
        for other in again:
            if other in self.open:
                self._strength[other] = self._measure(other)

    def _free(self, name: str, axis: int) -> Tensor:
        axis_spec = self.axes[name][axis]
        free = torch.ones(axis_spec.length, dtype=torch.bool)
        for row, group in enumerate(axis_spec.groups):
            if self.roots[group] in self.open:
                free &= axis_spec.coords[row] < 0
        return free

    def _usable(self, term: Term) -> bool:
        if any(tree in self.open for tree in term.trees):
            return False
        return not term.quadratic or term.units[0] == 1

    def terms(self, root: str) -> list[tuple[Term, dict[int, Tensor]]]:
        """Terms of a tree that can be used now, with the limits on other axes."""
        usable = []
        for term in self.trees[root].terms:
            if not self._usable(term):
                continue
            limits = {}
            for axis in self.axes[term.tensor]:
                if axis in (term.axis, term.outer_axis) or axis in term.only:
                    continue
                free = self.free[term.tensor, axis]
                if not bool(free.all()):
                    limits[axis] = torch.nonzero(free).flatten()
            if all(index.numel() for index in limits.values()):
                usable.append((term, limits))
        return usable

    def _measure(self, root: str) -> float:
        strength = 0.0
        for term, limits in self.terms(root):
            entries = float(math.prod(self.sizes[term.tensor]))
            for axis, index in {**term.only, **limits}.items():
                entries *= index.numel() / self.sizes[term.tensor][axis]
            share = 1.0 if term.positions is None else term.positions.numel() / self.sizes[term.tensor][term.axis]
            strength += entries * share / math.prod(term.units)
        return strength
