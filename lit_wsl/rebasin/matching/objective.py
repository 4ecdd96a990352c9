"""Where each group of a permutation spec meets each tensor, laid out for similarity matrices.

Groups are matched tree by tree: a group at the top together with all that is nested in it. Every position of an axis
counts once, for the innermost group that moves it: the pixels behind a channel for the channel, the rows of a head for
the permutation inside the head. What the outer group sees of them is the value of the best inner permutation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lit_wsl.rebasin.spec.axis import AxisSpec, lexsort
from lit_wsl.rebasin.spec.spec import PermutationSpec

#: Similarity entries that are held at once; beyond it, nested blocks are computed pair by pair.
MAX_ENTRIES = 2**28

#: Terms of at most so many entries per unit are put side by side before they are multiplied.
THIN = 64


class Similarity:
    """Inner products between the units of both models, for every pair of ancestor units.

    Rows of the terms are added one after the other and not kept, unless there are too many pairs to hold at once.
    Thin terms (biases, gains) wait for each other: one product with all of them writes the matrix once. For a coupled
    pair ``size`` is the product of both sizes; ``potential``, where it is known already, is half the squared norm of
    the other model's rows over all terms to come.
    """

    def __init__(self, ancestors: int, size: int, potential: Tensor | None = None) -> None:
        self.ancestors, self.size = ancestors, size
        self._keep_rows = ancestors > 1 and (ancestors * size) ** 2 > MAX_ENTRIES
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._thin: list[tuple[Tensor, Tensor]] = []
        self._whole: Tensor | None = None
        self._potential = potential
        self._potential_known = potential is not None

    def add(self, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        """Add a term: its rows ``(ancestors, size, entries)`` of the reference and of the other model."""
        if not self._potential_known:
            squares = torch.linalg.vector_norm(b, dim=2).square_().float().mul_(0.5 * weight)
            self._potential = squares if self._potential is None else self._potential.add_(squares)
        if self._keep_rows:
            self._pairs.append((a * weight if weight != 1.0 else a, b))
            return
        flat_a, flat_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        if flat_a.shape[1] <= THIN:
            self._thin.append((flat_a * weight if weight != 1.0 else flat_a, flat_b))
        else:
            self._multiply(flat_a, flat_b, weight)

    def _multiply(self, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        if self._whole is None:
            self._whole = a @ b.T
            if weight != 1.0:
                self._whole.mul_(weight)
        else:
            self._whole.addmm_(a.to(self._whole.dtype), b.T.to(self._whole.dtype), alpha=weight)

    @property
    def whole(self) -> Tensor:
        """(ancestors * size, ancestors * size) all inner products."""
        if self._thin:
            thin, self._thin = self._thin, []
            self._multiply(torch.cat([a for a, _ in thin], dim=1), torch.cat([b for _, b in thin], dim=1))
        assert self._whole is not None
        return self._whole

    @property
    def potential(self) -> Tensor:
        """(ancestors, size) half the squared norm of the other model's rows."""
        assert self._potential is not None
        return self._potential

    def worth(self, columns: Tensor) -> float:
        """What a permutation is worth, without ancestors, in float64."""
        return worth(self.whole, columns)

    def block(self, i: int, j: int) -> Tensor:
        """(size, size) inner products between ancestor unit ``i`` of the reference and ``j`` of the other model."""
        if not self._keep_rows:
            return self.whole[i * self.size : (i + 1) * self.size, j * self.size : (j + 1) * self.size]
        result = self._pairs[0][0][i] @ self._pairs[0][1][j].T
        for a, b in self._pairs[1:]:
            result = result.addmm_(a[i], b[j].T)
        return result

    def bounds(self) -> np.ndarray:
        """(ancestors, ancestors) float64: what the best permutation between two ancestor units can't exceed."""
        result = np.empty((self.ancestors, self.ancestors))
        for i in range(self.ancestors):
            for j in range(self.ancestors):
                potential = self.potential[j]
                best = (self.block(i, j) - potential).amax(dim=1).double().sum()
                result[i, j] = float(best + potential.double().sum())
        return result


