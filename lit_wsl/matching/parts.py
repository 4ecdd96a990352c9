"""Layers that may take one another's place, the ways to assign them, and what of a model stands beside what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations

from lit_wsl.matching.covers import Cover, components, covers, fits
from lit_wsl.matching.layers import Region, Unit, apart, core, dissolved, single

CoverPair = tuple[tuple[int, ...], tuple[int, ...]]
Exchange = tuple[int, dict[tuple[str, int], list[int]]]


class Part:
    """Layers that may take one another's place, and what is open about them."""

    def __init__(self, region: int, source: list[Unit], target: list[Unit]) -> None:
        self.region, self.source, self.target = region, source, target
        self.covers = covers(source, target)
        self.which = -1
        self.order: dict[tuple[str, int], int] = {}
        self.heads: dict[tuple[str, int], int] = {}
        self.turn: int | None = None
        self.layout: int | None = None

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

    def exchanges(self, cover: Cover, orders: Mapping[tuple[str, int], Sequence[int]]) -> Iterator[Exchange]:
        """A cover with any two layers exchanged, or two modules, and the orders of the parts of its wholes then."""
        joined = len(self.source) >= len(self.target)
        places = []
        for pair in cover:
            own = pair[0 if joined else 1]
            places.append([own[i] for i in orders[self.key(pair)]] if len(own) > 1 else list(own))
        for other in self._swaps:
            made = [[other.get(i, i) for i in own] for own in places]
            changed = tuple(
                (tuple(sorted(own)), pair[1]) if joined else (pair[0], tuple(sorted(own)))
                for own, pair in zip(made, cover)
            )
            if changed != cover and changed in self.numbers:
                found = {self.key(c): [sorted(own).index(x) for x in own] for c, own in zip(changed, made) if own[1:]}
                yield self.numbers[changed], found

    @cached_property
    def _swaps(self) -> list[dict[int, int]]:
        """Which layers may be exchanged: any two, and those of two modules that have layers of the same names."""
        parts = self.source if len(self.source) >= len(self.target) else self.target
        modules: dict[str, dict[str, int]] = {}
        for k, unit in enumerate(parts):
            above, _, own = unit.path.rpartition(".")
            modules.setdefault(above, {})[own] = k
        swaps = [{a: b, b: a} for a, b in combinations(range(len(parts)), 2)]
        for one, other in combinations(modules.values(), 2):
            if one.keys() == other.keys() and len(one) > 1:
                pairs = [(one[name], other[name]) for name in one]
                swaps.append({x: y for a, b in pairs for x, y in ((a, b), (b, a))})
        return swaps

    @cached_property
    def numbers(self) -> dict[Cover, int]:
        """The number of each way to assign its layers."""
        return {cover: number for number, cover in enumerate(self.covers)}

    @property
    def has_matrices(self) -> bool:
        """Whether its layers take part in a residual stream as branches: what multiplies more than one axis."""
        return any(len(core(u.main)) >= 2 for u in self.target)

    def decisions_of(self, cover: Cover) -> list[int]:
        """Its own decisions that say more of one way to assign its layers."""
        keys = [self.key(pair) for pair in cover if len(pair[0]) + len(pair[1]) > 2]
        found = [d for key in keys for d in (self.order[key], self.heads.get(key)) if d is not None]
        return [*found, *(d for d in (self.turn, self.layout) if d is not None)]

    @property
    def decisions(self) -> list[int]:
        """Its own decisions, which goes where first."""
        more = (d for d in (self.turn, self.layout) if d is not None)
        return [self.which, *self.order.values(), *self.heads.values(), *more]


def with_dissolved(outside: Region, lonely: Sequence[Region], other: Region) -> Region:
    """The layers outside of all regions, with those of regions that have no counterpart.

    Copies stand on top of each other where the other side has a stack of as many.
    """
    units = list(outside.units)
    for region in lonely:
        stacks = {(len(region.copies), *shape) for unit in region.units if unit.times == 1 for shape in unit.shapes}
        stacks |= {(n, *shape[:-2], *shape[:-3:-1]) for n, *shape in stacks}  # turned
        units += dissolved(region, any(shape in stacks for unit in other.units for shape in unit.shapes))
    return Region(outside.copies, tuple(units))


def taken_apart(units: Sequence[Unit], others: Sequence[Unit]) -> tuple[Unit, ...]:
    """Layers, those of nested copies one by one where the other side has neither such copies nor a stack of them."""
    tensors = [one for other in others for one in single(other)]

    def has_like(unit: Unit) -> bool:
        return any(fits(one, other) is not None for one in single(unit) for other in tensors)

    return tuple(one for unit in units for one in ([unit] if unit.times == 1 or has_like(unit) else apart(unit)))


def groups_of(source: Sequence[Unit], target: Sequence[Unit]) -> list[tuple[list[Unit], list[Unit]]]:
    """Layers that may take one another's place; tensor by tensor where whole layers find no partner."""
    found = components(source, target)
    known = {id(unit) for s, t in found for unit in (*s, *t)}
    rest = [[one for unit in side if id(unit) not in known for one in single(unit)] for side in (source, target)]
    return [*found, *components(rest[0], rest[1])]
