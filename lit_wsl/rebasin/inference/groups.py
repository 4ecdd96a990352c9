"""From units to a permutation spec: units of equal use are the units of one group."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.inference.labels import MAX_LABEL, Algebra, Label, compress, depends
from lit_wsl.rebasin.inference.run import Move, Run
from lit_wsl.rebasin.inference.units import (
    FIXED,
    Array,
    Units,
    bound_across,
    distinct,
    distinct_rows,
    mix,
    release,
    scramble,
)
from lit_wsl.rebasin.spec.axis import AxisSpec, PermutationGroup, stacked
from lit_wsl.rebasin.spec.spec import PermutationSpec


def free_name(name: str, taken: Container[str]) -> str:
    """The name, or, if it is taken, the first that is free of those with a number behind it."""
    free, count = name, 1
    while free in taken:
        free, count = f"{name}/{count}", count + 1
    return free


def crossed_slots(run: Run, group_of: Array, colour: np.ndarray) -> list[Array]:
    """Units whose positions are moved in another order than those of units that they may change places with."""
    found = []
    for move in run.moves:
        factors = [factor for label in move.labels.values() for factor in label.factors]
        repeated = any(_repeats(run.algebra.units, factor) for factor in factors)
        if repeated and (units := _crossed(run, move, group_of, colour)) is not None:
            found.append(units)
    return found


def torn_joins(algebra: Algebra) -> list[Array]:
    """Units that label the same places of a tensor, but do not move together.

    Factors on the axes (head, channel) and (head) of one tensor agree where each unit of the first is in the block of
    the second, or the other way round; factors on (head, channel) and (head, token), where both are in a common block.
    """
    found = []
    for one, two in algebra.joins:
        one, two = compress(algebra.units.find(one)), compress(algebra.units.find(two))
        if not depends(one) & depends(two):
            continue
        shape = np.broadcast_shapes(one.shape, two.shape)
        if int(np.prod(shape)) > MAX_LABEL:
            continue
        count = len(algebra.units)  # both units of a place in one number: sorted much faster than pairs
        first, second = np.divmod(distinct(one * count + two), count)
        lines = [_with_blocks(algebra.units, first), _with_blocks(algebra.units, second)]
        nested = depends(one) <= depends(two) or depends(two) <= depends(one)
        if nested:
            together = (lines[0] == second).any(axis=0) | (lines[1] == first).any(axis=0)
        else:
            together = np.any([(line != FIXED) & (line == other) for line in lines[0] for other in lines[1]], axis=0)
        together |= (first == FIXED) & (second == FIXED)
        if not together.all():
            units = np.concatenate([first[~together], second[~together]])
            found.append(units[units != FIXED])
    return found


def _with_blocks(units: Units, inner: Array) -> Array:
    """Each unit and the blocks around it that move, from the inside out, one line for each level."""
    lines = [units.find(inner)]
    while lines[-1].any() and len(lines) < 8:
        above = units.parents(lines[-1])
        lines.append(np.where(lines[-1] == FIXED, FIXED, units.find(above)))
    return np.stack(lines)


def _repeats(units: Units, factor: Array) -> bool:
    if factor.size < 4:  # two units at two positions each
        return False
    live = units.find(factor.ravel())
    live = live[live != FIXED]
    return len(live) > 1 and len(distinct(live)) < len(live)


def _crossed(run: Run, move: Move, group_of: Array, colour: np.ndarray) -> Array | None:
    replay = run.replica()
    unit_of, place_of = [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
    for number, label in move.labels.items():
        own = []
        for part, factor in enumerate(label.factors):
            units = run.algebra.units.find(factor.ravel())
            own.append(replay.algebra.units.fresh(factor.size).reshape(factor.shape))
            unit_of.append(units)
            place_of.append((number * 64 + part) * 2**32 + _ranks(units))
        plain = replace(label, factors=tuple(own), values=None, segments=None, settled=None)
        replay.labels[number] = plain
    units, places = np.concatenate(unit_of), np.concatenate(place_of)
    made = move.rule(replay, move.node)
    out: Sequence[Label] = (made,) if isinstance(made, Label) else made
    for label in out:
        for factor in label.factors:
            positions = replay.algebra.units.roots(factor.ravel())
            positions = np.where(positions < len(units), positions, 0)  # blocks are not followed
            crossed = _differing(units[positions], places[positions], group_of, colour)
            if crossed is not None:
                return crossed
    return None


def _ranks(units: Array) -> Array:
    """Place of each position among the positions of the same unit.

    >>> _ranks(np.array([5, 7, 5, 5, 7])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(units, kind="stable")
    ordered = units[order]
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(units)) - np.searchsorted(ordered, ordered)
    return ranks


