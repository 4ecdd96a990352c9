"""Layers that may take one another's place, alone or as parts of a whole, and all the ways to assign them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cache, cached_property
from itertools import combinations, pairwise, permutations, product

from lit_wsl.matching.layers import (
    Region,
    Unit,
    apart,
    dissolved,
    is_kernel,
    is_square,
    lists,
    merged,
    reordered,
    single,
)
from lit_wsl.matching.shapes import join_axis, operations_between
from lit_wsl.matching.tree import role_of
from lit_wsl.structure.description import Shape, core

MAX_OPTIONS = 1536  # two modules of four layers have 1152
MOST_TRIED = 20_000  # steps on the way to them: where nothing fits, there may be as many as subsets
MAX_STARTS = 8  # ways from which exchanges lead to all others
MAX_LISTS = 8  # lists of single layers of which all subsets are tried
FREE, WHOLE_BY_WHOLE, MODULE_BY_MODULE = range(3)

Cover = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # (wholes or sources, targets)
CoverPair = tuple[tuple[int, ...], tuple[int, ...]]
Manner = tuple[object, ...]  # whether the tensors of both sides are called weights, or are bare parameters; or which
Exchange = tuple[int, dict[tuple[str, int], list[int]]]


def fits(s: Unit, t: Unit) -> list[tuple[int, int]] | None:
    """Which tensor of one layer goes to which of another, or None."""
    if len(s.shapes) != len(t.shapes) or operations_between(s.main, t.main) is None:
        return None
    if s.times != t.times and min(s.times, t.times) != 1:
        return None
    pairs = [(0, 0)]
    free = list(range(1, len(t.shapes)))
    for k in range(1, len(s.shapes)):
        shape = (s.times, *s.shapes[k]) if s.times > 1 else s.shapes[k]
        fit = [j for j in free if core(shape) == core((t.times, *t.shapes[j]) if t.times > 1 else t.shapes[j])]
        if not fit:
            return None
        best = next((j for j in fit if role_of(t.names[j][0][0]) == role_of(s.names[k][0][0])), fit[0])
        free.remove(best)
        pairs.append((k, best))
    return pairs


def joins(whole: Unit, parts: Sequence[Unit]) -> tuple[int, bool] | None:
    """Along which axis parts make up a whole, and whether they are turned for it, or None.

    Of nested copies, such as experts, each makes up a whole or a layer of a stack of wholes; the axis is that of one.
    Stacks make up a stack layer by layer. Parts that are squares may as well be turned as not.
    """
    within = [_within(part, whole) for part in parts]
    if None in within or len({p.times for p in parts}) > 1 or {len(p.shapes) for p in parts} != {len(whole.shapes)}:
        return None
    shapes = within[0] or ()
    main, own = trimmed(shapes[0], [p.shapes[0] for p in parts])
    if len(main) < 2:
        return None
    found = (0, False) if _joined(main, own, 0) else None
    if len(main) == 2 or (len(main) == 3 and found is None and not is_kernel(main)):
        found = join_axis(main, own)
    if found is None:
        return None
    others = ((shapes[j], [p.shapes[j] for p in parts]) for j in range(1, len(shapes)))
    return found if all(_joined(other, theirs, vector_axis(main, other)) for other, theirs in others) else None


def trimmed(whole: Shape, parts: Sequence[Shape]) -> tuple[Shape, list[Shape]]:
    """Shapes without axes of one at the end, where they have other numbers of axes: some convolutions are linear.

    Parts that are as large as each member of a whole get an axis of one, as if they were joined.

    >>> trimmed((2, 4), [(4,), (4,)])
    ((2, 4), [(1, 4), (1, 4)])
    >>> trimmed((6, 4), [(3, 4, 1), (3, 4, 1)])
    ((6, 4), [(3, 4), (3, 4)])
    """
    least = max(2, min(map(len, (whole, *parts))))
    if all(shape == whole[1:] for shape in parts):
        return whole, [(1, *shape) for shape in parts]
    if all(len(shape) == len(whole) for shape in parts):
        return whole, list(parts)

    def plain(shape: Shape) -> Shape:
        while len(shape) > least and shape[-1] == 1:
            shape = shape[:-1]
        return shape

    return plain(whole), [plain(shape) for shape in parts]


def _joined(whole: Shape, parts: Sequence[Shape], axis: int) -> bool:
    rest = {(*s[:axis], *s[axis + 1 :]) for s in (whole, *parts)}
    return len(rest) == 1 and len(whole) > axis and sum(s[axis] for s in parts) == whole[axis]


def vector_axis(matrix: Shape, vector: Shape) -> int:
    """Along which axis what stands beside a whole is joined: the second where it is a stack of vectors."""
    return int(len(matrix) == 3 and len(vector) == 2)


def _within(part: Unit, whole: Unit) -> tuple[Shape, ...] | None:
    """The shapes of a whole as one copy of a part sees them, where the part is nested as often or stacked."""
    if part.times == whole.times:
        return whole.shapes
    is_stack = whole.times == 1 and all(len(s) > 1 and s[0] == part.times for s in whole.shapes)
    return tuple(s[1:] for s in whole.shapes) if is_stack else None


def _is_part_or_whole(unit: Unit, beside: Sequence[Unit], others: Sequence[Unit]) -> bool:
    """Whether a layer makes up one of others with some beside it, or is made up of some of the others."""
    near = [one for one in beside if one is not unit and one.times == unit.times]
    whole = any(joins(other, (unit, *rest)) for other in others for m in (1, 2) for rest in combinations(near, m))
    return whole or any(joins(unit, group) for m in (2, 3) for group in combinations(others, m))


def covers(source: Sequence[Unit], target: Sequence[Unit]) -> tuple[list[Cover], bool]:
    """All ways to assign the layers of one side to those of the other, each used once; parts may make up a whole.

    Where these are too many, parts of one whole are taken from one module; where they still are, the layers of a module
    stay together, unless the modules of both sides don't go together.

    Returns:
        The ways, and whether these are all; some of them where they are too many.
    """
    found: list[Cover] = []
    for level in (FREE, WHOLE_BY_WHOLE, MODULE_BY_MODULE):
        fewer, whole = _covers(source, target, MAX_OPTIONS, level)
        if whole and (fewer or not found):
            return fewer, True
        found = max(found, fewer, key=len)
    return found, False


def _covers(source: Sequence[Unit], target: Sequence[Unit], limit: int, level: int) -> tuple[list[Cover], bool]:
    fuse = len(source) >= len(target)
    wholes, parts = (target, source) if fuse else (source, target)
    found: list[Cover] = []
    spare = len(parts) - len(wholes)
    modules, homes = ([u.path.rpartition(".")[0] for u in side] for side in (parts, wholes))

    def stays(group: tuple[int, ...], chosen: list) -> bool:
        pairs = {(modules[p], homes[k]) for k, own in enumerate([*chosen, group]) for p in own}
        return len(pairs) == len({m for m, _ in pairs}) == len({h for _, h in pairs})

    @cache
    def makes_up(w: int, group: tuple[int, ...]) -> bool:
        if len(group) == 1:
            return fits(*((parts[group[0]], wholes[w]) if fuse else (wholes[w], parts[group[0]]))) is not None
        if level >= WHOLE_BY_WHOLE and len({modules[p] for p in group}) > 1:
            return False
        return joins(wholes[w], [parts[p] for p in group]) is not None

    def options(w: int, free: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for m in range(1, min(4, spare + 1) + 1):
            yield from (group for group in combinations(free, m) if makes_up(w, group))

    dead: set[tuple[int, ...]] = set()  # what may be left over of the parts, so that nothing comes of it
    tried = 0

    def recurse(w: int, free: tuple[int, ...], chosen: list) -> None:
        nonlocal tried
        tried += 1
        if len(found) > limit or tried > MOST_TRIED or (w, *free) in dead:
            return
        if w == len(wholes):
            if not free:
                found.append(tuple((g, (i,)) if fuse else ((i,), g) for i, g in enumerate(chosen)))
            return
        before = len(found)
        for group in options(w, free):
            if level == MODULE_BY_MODULE and not stays(group, chosen):
                continue
            recurse(w + 1, tuple(p for p in free if p not in group), [*chosen, group])
        if len(found) == before and level != MODULE_BY_MODULE:
            dead.add((w, *free))

    recurse(0, tuple(range(len(parts))), [])
    return found, len(found) <= limit and tried <= MOST_TRIED


def _may_join(part: Unit, whole: Unit) -> bool:
    """Whether a layer is like a whole but for one axis, which is shorter."""
    within = _within(part, whole)
    if within is None:
        return False
    w, (p,) = trimmed(within[0], [part.shapes[0]])
    if len(p) != len(w) or len(w) < 2 or len(part.shapes) != len(whole.shapes):
        return False
    if len(w) == 3 and p[0] == w[0] and not is_kernel(w):
        p, w = p[1:], w[1:]
    if len(w) > 2:
        return p[1:] == w[1:] and p[0] < w[0]
    return any((a == w[0] and b < w[1]) or (b == w[1] and a < w[0]) for a, b in (p, p[::-1]))


def components(source: Sequence[Unit], target: Sequence[Unit]) -> list[tuple[list[Unit], list[Unit]]]:
    """Layers that may take one another's place, directly or in a whole."""
    s_n, t_n = len(source), len(target)
    link = list(range(s_n + t_n))

    def find(i: int) -> int:
        while link[i] != i:
            i = link[i]
        return i

    def join(i: int, j: int) -> None:
        link[find(i)] = find(j)

    for i, s in enumerate(source):
        for j, t in enumerate(target):
            if fits(s, t) is not None:
                join(i, s_n + j)
    for wholes, parts, offset_w, offset_p in ((target, source, s_n, 0), (source, target, 0, s_n)):
        for w, whole in enumerate(wholes):
            fitting = [p for p, part in enumerate(parts) if _may_join(part, whole)]
            for m in (2, 3, 4):
                for group in combinations(fitting, m):
                    if joins(whole, [parts[p] for p in group]) is not None:
                        for p in group:
                            join(offset_w + w, offset_p + p)
    groups: dict[int, tuple[list[Unit], list[Unit]]] = {}
    for i, s in enumerate(source):
        groups.setdefault(find(i), ([], []))[0].append(s)
    for j, t in enumerate(target):
        groups.setdefault(find(s_n + j), ([], []))[1].append(t)
    return [g for g in groups.values() if g[0] and g[1]]