def worth(block: Tensor, columns: Tensor) -> float:
    """``sum_i block[i, columns[i]]`` in float64."""
    chosen = block.gather(1, columns.to(block.device)[:, None])
    return float(chosen.double().sum())


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of the same shape, accumulated in float64."""
    x, y = a.reshape(-1), b.reshape(-1)
    # Pieces that stay in the cache when converted, and are too small to be worth waiting for other threads.
    chunk = 2**15 if x.device.type == "cpu" else 2**24
    parts = [torch.dot(x[i : i + chunk].double(), y[i : i + chunk].double()) for i in range(0, x.numel(), chunk)]
    return float(torch.stack(parts).sum()) if parts else 0.0


def norm(tensor: Tensor) -> float:
    """Root of the sum of squares, in float32 at least."""
    return float(torch.linalg.vector_norm(tensor if tensor.dtype == torch.float64 else tensor.float()))


def spread(tensor: Tensor) -> float:
    """Standard deviation; 0 for single values."""
    return float(tensor.float().std(correction=0)) if tensor.numel() > 1 else 0.0


@dataclass(frozen=True, eq=False)
class Term:
    """The share of one axis of one tensor in the similarity matrix of one group, or of two coupled ones."""

    # the group; or two siblings that move the same positions as a product (the query heads that share a key head, and
    # the units inside the value head that they read)
    groups: tuple[str, ...]
    tensor: str  # name of the tensor
    axis: int
    units: tuple[int, ...]  # (units of all ancestors together, size of the group or of each of both)
    # LongTensor ``(ancestors * sizes * k,)`` of the axis positions, unit by unit; None for all in order. With an outer
    # axis, without the ancestors that lie there.
    positions: Tensor | None
    outer_axis: int | None  # other axis of the tensor on which the outer ancestors lie
    outer_positions: Tensor | None  # LongTensor ``(outer ancestors, k2)``
    # axis -> positions of other axes that the term is limited to, since a nested group counts the others
    only: Mapping[int, Tensor]
    # whether the tree moves another axis of the tensor too; the term is then linear only in the neighbourhood of the
    # present permutation
    quadratic: bool
    trees: tuple[str, ...]  # other trees that move the same positions of this axis

    def rows(self, tensor: Tensor, only: Mapping[int, Tensor] | None = None) -> Tensor:
        """The tensor as ``(ancestors, product of the sizes, entries per unit)`` in float32 (float64 stays)."""
        for axis, index in {**self.only, **(only or {})}.items():
            tensor = tensor.index_select(axis, index.to(tensor.device))
        if tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.float()
        shape = (self.units[0], math.prod(self.units[1:]), -1)
        positions = None if self.positions is None else self.positions.to(tensor.device)
        if self.outer_axis is None:
            tensor = tensor.movedim(self.axis, 0)
            if positions is not None:
                tensor = tensor.index_select(0, positions)
            return tensor.reshape(shape)
        assert self.outer_positions is not None
        above = self.outer_positions.shape[0]
        tensor = tensor.movedim((self.outer_axis, self.axis), (0, 1))
        if positions is not None:
            tensor = tensor.index_select(1, positions)
        tensor = tensor.index_select(0, self.outer_positions.flatten().to(tensor.device))
        rest = tensor[0, 0].numel()
        inner = self.units[0] // above
        per_unit = tensor.shape[1] // (inner * shape[1])
        tensor = tensor.reshape(above, self.outer_positions.shape[1], inner, shape[1], per_unit, rest)
        return tensor.permute(0, 2, 3, 1, 4, 5).reshape(shape)

    def squares(self, tensor: Tensor) -> Tensor:
        """Squared norm of what stands behind each unit, for terms without ancestors: float32 ``(size,)``."""
        rest = [axis for axis in range(tensor.ndim) if axis != self.axis]
        if tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.float()
        squares = (torch.linalg.vector_norm(tensor, dim=rest) if rest else tensor).square().float()
        if self.positions is not None:
            squares = squares[self.positions.to(tensor.device)]
        return squares.reshape(self.units[1], -1).sum(dim=1)


@dataclass(frozen=True, eq=False)
class Tree:
    """A top group with all that is nested in it: one step of the coordinate descent."""

    root: str  # name of the top group
    groups: tuple[str, ...]  # all groups, parents first
    terms: tuple[Term, ...]  # terms of single groups and of coupled pairs
    tensors: tuple[str, ...]  # names of all tensors that some group of the tree moves (they change when it is permuted)


def tree_roots(spec: PermutationSpec) -> dict[str, str]:
    """The top group above each group."""
    return {name: (*spec.ancestors(name), name)[0] for name in spec.groups}


def build_trees(spec: PermutationSpec, tensors: Iterable[str]) -> dict[str, Tree]:
    """All trees of a spec by the name of their root, with terms on the given tensors."""
    roots = tree_roots(spec)
    counted = set(tensors)
    terms: dict[str, list[Term]] = {root: [] for root in roots.values()}
    moved: dict[str, list[str]] = {root: [] for root in roots.values()}
    for name, axes in spec.axes.items():
        for axis, axis_spec in axes.items():
            for root in dict.fromkeys(roots[g] for g in axis_spec.groups):
                if name not in moved[root]:
                    moved[root].append(name)
                if name in counted:
                    for place, part in axis_spec.slices():
                        stack = {} if axis_spec.stack_axis is None else {axis_spec.stack_axis: torch.tensor([place])}
                        terms[root].extend(_axis_terms(spec, roots, name, axis, part, stack, root))
    members = {root: tuple(g for g in spec.groups if roots[g] == root) for root in terms}
    return {root: Tree(root, members[root], tuple(terms[root]), tuple(moved[root])) for root in terms}


def _axis_terms(
    spec: PermutationSpec,
    roots: Mapping[str, str],
    name: str,
    axis: int,
    axis_spec: AxisSpec,
    stack: dict[int, Tensor],
    root: str,
) -> list[Term]:
    inside = [g for g in axis_spec.groups if roots[g] == root]
    if not inside:
        return []
    touched = torch.stack([axis_spec.coordinate(g) >= 0 for g in inside])
    pattern = torch.zeros(axis_spec.length, dtype=torch.long)  # positions that the same groups touch have the same
    for row in touched:
        pattern = torch.unique(2 * pattern + row, return_inverse=True)[1]
    found = []
    for number in range(int(pattern.max()) + 1):
        where = torch.nonzero(pattern == number).flatten()
        present = [g for g, here in zip(inside, touched[:, where[0]].tolist()) if here]
        if not present:
            continue
        above = {a for g in present for a in spec.ancestors(g)}
        leaves = tuple(g for g in present if g not in above)
        if len({spec.groups[g].parent for g in leaves}) > 1 or len(leaves) > 2:
            continue  # no known architecture has it; such a tensor still counts in the objective
        term = _term(spec, roots, name, (axis, axis_spec), leaves, where)
        if term is not None:
            found.append(replace(term, only={**term.only, **stack}))
    return found


def _term(
    spec: PermutationSpec,
    roots: Mapping[str, str],
    name: str,
    place: tuple[int, AxisSpec],
    leaves: tuple[str, ...],
    where: Tensor,
) -> Term | None:
    axis, axis_spec = place
    axes, root = spec.axes[name], roots[leaves[0]]
    ancestors = spec.ancestors(leaves[0])
    on_axis = [g for g in (*ancestors, *leaves) if g in axis_spec.groups]
    also = (axis_spec.coords[:, where] >= 0).any(dim=1).tolist()
    rest = [g for g, here in zip(axis_spec.groups, also) if here and g not in on_axis]
    keys = [axis_spec.coordinate(g)[where] for g in (*on_axis, *rest)] + [axis_spec.rank[where]]
    positions = where[lexsort(keys)]
    outer_axis = axis_spec.outer_axis
    outer_positions = None
    outside = [g for g in ancestors if g not in axis_spec.groups]
    if outside:
        if outer_axis is None:
            return None
        outer = axes[outer_axis]
        if outer.stack_axis is not None:
            return None  # such a tensor still counts in the objective
        order = lexsort([*(outer.coordinate(g) for g in outside), torch.arange(outer.length)])
        outer_positions = order.reshape(math.prod(spec.groups[g].size for g in outside), -1)
    else:
        outer_axis = None
    only = _left_by_nested(spec, name, axis, leaves)
    if any(index.numel() == 0 for index in only.values()):
        return None
    units = (math.prod(spec.groups[g].size for g in ancestors), *(spec.groups[g].size for g in leaves))
    whole = positions.numel() == axis_spec.length and torch.equal(positions, torch.arange(axis_spec.length))
    quadratic = any(
        roots[g] == root and g not in ancestors
        for other, other_spec in axes.items()
        if other != axis and other not in only
        for g in other_spec.groups
    )
    shared = tuple(dict.fromkeys(roots[g] for g in rest))
    return Term(
        groups=leaves,
        tensor=name,
        axis=axis,
        units=units,
        positions=None if whole else positions,
        outer_axis=outer_axis,
        outer_positions=outer_positions,
        only=only,
        quadratic=quadratic or (outer_axis is None and root in shared),
        trees=tuple(tree for tree in shared if tree != root),
    )


def _left_by_nested(spec: PermutationSpec, name: str, axis: int, leaves: tuple[str, ...]) -> dict[int, Tensor]:
    """Positions of other axes that remain when those are taken off that groups nested in these ones count."""
    left = {}
    for other, other_spec in spec.axes[name].items():
        if other == axis or other_spec.outer_axis != axis:
            continue
        nested = [
            (other_spec.coordinate(g) >= 0).reshape(-1, other_spec.length).any(dim=0)
            for g in other_spec.groups
            if any(leaf in spec.ancestors(g) for leaf in leaves)
        ]
        if nested:
            left[other] = torch.nonzero(~torch.stack(nested).any(dim=0)).flatten()
    return left