def _differing(units: Array, places: Array, group_of: Array, colour: np.ndarray) -> Array | None:
    """Units of one group and colour that do not all have the same sequence of places."""
    moving = group_of[units] >= 0
    units, places = units[moving], places[moving]
    if not units.size:
        return None
    codes = scramble(places * 4099 + _ranks(units))
    kinds, which = np.unique(units, return_inverse=True)
    sums = np.zeros(len(kinds), dtype=np.uint64)
    np.add.at(sums, which.reshape(-1), codes)
    family = group_of[kinds].astype(np.uint64) * np.uint64(0x94D049BB133111EB) ^ colour[kinds]
    order = np.lexsort((sums, family))
    family, sums, kinds = family[order], sums[order], kinds[order]
    apart = (family[1:] == family[:-1]) & (sums[1:] != sums[:-1])
    if not apart.any():
        return None
    return kinds[np.isin(family, family[1:][apart])]


Place = tuple[int, int]
DIFFERS = "differs between the blocks of another axis"
CROSSING = "used in blocks that overlap"
ALONE = "no other unit is used alike"
UNUSED = "not used in the example call"
_NOWHERE = np.iinfo(np.int64).max


class Grouping:
    """Sorts the units of a finished run into groups, and the groups into a spec."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.units = run.algebra.units
        self.order = sorted(run.axes)
        self.arrays: dict[Place, Array] = {place: self.units.find(run.axes[place]) for place in self.order}
        self.parent = self.units.parents(np.arange(len(self.units)))
        self.inside = self.units.inside(np.arange(len(self.units)))
        self.groups: dict[str, PermutationGroup] = {}
        self.names: list[str] = []
        self.group_of = np.full(len(self.units), -1)  # the group of each unit, as a place in names
        self.number = np.full(len(self.units), -1)  # its number in the group
        self.starts = np.cumsum([0, *(self.arrays[place].size for place in self.order)])
        self.inexpressible: list[Array] = []
        self.crossing: list[Array] = []

    def build(self) -> PermutationSpec:
        """The spec."""
        self.colour, first = colour, first = self._colours()
        self._sort_into_groups(colour, first)
        axes: dict[str, dict[int, AxisSpec]] = {}
        used: set[str] = set()
        for place in self.order:
            spec = self._axis(place)
            if spec is not None and spec.groups:
                for name in self.run.trace.parameters[place[0]]:
                    axes.setdefault(name, {})[place[1]] = spec
                used.update(spec.groups)
        if self.inexpressible or self.crossing:
            return PermutationSpec({}, {})
        groups = {name: group for name, group in self.groups.items() if name in used}
        shapes, frozen = {}, {}
        for number, names in self.run.trace.parameters.items():
            for name in names:
                shapes[name] = self.run.shape_of(number)
                if why := {**self._alone(number, axes.get(name, {})), **self._why(number)}:
                    frozen[name] = why
        return PermutationSpec(groups, axes, shapes=shapes, frozen=frozen)

    def _alone(self, number: int, moved: Mapping[int, AxisSpec]) -> dict[int, str]:
        """Axes on which nothing moves all positions."""
        sizes = enumerate(self.run.shape_of(number))
        return {a: ALONE for a, n in sizes if n > 1 and not (a in moved and bool(moved[a].touched.all()))}

    def _why(self, number: int) -> dict[int, str]:
        why = {}
        if number not in self.run.used:
            return {axis: UNUSED for axis, size in enumerate(self.run.shape_of(number)) if size > 1}
        for axis, size in enumerate(self.run.shape_of(number)):
            if size < 2 or (number, axis) not in self.arrays:
                continue
            still = self.run.axes[(number, axis)][self.arrays[(number, axis)] == FIXED]
            reasons = Counter(r for r in self.units.reason(still) if r) if still.size else Counter()
            if reasons:
                why[axis] = max(sorted(reasons), key=lambda r: reasons[r])
        return why

    # ---- colours -----------------------------------------------------------------------------------------------------

    def _colours(self) -> tuple[np.ndarray, np.ndarray]:
        """Colour of every unit (equal: interchangeable as far as use tells) and its first position anywhere."""
        colour = self.units.signatures()
        unused = (colour == 0) & (self.parent == FIXED)
        first = np.full(len(self.units), _NOWHERE)
        position = 0
        for place in self.order:
            flat = self.arrays[place].ravel()
            np.add.at(colour, flat, np.uint64(mix(*place, 77)))
            np.minimum.at(first, flat, position + np.arange(flat.size))
            position += flat.size
        colour[unused] = 0
        # Blocks: what their children look like, from the innermost level outwards.
        depth = self.units.depth(np.arange(len(self.units)))
        for level in range(int(depth.max()), 0, -1):
            child = np.nonzero((depth == level) & (first != _NOWHERE))[0]
            child = child[self.units.find(child) == child]
            np.add.at(colour, self.parent[child], scramble(colour[child]))
            np.minimum.at(first, self.parent[child], first[child])
        return colour, first

    def _sort_into_groups(self, colour: np.ndarray, first: np.ndarray) -> None:
        roots = distinct(self.units.find(np.nonzero((first != _NOWHERE) & (colour != 0))[0]))
        live = [int(u) for u in roots if u != FIXED and colour[u] != 0 and first[u] != _NOWHERE]
        live.sort(key=lambda u: (int(first[u]), u))
        by_parent: dict[int, list[int]] = defaultdict(list)
        for unit in live:
            by_parent[int(self.parent[unit])].append(unit)
        # What is inside a block that stays is not visited: it stays, too.
        self._level(by_parent, [((), FIXED)], None, colour, first)

    def _level(
        self,
        by_parent: Mapping[int, list[int]],
        parents: list[tuple[tuple[int, ...], int]],
        parent: str | None,
        colour: np.ndarray,
        first: np.ndarray,
    ) -> None:
        """Groups among the children of the units of one group, one family for each colour."""
        families: dict[tuple[int, int], list[list[int]]] = {}
        for row, (_, block) in enumerate(parents):
            sorted_out: dict[tuple[int, int], list[int]] = defaultdict(list)
            for unit in by_parent.get(block, ()):
                # Inside one block only, so that the blocks that it was made of may tell units apart.
                apart = int(self.inside[unit]) if len(parents) == 1 else 0
                sorted_out[int(colour[unit]), apart].append(unit)
            for key, members in sorted_out.items():
                families.setdefault(key, [[] for _ in parents])[row] = members
                if len(distinct(self.inside[members])) > 1:
                    self.crossing.append(np.array(members))
        for members_by_row in families.values():
            sizes = {len(members) for members in members_by_row}
            if len(sizes) > 1:
                # Not the same in every block of the parent: nothing may be said of it here.
                continue
            size = sizes.pop()
            nested = [
                ((*path, k), unit)
                for (path, _), members in zip(parents, members_by_row, strict=True)
                for k, unit in enumerate(members)
            ]
            if size == 1 and parent is None:
                self._level(by_parent, [((), nested[0][1])], None, colour, first)
                continue
            if size == 1:
                # One unit inside each block: it moves with the block, and so does all that is inside of it.
                for (_, unit), (_, block) in zip(nested, parents, strict=True):
                    self.group_of[unit], self.number[unit] = self.group_of[block], self.number[block]
                self._level(by_parent, [(p[:-1], u) for p, u in nested], parent, colour, first)
                continue
            name = free_name(self._name(nested[0][1], first), self.groups)
            self.groups[name] = PermutationGroup(name, size, parent)
            members = [unit for _, unit in nested]
            self.group_of[members], self.number[members] = len(self.names), [path[-1] for path, _ in nested]
            self.names.append(name)
            self._level(by_parent, nested, name, colour, first)

    def _name(self, unit: int, first: np.ndarray) -> str:
        place = self.order[int(np.searchsorted(self.starts, first[unit], side="right")) - 1]
        return f"{self.run.trace.parameters[place[0]][0]}:{place[1]}"

    # ---- axes --------------------------------------------------------------------------------------------------------

    def _axis(self, place: Place) -> AxisSpec | None:
        array, joint = self.arrays[place], self.run.joints.get(place)
        outer = [] if joint is None else [o for o in joint.outer if array.shape[o] > 1]
        if not outer:
            return self._plain(array.ravel())
        layers = np.moveaxis(array, (*outer, place[1]), range(len(outer) + 1))
        layers = layers.reshape(*(array.shape[o] for o in outer), -1)
        if len(distinct_rows(layers.reshape(-1, layers.shape[-1]))[0]) == 1:
            return self._plain(layers.reshape(-1, layers.shape[-1])[0])
        for k in reversed(range(len(outer))):
            if len(outer) > 1 and (layers == layers.take([0], axis=k)).all():
                layers = layers.take([0], axis=k).squeeze(k)
                del outer[k]
        moved = [o for o in outer if (spec := self._axis((place[0], o))) is not None and spec.groups]
        stacks = [o for o in outer if o not in moved]
        if len(stacks) > 1 or len(moved) > 1:
            self.inexpressible.append(layers.reshape(-1, layers.shape[-1]))
            return None
        if not stacks:
            return self._inside(moved[0], layers, self.arrays[place[0], moved[0]].ravel())
        layers = np.moveaxis(layers, outer.index(stacks[0]), 0)
        parts = [self._layer(place[0], moved, stacks[0], k, layers[k]) for k in range(len(layers))]
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        if all(part == known[0] for part in known):
            return known[0]
        return stacked(known, stacks[0], self.names) if any(part.groups for part in known) else None

    def _layer(self, number: int, moved: list[int], stack: int, place: int, layer: Array) -> AxisSpec | None:
        """What an axis is at one place of a stack; None if that cannot be written."""
        nothing = AxisSpec((), torch.empty(0, layer.shape[-1], dtype=torch.long))
        if not moved:
            plain = self._plain(layer)
            if self._ancestors(plain.groups) <= set(plain.groups):
                return plain if plain.groups else nothing
            self.inexpressible.append(layer[None])
            return None
        around: Array = self.arrays[number, moved[0]]
        around = around.take([place], axis=stack) if around.shape[stack] > 1 else around
        count = len(self.inexpressible)
        found = self._inside(moved[0], layer, around.ravel())
        return found if found is not None else (nothing if len(self.inexpressible) == count else None)

    def _inside(self, outer_axis: int, rows: Array, around: Array) -> AxisSpec | None:
        """An axis that is moved inside what moves another one; ``rows`` holds its units for each place there."""
        first = np.sort(distinct_rows(rows)[0])
        if len(first) == 1:
            return self._plain(rows[0])
        outer = self._plain(around)
        outer = AxisSpec(outer.groups, outer.coords[:, torch.from_numpy(first)])
        specs = [self._plain(row) for row in rows[first]]
        inner = tuple(g for g in specs[0].groups if not self._given(g, specs, outer))
        if not inner and not any(spec.groups for spec in specs):
            return None
        if not (self._ancestors(inner) <= {*outer.groups, *inner} and self._alike(specs, outer, inner)):
            self.inexpressible.append(rows)
            return None
        if not inner:
            return None
        return AxisSpec(inner, torch.stack([specs[0].coordinate(g) for g in inner]), outer_axis)

    def _given(self, group: str, specs: list[AxisSpec], outer: AxisSpec) -> bool:
        """Whether the place on the outer axis alone says which unit of a group a row belongs to."""
        return group in outer.groups and all(
            group not in spec.groups or bool((spec.coordinate(group) == outer.coordinate(group)[k]).all())
            for k, spec in enumerate(specs)
        )

    def _alike(self, specs: list[AxisSpec], outer: AxisSpec, inner: tuple[str, ...]) -> bool:
        """Whether all rows of a joint axis have the same inner coordinates, and the outer ones of their own row."""
        for k, spec in enumerate(specs):
            if not set(inner) <= set(spec.groups):
                return False
            for group in spec.groups:
                mine = spec.coordinate(group)
                if group in inner:
                    if not torch.equal(mine, specs[0].coordinate(group)):
                        return False
                elif group not in outer.groups or not bool(((mine == outer.coordinate(group)[k]) | (mine < 0)).all()):
                    return False
        return True

    def _ancestors(self, names: tuple[str, ...]) -> set[str]:
        above: set[str] = set()
        for name in names:
            parent = self.groups[name].parent
            while parent is not None:
                above.add(parent)
                parent = self.groups[parent].parent
        return above

    def _plain(self, flat: Array) -> AxisSpec:
        """Coordinates of positions: of their units, and of the blocks around these."""
        rows: dict[int, np.ndarray] = {}
        current = flat
        while current.any():
            group = self.group_of[current]
            for which in distinct(group[group >= 0]):
                row = rows.setdefault(int(which), np.full(flat.size, -1))
                where = (group == which) & (row < 0)
                row[where] = self.number[current[where]]
            current = np.where(current == FIXED, FIXED, self.parent[current])
        order = sorted(rows)
        coords = torch.full((len(order), flat.size), -1, dtype=torch.long)
        for k, which in enumerate(order):
            coords[k] = torch.from_numpy(rows[which])
        self._check_slots(flat, coords)
        return AxisSpec(tuple(self.names[which] for which in order), coords)

    def _check_slots(self, flat: Array, coords: torch.Tensor) -> None:
        """Positions of equal coordinates are told apart by their order: it must be the same in all blocks."""
        touched = np.nonzero((coords >= 0).any(dim=0).numpy())[0]
        if not touched.size or len(distinct(flat[touched])) == len(touched) == len(np.unique(coords.numpy(), axis=1).T):
            return
        columns = coords.numpy()[:, touched]
        _, cell = np.unique(columns, axis=1, return_inverse=True)
        cell = cell.reshape(-1)
        order = np.argsort(cell, kind="stable")
        colour, cell = self.colour[flat[touched]][order], cell[order]
        starts = np.searchsorted(cell, cell)
        rank = np.arange(len(cell)) - starts
        kind, which = np.unique(columns[:, order] >= 0, axis=1, return_inverse=True)
        for k in range(kind.shape[1]):
            here = which.reshape(-1) == k
            expected = np.zeros(int(rank[here].max()) + 1, dtype=colour.dtype)
            expected[rank[here][::-1]] = colour[here][::-1]
            if (expected[rank[here]] != colour[here]).any():
                self.inexpressible.append(flat[None, touched])
                return


def build_spec(run: Run) -> PermutationSpec:
    """The permutation spec of a finished run."""
    algebra = run.algebra
    for _ in range(20):
        grouping = Grouping(run)
        spec = grouping.build()
        if not grouping.inexpressible and not grouping.crossing:
            grouping.crossing = torn_joins(algebra) or crossed_slots(run, grouping.group_of, grouping.colour)
            if not grouping.crossing:
                return spec
        for members in grouping.crossing:
            algebra.units.freeze(members, CROSSING)
        for rows in grouping.inexpressible:
            before = algebra.units.losses
            columns = np.ascontiguousarray(rows.T)
            if bound_across(algebra.units, columns):
                release(algebra.units, columns)
            else:
                algebra.pin(rows, [1], DIFFERS)
            if algebra.units.losses == before:
                algebra.units.freeze(rows, DIFFERS)
    raise RebasinError("The permutation groups of this model cannot be written as a permutation spec.")