class Part:
    """Layers that may take one another's place, and what is open about them."""

    def __init__(self, region: int, source: list[Unit], target: list[Unit]) -> None:
        self.region, self.source, self.target = region, source, target
        self._known: dict[CoverPair, bool] = {}
        self.covers, whole = covers(source, target)
        self.grows = not whole and bool(self.covers)  # where they are too many to list, exchanges lead to them
        self._starts = self._first_and_last()
        self.covers = self.in_order({}) if self.grows else self.covers
        self.fixed: frozenset[int] = frozenset()  # what names tell of
        self.which = -1
        self.order: dict[tuple[str, int], int] = {}
        self.heads: dict[tuple[str, int], int] = {}
        self.turns: dict[Manner, int] = {}
        self.layout: int | None = None
        self.each = False  # whether every square may stand its own way

    @property
    def joins(self) -> bool:
        """Whether sources may be parts of targets, not the other way round."""
        return len(self.source) >= len(self.target)

    @cached_property
    def in_line(self) -> bool:
        """Whether any may take the place of any."""
        return all(fits(s, t) is not None for s, t in product(self.source, self.target))

    def _first_and_last(self) -> list[Cover]:
        """Of the covers in which parts of the same shapes make up each whole the first and the last."""
        side = self.source if self.joins else self.target
        found: dict[object, list[Cover]] = {}
        for cover in self.covers:
            own = [sorted(side[k].shapes for k in pair[0 if self.joins else 1]) for pair in cover]
            found.setdefault(repr(own), []).append(cover)
        return list(dict.fromkeys(cover for covers in found.values() for cover in (covers[0], covers[-1])))[:MAX_STARTS]

    def in_order(self, known: Mapping[int, int]) -> list[Cover]:
        """In the order in which they stand, and in the opposite order, but for what is known, target by target."""
        if len(self.source) != len(self.target) or not self.in_line:
            placed = [c for c in (self._placed(cover, known) for cover in self._starts) if self._is_possible(c)]
            return list(dict.fromkeys(placed)) or self._starts
        free = [i for i in range(len(self.source)) if i not in known.values()]
        rest = [j for j in range(len(self.target)) if j not in known]
        orders = ({**known, **dict(zip(rest, order))} for order in (free, free[::-1]))
        return [tuple(((order[j],), (j,)) for j in sorted(order)) for order in orders]

    def _placed(self, cover: Cover, known: Mapping[int, int]) -> Cover:
        """A cover with what is known in its place, in exchange for what was there."""
        own, other = (0, 1) if self.joins else (1, 0)
        for j, i in known.items():
            part, whole = (i, j) if self.joins else (j, i)
            there = next(pair[own] for pair in cover if pair[other] == (whole,))
            swap = {part: there[0], there[0]: part} if len(there) == 1 else {}
            moved = [tuple(sorted(swap.get(k, k) for k in pair[own])) for pair in cover]
            cover = tuple((own_, pair[1]) if self.joins else (pair[0], own_) for own_, pair in zip(moved, cover))
        return cover

    def _is_possible(self, cover: Cover) -> bool:
        """Whether all shapes fit."""
        return all(self._makes_up(pair) for pair in cover)

    def _makes_up(self, pair: CoverPair) -> bool:
        if pair not in self._known:
            sources, targets = self.units(pair)
            if len(sources) == len(targets):
                self._known[pair] = fits(sources[0], targets[0]) is not None
            else:
                whole, parts = (targets[0], sources) if len(sources) > 1 else (sources[0], targets)
                self._known[pair] = joins(whole, parts) is not None
        return self._known[pair]

    def key(self, cover: tuple[Sequence[int], Sequence[int]]) -> tuple[str, int]:
        """The whole of a fusion, and how many parts it has."""
        g, h = cover
        return (self.target[h[0]] if len(g) > 1 else self.source[g[0]]).path, max(len(g), len(h))

    def units(self, cover: tuple[Sequence[int], Sequence[int]]) -> tuple[list[Unit], list[Unit]]:
        """The layers of both sides in one part of a cover."""
        return [self.source[i] for i in cover[0]], [self.target[j] for j in cover[1]]

    def parts(self, cover: tuple[Sequence[int], Sequence[int]]) -> list[Unit]:
        """The parts of a fusion."""
        g, h = cover
        return [self.source[i] for i in g] if len(g) > 1 else [self.target[i] for i in h]

    def describe(self, cover: Cover) -> str:
        """A cover in words."""
        return "; ".join(
            f"{' + '.join(self.source[i].path for i in g)} -> {' + '.join(self.target[j].path for j in h)}"
            for g, h in cover
        )

    def exchanges(
        self, cover: Cover, orders: Mapping[tuple[str, int], Sequence[int]], *, only_wholes: bool = False
    ) -> Iterator[Exchange]:
        """A cover with any two layers exchanged, modules, or wholes, and the orders of the parts of its wholes then."""
        joined = self.joins
        places = []
        for pair in cover:
            own = pair[0 if joined else 1]
            places.append([own[i] for i in orders[self.key(pair)]] if len(own) > 1 else list(own))
        swaps = [] if only_wholes else self._swaps
        moved = [[[other.get(i, i) for i in own] for own in places] for other in swaps]
        for a, b in combinations(range(len(places)), 2):
            if len(places[a]) == len(places[b]) > 1:  # two wholes, with all their parts
                moved.append([places[{a: b, b: a}.get(k, k)] for k in range(len(places))])
        for made in moved:
            changed = tuple(
                (tuple(sorted(own)), pair[1]) if joined else (pair[0], tuple(sorted(own)))
                for own, pair in zip(made, cover)
            )
            if self.grows and changed not in self.numbers and self._is_possible(changed):
                self.numbers[changed] = len(self.covers)
                self.covers.append(changed)
            if changed != cover and changed in self.numbers:
                found = {self.key(c): [sorted(own).index(x) for x in own] for c, own in zip(changed, made) if own[1:]}
                yield self.numbers[changed], found

    @cached_property
    def _swaps(self) -> list[dict[int, int]]:
        """Which layers may be exchanged: any two, and those of two modules, or numbers, that hold the same names."""
        parts = self.source if self.joins else self.target
        modules: dict[str, dict[str, int]] = {}
        for k, unit in enumerate(parts):
            above, _, own = unit.path.rpartition(".")
            modules.setdefault(above, {})[own] = k
            if own.isdigit():
                modules.setdefault(f"*.{own}", {})[above] = k
        movable = [k for k in range(len(parts)) if k not in self.fixed]
        swaps = [{a: b, b: a} for a, b in combinations(movable, 2)]
        for one, other in combinations(modules.values(), 2):
            if one.keys() == other.keys() and len(one) > 1:
                pairs = [(one[name], other[name]) for name in one]
                swaps.append({x: y for a, b in pairs for x, y in ((a, b), (b, a))})
        return [swap for swap in swaps if not self.fixed.intersection(swap)]

    @cached_property
    def numbers(self) -> dict[Cover, int]:
        """The number of each way to assign its layers."""
        return {cover: number for number, cover in enumerate(self.covers)}

    @property
    def is_nested(self) -> bool:
        """Whether there are layers of which several copies stand in each copy."""
        return any(u.times > 1 for u in (*self.source, *self.target))

    def numbered(self, order: Sequence[int] | None) -> Part:
        """The same with the nested copies of its sources in another order, or of its targets where only they nest."""
        if order is None or list(order) == sorted(order):
            return self
        made = copy(self)
        if any(u.times == len(order) for u in self.source):
            made.source = [reordered(u, order) for u in self.source]
        else:
            made.target = [reordered(u, order) for u in self.target]
        return made

    @property
    def has_matrices(self) -> bool:
        """Whether its layers take part in a residual stream as branches: what multiplies more than one axis."""
        return any(len(core(u.main)) >= 2 for u in self.target)

    @cached_property
    def fusions(self) -> list[CoverPair]:
        """All that parts may make up, or be made up of."""
        return list(dict.fromkeys(pair for cover in self.covers for pair in cover if len(pair[0]) + len(pair[1]) > 2))

    def manner(self, pair: CoverPair) -> Manner:
        """In what manner the layers of both sides are kept: squares of one manner stand alike."""
        s, t = self.source[pair[0][0]], self.target[pair[1][0]]
        alike = s.is_weight, t.is_weight
        return (*alike, self.key(pair)[0]) if self.each else alike

    @cached_property
    def manners(self) -> list[Manner]:
        """In what manners squares may be taken to others."""
        pairs = dict.fromkeys(pair for cover in self.covers for pair in cover)
        return list(dict.fromkeys(self.manner(pair) for pair in pairs if all(map(is_square, self.parts(pair)))))

    @property
    def squares(self) -> list[Unit]:
        """The target's layers that are squares, or consist of some: shapes do not say which way round they are."""
        found = {j for j, unit in enumerate(self.target) if is_square(unit)}
        found |= {j for pair in self.fusions if all(map(is_square, self.parts(pair))) for j in pair[1]}
        return [self.target[j] for j in sorted(found)]

    @property
    def renames(self) -> bool:
        """Whether the tensors themselves have other names, as where a bare parameter stands for a layer's weight."""
        return len({u.names[0][0][0].rpartition(".")[2] for u in (*self.source, *self.target)}) > 1

    def decisions_of(self, cover: Cover) -> list[int]:
        """Its own decisions that say more of one way to assign its layers."""
        keys = [self.key(pair) for pair in cover if len(pair[0]) + len(pair[1]) > 2]
        found = [d for key in keys for d in (self.order[key], self.heads.get(key)) if d is not None]
        turns = (self.turns.get(self.manner(pair)) for pair in cover)
        return [*found, *(d for d in (*dict.fromkeys(turns), self.layout) if d is not None)]

    @property
    def decisions(self) -> list[int]:
        """Its own decisions, which goes where first."""
        more = () if self.layout is None else (self.layout,)
        return [self.which, *self.order.values(), *self.heads.values(), *self.turns.values(), *more]


