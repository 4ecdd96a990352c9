"""The best permutations of one tree of groups, everything else fixed: nested groups solved exactly, inside out.

The worth of bringing unit ``j`` of the other model to the place of unit ``i`` is the inner product of what the two
units hold themselves, plus, for every group nested in them, the optimum of that group between ``i`` and ``j``. The
optima inside are computed only where a bound on them does not settle the matter (:func:`assign_lazily`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_wsl.rebasin.matching.assignment import assign, assign_lazily
from lit_wsl.rebasin.matching.objective import Similarity, Tree, worth
from lit_wsl.rebasin.spec.spec import PermutationSpec


@dataclass(frozen=True, eq=False)
class Solution:
    """Permutations of all groups of a tree, relative to the order in which the rows were compared.

    Attributes:
        permutations: group name -> permutation.
        certain: whether every row-wise maximum was another one.
        similarity: what the permutation of a lone group was read off.
    """

    permutations: dict[str, Tensor]
    certain: bool
    similarity: Similarity | None = None


class TreeSolver:
    """Solves one tree from the similarities of its groups.

    Args:
        spec: the permutation spec.
        tree: which tree.
        similarities: group, or coupled pair of groups, to its similarity. Groups without one have no evidence.
    """

    def __init__(self, spec: PermutationSpec, tree: Tree, similarities: Mapping[tuple[str, ...], Similarity]) -> None:
        self.spec, self.tree, self.similarities = spec, tree, similarities
        self.certain = True
        self._memo: dict[tuple[tuple[str, ...], int, int], tuple[float, dict[str, Tensor]]] = {}
        self._bounds: dict[tuple[str, ...], np.ndarray] = {}
        self._bundles: dict[str, list[tuple[str, ...]]] = {g: self._siblings(g) for g in tree.groups}

    def solve(self) -> Solution:
        """The joint optimum of the tree's groups (up to coupled siblings, which alternate)."""
        root = self.tree.root
        if len(self.tree.groups) == 1:
            own = self.similarities[(root,)]
            columns, certain = assign(own.block(0, 0), own.potential[0])
            return Solution({root: columns}, certain, own)
        result = {
            g: torch.arange(shape[-1]).expand(shape).clone()
            for g, shape in ((g, self.spec.permutation_shape(g)) for g in self.tree.groups)
        }
        self._unfold(root, 0, 0, result)
        return Solution(result, self.certain)

    def solve_inner(self) -> Solution:
        """The optimum of every group on its own, with the units of its ancestors left where they are."""
        result, certain = {}, True
        for group in self.tree.groups:
            own = self.similarities.get((group,))
            if own is None:
                continue
            rows = [assign(own.block(i, i), own.potential[i]) for i in range(own.ancestors)]
            certain &= all(sure for _, sure in rows)
            result[group] = torch.stack([columns for columns, _ in rows]).reshape(self.spec.permutation_shape(group))
        return Solution(result, certain)

    # ---- inside out --------------------------------------------------------------------------------------------------

    def _siblings(self, parent: str) -> list[tuple[str, ...]]:
        """Children of a group, bundled where they are coupled."""
        bundles = [{child} for child in self.spec.children(parent)]
        for key in self.similarities:
            if len(key) == 2 and self.spec.groups[key[0]].parent == parent:
                joined = [b for b in bundles if b & set(key)]
                bundles = [b for b in bundles if not b & set(key)] + [set().union(*joined)]
        order = {g: n for n, g in enumerate(self.tree.groups)}
        return sorted((tuple(sorted(b, key=order.__getitem__)) for b in bundles), key=lambda b: order[b[0]])

    def _unfold(self, group: str, i: int, j: int, result: dict[str, Tensor]) -> None:
        """Write the solution of a group between two ancestor units, and of all inside it, into ``result``."""
        columns = self._value((group,), i, j)[1][group]
        size = self.spec.groups[group].size
        result[group].reshape(-1, size)[i] = columns
        for bundle in self._bundles[group]:
            for unit in range(size):
                place, source = i * size + unit, j * size + int(columns[unit])
                if len(bundle) == 1:
                    self._unfold(bundle[0], place, source, result)
                    continue
                for member, inner in self._value(bundle, place, source)[1].items():
                    result[member].reshape(-1, self.spec.groups[member].size)[place] = inner

    def _value(self, bundle: tuple[str, ...], i: int, j: int) -> tuple[float, dict[str, Tensor]]:
        """Worth and permutations of the optimum of a group (or coupled siblings) between two ancestor units."""
        key = (bundle, i, j)
        if key not in self._memo:
            if len(bundle) > 1:
                self._memo[key] = Coupled(self.spec, self.similarities, bundle, i, j).solve()
            elif self._bundles[bundle[0]]:
                self._memo[key] = self._inner_node(bundle[0], i, j)
            else:
                self._memo[key] = self._leaf(bundle[0], i, j)
        return self._memo[key]

    def _leaf(self, group: str, i: int, j: int) -> tuple[float, dict[str, Tensor]]:
        own = self.similarities.get((group,))
        if own is None:
            return 0.0, {group: torch.arange(self.spec.groups[group].size)}
        block = own.block(i, j)
        columns, certain = assign(block, own.potential[j])
        if i == j:
            self.certain &= certain
        return worth(block, columns), {group: columns}

    def _inner_node(self, group: str, i: int, j: int) -> tuple[float, dict[str, Tensor]]:
        size = self.spec.groups[group].size
        rows, cols = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
        own = self.similarities.get((group,))
        base = np.zeros((size, size)) if own is None else own.block(i, j).double().cpu().numpy()
        upper = base + sum(self._bound(bundle)[rows, cols] for bundle in self._bundles[group])

        def value(u: int, v: int) -> float:
            inner = sum(self._value(bundle, i * size + u, j * size + v)[0] for bundle in self._bundles[group])
            return float(base[u, v]) + inner

        columns = assign_lazily(upper, value)
        total = sum(value(u, int(v)) for u, v in enumerate(columns))
        return total, {group: torch.from_numpy(columns).long()}

    def _bound(self, bundle: tuple[str, ...]) -> np.ndarray:
        """(ancestors, ancestors) upper bounds of :meth:`_value`, all pairs at once."""
        if bundle in self._bounds:
            return self._bounds[bundle]
        size = int(np.prod(self.spec.permutation_shape(bundle[0])[:-1]))
        bound = np.zeros((size, size))
        for key, own in self.similarities.items():
            if set(key) <= set(bundle):
                bound = bound + own.bounds()
        for group in bundle:
            for inner in self._bundles[group]:
                width = self.spec.groups[group].size
                below = self._bound(inner).reshape(size, width, size, width)
                bound = bound + below.max(axis=3).sum(axis=1)
        self._bounds[bundle] = bound
        return bound


