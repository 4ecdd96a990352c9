"""What a permutation spec is made of: the groups, and where they stand on one axis of one tensor.

An :class:`AxisSpec` gives each position of one axis its *coordinates*: the unit of every group that moves it. An axis
of length ``heads * head_dim`` has the coordinates (head, unit in the head); the input axis of a Linear behind a flatten
has one coordinate (the channel), and positions of equal coordinates (the pixels) keep their order. Fused, concatenated
and shuffled axes are nothing special: their coordinates simply come from several groups.

Nothing here knows how groups are nested; that is a matter of the whole spec, see :mod:`~lit_wsl.rebasin.spec.spec`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_wsl.errors import RebasinError

Permutations = Mapping[str, Tensor]
"""Group name -> LongTensor of shape ``(*sizes of the ancestors, size)``; every last-axis row is a permutation."""


@dataclass(frozen=True)
class PermutationGroup:
    """One permutation variable.

    Attributes:
        name: Name of the group, unique in its spec.
        size: Number of interchangeable units.
        parent: The group in each of whose units this group has a permutation of its own; None at the top.
    """

    name: str
    size: int
    parent: str | None = None


@dataclass(frozen=True, eq=False)
class AxisSpec:
    """How the positions of one axis of one tensor are moved.

    Attributes:
        groups: The groups that move the axis, parents before children.
        coords: LongTensor ``(len(groups), length)``: the unit of each group at each position, -1 where the group does
            not touch the position. Positions of equal coordinates keep their order.
        outer_axis: Where the parents of these groups lie on *another axis of the same tensor* (the expert of an
            ``(experts, out, in)`` tensor; the group of a grouped convolution's output channel), that axis.
        stack_axis: Where several parameters are stacked on another axis that nothing moves (query, key and value of a
            ``(3, heads, dim, width)`` tensor) and this one is moved differently in each, that axis. ``coords`` then has
            one layer for each place on it, ``(len(groups), places, length)``; see :meth:`slices`.
    """

    groups: tuple[str, ...]
    coords: Tensor
    outer_axis: int | None = None
    stack_axis: int | None = None

    @property
    def length(self) -> int:
        """Number of positions of the axis."""
        return int(self.coords.shape[-1])

    def slices(self) -> list[tuple[int | None, AxisSpec]]:
        """The axis for each place on its stack axis; itself, with None, if it has none."""
        if self.stack_axis is None:
            return [(None, self)]
        found: list[tuple[int | None, AxisSpec]] = []
        for place in range(self.coords.shape[1]):
            rows = [row for row in range(len(self.groups)) if bool((self.coords[row, place] >= 0).any())]
            groups = tuple(self.groups[row] for row in rows)
            found.append((place, AxisSpec(groups, self.coords[rows, place], self.outer_axis)))
        return found

    @cached_property
    def rank(self) -> Tensor:
        """Place of each position among the positions of equal coordinates, LongTensor ``(length,)``."""
        if not self.groups or self.length == 0:
            return torch.arange(self.length)
        _, inverse = torch.unique(self.coords, dim=1, return_inverse=True)
        order = torch.argsort(inverse, stable=True)
        ordered = inverse[order]
        starts = torch.searchsorted(ordered, ordered, side="left")
        rank = torch.empty_like(order)
        rank[order] = torch.arange(self.length) - starts
        return rank

    def coordinate(self, group: str) -> Tensor:
        """Unit of ``group`` at each position, LongTensor ``([places,] length)``, -1 where it does not touch."""
        return self.coords[self.groups.index(group)]

    @property
    def touched(self) -> Tensor:
        """Bool ``([places,] length)``: the positions that some group moves."""
        if not self.groups:
            return torch.zeros(self.length, dtype=torch.bool)
        return (self.coords >= 0).any(dim=0)

    def index_from(self, source: Tensor) -> Tensor:
        """Positions that this axis takes from, if each position gets the coordinates of another one.

        Args:
            source: Like :attr:`coords`: at each position, the coordinates of what comes there.

        Returns:
            LongTensor ``(length,)``. Positions of equal coordinates come in the order that they had.
        """
        # Only positions that move are sorted, by the groups that touch them: a long concatenation has many of each.
        index = torch.arange(self.length)
        moved = torch.nonzero((source != self.coords).any(dim=0)).flatten()
        rows = (self.coords[:, moved] >= 0).any(dim=1)
        rank = self.rank[moved]
        new = lexsort([*source[rows][:, moved], rank])
        old = lexsort([*self.coords[rows][:, moved], rank])
        index[moved[new]] = moved[old]
        return index

    def without(self, removed: set[str]) -> AxisSpec:
        """The axis without some groups."""
        keep = [row for row, group in enumerate(self.groups) if group not in removed]
        groups = tuple(self.groups[row] for row in keep)
        return AxisSpec(groups, self.coords[keep], self.outer_axis, self.stack_axis)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AxisSpec):
            return NotImplemented
        return (
            self.groups == other.groups
            and (self.outer_axis, self.stack_axis) == (other.outer_axis, other.stack_axis)
            and self.coords.shape == other.coords.shape
            and torch.equal(self.coords, other.coords)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class AxisUse:
    """Where one group acts on one axis, laid out for building similarity matrices.

    Attributes:
        tensor: Name of the tensor.
        axis: The axis.
        positions: LongTensor ``(*sizes of the ancestors, size, k)``: the ``k`` positions of each unit, in an order that
            is the same for all units (children first by their coordinates, then by rank).
        outer_axis: The other axis on which the ancestors lie, or None.
        outer_positions: LongTensor ``(*sizes of the ancestors, k2)``: with ``outer_axis``, the positions on it that
            belong to each unit of the parent.
        stack: Where the axis is moved differently along a stack axis, that axis and the place on it.
    """

    tensor: str
    axis: int
    positions: Tensor
    outer_axis: int | None = None
    outer_positions: Tensor | None = None
    stack: tuple[int, int] | None = None


def stacked(slices: Sequence[AxisSpec], stack_axis: int, order: Sequence[str]) -> AxisSpec:
    """One axis made of what it is at each place on its stack axis; ``order`` ranks the groups."""
    groups = tuple(group for group in order if any(group in part.groups for part in slices))
    still = torch.full((slices[0].length,), -1, dtype=torch.long)
    rows = [torch.stack([p.coordinate(g) if g in p.groups else still for p in slices]) for g in groups]
    outer = next((part.outer_axis for part in slices if part.outer_axis is not None), None)
    return AxisSpec(groups, torch.stack(rows), outer, stack_axis)


def lexsort(keys: list[Tensor]) -> Tensor:
    """Order that sorts by the first key, ties by the second, and so on."""
    order = torch.arange(keys[0].numel())
    for key in reversed(keys):
        order = order[torch.argsort(key[order], stable=True)]
    return order


FORMAT = "lit_wsl.permutation_spec"
VERSION = 1


def segment_coords(
    shape: Sequence[int], groups: Sequence[str | None], start: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Coordinates of the positions of one segment: group -> LongTensor ``(prod(shape),)``.

    >>> segment_coords([2, 3], ["heads", None])["heads"].tolist()
    [0, 0, 0, 1, 1, 1]
    """
    grid = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape))
    offset = start or [0] * len(shape)
    return {group: grid[:, k] + offset[k] for k, group in enumerate(groups) if group is not None}