def paired_lists(
    source: Sequence[Region], target: Sequence[Region]
) -> tuple[list[list[Region]], list[tuple[Region, Region]]]:
    """Lists that make up the same together though they are other lists: blocks in one, each kind of layer in its own.

    Args:
        source: What is outside of all regions, and the regions that found no counterpart.
        target: The same of the other side.

    Returns:
        What is left of both, and the pairs.
    """
    sides, pairs = [list(source), list(target)], []
    thin = [lists([*side[0].units, *_apart_from_lists(side[1:])]) for side in sides]
    for count in sorted({len(region.copies) for side in sides for region in side[1:]}):
        whole = [[r for r in side[1:] if len(r.copies) == count and r.is_counted] for side in sides]
        own = [[r for r in side if len(r.copies) == count][:MAX_LISTS] for side in thin]
        more = [[list(c) for m in range(len(side) + 1) for c in combinations(side, m)] for side in own]
        for chosen in sorted(product(*more), key=lambda both: sum(map(len, both))):
            made = [[*a, *b] for a, b in zip(whole, chosen)]
            if all(made) and len({sum(r.elements for r in side) for side in made}) == 1:
                pairs.append((merged(made[0]), merged(made[1])))
                sides = [_without(side, taken) for side, taken in zip(sides, made)]
                break
    return sides, pairs