class Coupled:
    """Siblings that move the same positions as a product, between one pair of ancestor units.

    The worth is a sum over the siblings plus a bilinear term for each coupled pair. It is maximised by alternating:
    one sibling at a time, exactly, until nothing improves; from every sibling as the first one, and the best kept.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        similarities: Mapping[tuple[str, ...], Similarity],
        bundle: tuple[str, ...],
        i: int,
        j: int,
    ) -> None:
        self.bundle = bundle
        self.sizes = {g: spec.groups[g].size for g in bundle}
        self.own = {g: similarities[(g,)].block(i, j).double().cpu() for g in bundle if (g,) in similarities}
        self.joint: dict[tuple[str, str], Tensor] = {}
        for key, own in similarities.items():
            if len(key) == 2 and set(key) <= set(bundle):
                first, second = self.sizes[key[0]], self.sizes[key[1]]
                block = own.block(i, j).double().cpu().reshape(first, second, first, second)
                self.joint[key[0], key[1]] = block.transpose(1, 2)  # (u, v, w, w')

    def solve(self) -> tuple[float, dict[str, Tensor]]:
        """Worth and permutations of the best alternation."""
        results = [self._alternate(first) for first in self.bundle]
        return max(results, key=lambda result: result[0])

    def _alternate(self, first: str) -> tuple[float, dict[str, Tensor]]:
        found: dict[str, Tensor] = {}
        order = [first] + [g for g in self.bundle if g != first]
        value = -np.inf
        while True:
            for group in order:
                found[group] = assign(self._given(group, found))[0]
            now = self._worth(found)
            if not now > value + 1e-12 * abs(value):
                return now, dict(found)
            value = now

    def _given(self, group: str, found: Mapping[str, Tensor]) -> Tensor:
        """(size, size) worth of each choice, given the others; unknown others are taken at their best for it."""
        size = self.sizes[group]
        matrix = self.own.get(group, torch.zeros(size, size, dtype=torch.float64)).clone()
        for (a, b), joint in self.joint.items():
            if group not in (a, b):
                continue
            if group == b:
                joint = joint.permute(2, 3, 0, 1)
            other = b if group == a else a
            if other in found:
                index = found[other].reshape(1, 1, -1, 1).expand(size, size, -1, 1)
                matrix += joint.gather(3, index).squeeze(3).sum(dim=2)
            else:
                matrix += joint.amax(dim=3).sum(dim=2)
        return matrix

    def _worth(self, found: Mapping[str, Tensor]) -> float:
        value = sum(worth(block, found[g]) for g, block in self.own.items())
        for (a, b), joint in self.joint.items():
            chosen = joint[torch.arange(self.sizes[a]), found[a]]  # (u, w, w')
            value += float(chosen.gather(2, found[b].reshape(1, -1, 1).expand(len(chosen), -1, 1)).sum())
        return value