def _box(coords: Tensor, begin: int) -> tuple[int, list[int], list[int]]:
    """Largest row-major box of coordinates from ``begin`` on: its end, the side of each row, the repeat."""
    first = coords[:, begin]
    rows, total = coords.shape
    same = (coords[:, begin:] == first[:, None]).all(dim=0)
    repeat = int(same.long().cumprod(0).sum())
    sides = [1] * rows
    best_end = begin + repeat
    # Rows run at different speeds; a row that moves first is the innermost side. Rows that are -1 or constant have 1.
    block = repeat
    order: list[int] = []
    while begin + 2 * block <= total:
        moving = [row for row in range(rows) if int(coords[row, begin + block]) != int(first[row])]
        if len(moving) != 1 or moving[0] in order:
            break
        row = moving[0]
        here = coords[:, begin : begin + block]
        count = 1
        while begin + (count + 1) * block <= total:
            expected = here.clone()
            expected[row] += count
            if not torch.equal(coords[:, begin + count * block : begin + (count + 1) * block], expected):
                break
            count += 1
        if count == 1:
            break
        sides[row] = count
        order.append(row)
        block *= count
        best_end = begin + block
    return best_end, sides, [*reversed(order)]


def axis_to_segments(axis_spec: AxisSpec) -> list[dict[str, Any]]:
    """Segments of one axis; see the module."""
    segments: list[dict[str, Any]] = []
    begin = 0
    while begin < axis_spec.length:
        end, sides, order = _box(axis_spec.coords, begin)
        first = axis_spec.coords[:, begin].tolist()
        inert = [row for row, unit in enumerate(first) if unit >= 0 and row not in order]
        rows = sorted([*inert, *order], key=lambda row: order.index(row) if row in order else -1)
        shape = [sides[row] for row in rows]
        groups: list[str | None] = [axis_spec.groups[row] for row in rows]
        start = [first[row] for row in rows]
        if (repeat := (end - begin) // math.prod(shape)) > 1 or not rows:
            shape, groups, start = [*shape, repeat], [*groups, None], [*start, 0]
        entry: dict[str, Any] = {"shape": shape, "groups": groups}
        if any(start):
            entry["start"] = start
        segments.append(entry)
        begin = end
    return segments


def axis_from_segments(segments: Sequence[Mapping[str, Any]], order: Sequence[str], outer_axis: int | None) -> AxisSpec:
    """Inverse of :func:`axis_to_segments`; ``order`` ranks the groups, parents before children."""
    parts = [
        (segment_coords(s["shape"], s["groups"], s.get("start")), torch.Size(s["shape"]).numel()) for s in segments
    ]
    used = {group for part, _ in parts for group in part}
    if unknown := sorted(used.difference(order)):
        raise RebasinError(f"A segment names the groups {unknown}, which the spec does not list.")
    groups = tuple(group for group in order if group in used)
    rows = [torch.cat([part.get(g, torch.full((n,), -1)) for part, n in parts]) for g in groups]
    length = sum(n for _, n in parts)
    return AxisSpec(groups, torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.long), outer_axis)