def _apart_from_lists(regions: Sequence[Region]) -> list[Unit]:
    """The layers of two modules that are alike but no members of a list, such as two lists that are."""
    return [unit for region in regions if not region.is_counted for unit in dissolved(region, False)]


def _without(side: Sequence[Region], taken: Sequence[Region]) -> list[Region]:
    """What is outside of all, and regions, without some that were taken."""
    names = {name for region in taken for name in region.names}
    rest = [region for region in side[1:] if not names & region.names]
    units = (*side[0].units, *_apart_from_lists([region for region in side[1:] if names & region.names]))
    return [Region(side[0].copies, tuple(u for u in units if not names.issuperset(u.all_names))), *rest]


def with_dissolved(outside: Region, lonely: Sequence[Region], other: Region) -> Region:
    """The layers outside of all regions, with those of regions that have no counterpart.

    Copies stand on top of each other where the other side has a stack of as many.
    """
    units = list(outside.units)
    for region in lonely:
        stacks = {(len(region.copies), *shape) for unit in region.units if unit.times == 1 for shape in unit.shapes}
        stacks |= {(n, *shape[:-2], *shape[:-3:-1]) for n, *shape in stacks}  # turned
        together = dissolved(region, True)
        is_stacked = any(shape in stacks for unit in other.units for shape in unit.shapes)
        is_stacked = is_stacked or any(_is_part_or_whole(unit, together, other.units) for unit in together)
        units += together if is_stacked else dissolved(region, False)
    return Region(outside.copies, tuple(units))


def taken_apart(units: Sequence[Unit], others: Sequence[Unit]) -> tuple[Unit, ...]:
    """Layers, those of nested copies one by one where the other side has none, no stack, and no part of them."""
    others = [other for other in others if other.is_listed]
    tensors = [one for other in others for one in single(other)]

    def has_like(unit: Unit) -> bool:
        if not unit.is_listed:
            return False
        alike = any(fits(one, other) is not None for one in single(unit) for other in tensors)
        return alike or _is_part_or_whole(unit, units, others)

    return tuple(one for unit in units for one in ([unit] if unit.times == 1 or has_like(unit) else apart(unit)))


def groups_of(source: Sequence[Unit], target: Sequence[Unit]) -> list[tuple[list[Unit], list[Unit]]]:
    """Layers that may take one another's place; tensor by tensor where whole layers can't."""
    found = [group for group in components(source, target) if _covers(*group, 0, FREE)[0]]
    known = {id(unit) for s, t in found for unit in (*s, *t)}
    rest = [[one for unit in side if id(unit) not in known for one in single(unit)] for side in (source, target)]
    return [*found, *components(rest[0], rest[1])]


def _words(unit: Unit, counted: bool) -> set[str]:
    """The words of a layer's path, with the numbers that belong to them if numbers tell."""
    parts = [p for p in unit.path.lower().split(".") if p]
    words = {w for p in parts for w in re.findall(r"[a-z]+\d*", p)}
    words |= {f"{a}.{b}" for a, b in pairwise(parts) if b.isdigit()}
    return words if counted else {w for w in words if not w[-1].isdigit()}


def numberings(count: int) -> list[tuple[int, ...]]:
    """Orders of copies: all of a few; of more the same, reversed, and shifted by one."""
    if count <= 4:
        return list(permutations(range(count)))
    same = tuple(range(count))
    return [same, same[::-1], (*same[1:], same[0]), (same[-1], *same[:-1])]


def share_words(a: Region, b: Region) -> bool:
    """Whether the names of two lists of copies have a word in common."""
    one, other = (set(re.findall(r"[a-z]+", side.copies[0].lower())) for side in (a, b))
    return bool(one & other)


def agree_most(s: Unit, t: Unit, sources: Sequence[Unit], targets: Sequence[Unit], counted: bool = True) -> bool:
    """Whether two layers have more words in common than either has with another layer that would fit."""
    letters = _letters(sources, counted), _letters(targets, counted)
    void = set() if _spell_alike(*letters) else set.union(*letters)

    def common(one: Unit, other: Unit) -> int:
        return len((_words(one, counted) & _words(other, counted)) - void)

    others = [common(o, t) for o in sources if o is not s and fits(o, t) is not None]
    others += [common(s, o) for o in targets if o is not t and fits(s, o) is not None]
    return common(s, t) > max(others, default=0)


def _letters(units: Sequence[Unit], counted: bool) -> set[str]:
    """The words of one letter by which some of the layers are told from others."""
    words = [_words(unit, counted) for unit in units]
    return {w for w in set[str]().union(*words) - set[str].intersection(*words) if len(w.rstrip("0123456789.")) == 1}


def _spell_alike(some: set[str], others: set[str]) -> bool:
    """Whether letters stand for the same on both sides: one may be chance, and so may some of different ones."""
    return len(some & others) > 1 and (some <= others or others <= some)


def spell_parts(sources: Sequence[Unit], targets: Sequence[Unit]) -> bool:
    """Whether the name of a whole spells its parts: ``qkv``, ``gate_up``."""
    (whole,), parts = (targets, sources) if len(sources) > 1 else (sources, targets)
    own = "".join(re.findall(r"[a-z]+", whole.path.rpartition(".")[2].lower()))
    words = [re.findall(r"[a-z]+", p.path.rpartition(".")[2].lower())[:1] or [""] for p in parts]
    return all(w[0] for w in words) and any(
        all("".join(piece(w[0]) for w in words) and piece(w[0]) in own for w in words)
        for piece in (str, lambda word: word[0])
        if sorted("".join(piece(w[0]) for w in words)) == sorted("".join(c for c in own)) or piece is str
    )
