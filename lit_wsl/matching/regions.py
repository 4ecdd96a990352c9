"""Where items are compared, what is known there, and what a decision says.

A *region* is a pair of modules that correspond. Its decisions are pairs, ties (families that fit together in an order
that nothing tells) and, from the pass before, the partners of other blocks and the units that kept their names.

The order of its decided siblings is evidence for the others. Whether a level was reordered is one hidden fact: so much
of a region must agree that it can't be chance, and nothing may dissent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from lit_wsl.matching.likeness import foreign, own_name
from lit_wsl.matching.tree import Family, Item, families_of, owner_path, place_in, relative
from lit_wsl.matching.words import count_alike, numbers_along, path_tokens, split_numbers
from lit_wsl.structure.description import Shape

BLOCK = 64  # tensors; larger regions teach nothing about their like


@dataclass(frozen=True)
class Sides:
    """What is known of the two sides as wholes.

    Attributes:
        ties: How many names each tied source tensor has.
        ordered: Whether the source has an order of registration.
        execution: When the target runs each of its tensors, by ordinal.
        twins: Ordinals of source tensors, and of the target's tensors of the same path and shape.
        heads: Ordinals of the target's matrices at its ends (:func:`ends_of`).
    """

    ties: Mapping[str, int] = field(default_factory=dict)
    ordered: bool = True
    execution: tuple[int | None, ...] = ()
    heads: frozenset[int] = frozenset()
    twins: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Region:
    """Where items are compared: below ``source`` and ``target``.

    Attributes:
        source: Root of the source's side.
        target: Root of the target's side.
        complete: Whether both sides have the same number of elements, so that everything must find a partner.
        shapes: How many tensors of each shape (up to order and ones) the whole models have, source and target.
    """

    source: Item
    target: Item
    complete: bool
    shapes: tuple[Counter[Shape], Counter[Shape]] | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Equal for regions of the same structure, which are solved once."""
        return self.source.structure, self.target.structure

    @cached_property
    def _counters(self) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        return numbers_along(self.names[0]), numbers_along(self.names[1])

    def same_numbers(self, path: str) -> bool:
        """Whether every number along a path counts the same things on both sides."""
        return count_alike(path, self._counters)

    def like_numbers(self, path: str) -> bool:
        """Whether the numbers along a path are those of the other side, or among them: nothing is counted from one."""
        return count_alike(path, self._counters, within=True)

    @cached_property
    def names(self) -> tuple[list[str], list[str]]:
        """The paths of all tensors below, source and target."""
        return tuple([relative(t, root) for t in root.tensors] for root in (self.source, self.target))  # type: ignore

    @cached_property
    def words(self) -> tuple[Counter[str], Counter[str]]:
        """How many tensors have each word in their path, source and target."""
        return _word_counts(self.source), _word_counts(self.target)


def _word_counts(root: Item) -> Counter[str]:
    return Counter(w for t in root.tensors for w in set(path_tokens(relative(t, root))) if not w.isdigit())


@dataclass(frozen=True)
class Pair:
    """A decided pair: what belongs together, and by which kind of evidence."""

    source: Item
    target: Item
    cell: str
    margin: float = 1.0
    first: bool = True  # of its family: the others follow from it, so they don't vote


@dataclass(frozen=True)
class Tie:
    """Families of both sides that belong together in an order that neither paths nor words tell; equally many."""

    sources: tuple[Family, ...]
    targets: tuple[Family, ...]
    reason: str = "same shapes, and neither names nor order decide between them"

    @classmethod
    def of(cls, s: Item, t: Item, region: Region, reason: str) -> Tie:
        """Two items that belong together or to nothing."""
        return cls(tuple(families_of([s], region.source)), tuple(families_of([t], region.target)), reason)

    @property
    def rank(self) -> int:
        """Whether it is about matrices or vectors."""
        return min(self.sources[0].members[0].rank, 2)


@dataclass
class Decision:
    """What a class decided; members in none of the lists stay open for other steps."""

    pairs: list[Pair] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    closed: list[Item] = field(default_factory=list)


class Roles:
    """Partners by their places in blocks of one list, where they were certain.

    In the first block of a stage ``conv3`` and ``downsample`` may have one shape, so nothing there tells which is
    which; in the next block there is no ``downsample``, and ``conv3`` is certain.
    """

    def __init__(self) -> None:
        self._regions: dict[tuple[int, int], tuple[Region, set[tuple[str, str]]]] = {}

    def teach(self, region: Region, s: Item, t: Item) -> None:
        """Remember a certain pair."""
        if max(len(region.source.tensors), len(region.target.tensors)) <= BLOCK:
            places = (place_in(s, region.source), place_in(t, region.target))
            self._regions.setdefault(region.key, (region, set()))[1].add(places)

    def partners(self, region: Region, s: Item, t: Item) -> bool:
        """Whether two places were partners in other blocks of this make, and neither had another partner."""
        a, b = place_in(s, region.source), place_in(t, region.target)
        known = {
            pair
            for key, (other, pairs) in self._regions.items()
            if key != region.key and _same_make(region, other)
            for pair in pairs
            if a == pair[0] or b == pair[1]
        }
        return known == {(a, b)}


def _same_make(a: Region, b: Region) -> bool:
    """Whether both stand in the same lists, and one's tensors are, in order, among the other's on both sides."""
    lists = [(split_numbers(r.source.path)[0], split_numbers(r.target.path)[0]) for r in (a, b)]
    return lists[0] == lists[1] and all(
        _within(x, y) or _within(y, x) for x, y in ((a.names[0], b.names[0]), (a.names[1], b.names[1]))
    )


def _within(a: Sequence[str], b: Sequence[str]) -> bool:
    rest = iter(b)
    return all(name in rest for name in a)


class Renames:
    """How many units have another name on the other side, and how many the very same, by the names without numbers."""

    def __init__(self) -> None:
        self._names: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()

    def teach(self, s: Item, t: Item) -> None:
        """Remember a pair."""
        names = own_name(s), own_name(t)
        if all(names):
            self._names.add(names)

    def others(self, s: Item, t: Item) -> tuple[int, int]:
        """How many other units were renamed, and how many kept their names."""
        names = own_name(s), own_name(t)
        renamed = Counter(a != b for a, b in self._names if (a, b) != names)
        return renamed[True], renamed[False]


def other_name(s: Item, t: Item, region: Region) -> str:
    """Whether the names of two units have nothing in common: their own names, or all below the region."""
    if not foreign(own_name(s), own_name(t)):
        return ""
    if not foreign(own_name(s, 2), own_name(t)) or not foreign(own_name(s), own_name(t, 2)):
        return ""  # one is wrapped: query.base_layer and query
    whole = [
        tuple(w for w in path_tokens(owner_path(relative(i.main, r))) if not w.isdigit())
        for i, r in ((s, region.source), (t, region.target))
    ]
    return "other name" if foreign(whole[0], whole[1]) else "other own name"


ORDER, ORDER_BACKED, ORDER_OF_KIND, ORDER_ALONE = "order", "order, as elsewhere", "order of a kind", "order alone"
SURE, SOME = 12, 6  # in one of so many orders as much would agree by chance


def order_cell(certain: Sequence[Pair], tie: Tie, others: Sequence[Tie], elsewhere: float) -> str | None:
    """The cell of a tie that goes by order; ``None`` if a decided sibling dissents.

    What counts is in one of how many orders of the siblings as much would agree by chance: if decided and tied siblings
    alternate alike on both sides, it is not chance.

    Args:
        certain: Decided siblings.
        tie: The tie.
        others: All ties of the region, in which order is followed alike.
        elsewhere: The same of the best other region; -1 if any of them dissents.
    """
    mine = [(f.start, g.start) for f, g in zip(tie.sources, tie.targets)]
    decided = [(p.source.start, p.target.start) for p in certain]
    more = [o for o in others if o is not tie]
    tied = [(f.start, g.start) for o in more for f, g in zip(o.sources, o.targets)]
    row = sorted([*decided, *tied, *mine])
    if not _ascending(row):
        return _order_of_a_kind(certain, tie, elsewhere)
    siblings = min(
        len({_beside(p.source, [f.members[0] for f in tie.sources]) for p in certain}),
        len({_beside(p.target, [g.members[0] for g in tie.targets]) for p in certain}),
    )
    chance = math.exp(min(math.lgamma(siblings + len(mine) + 1) - math.lgamma(len(mine) + 1), 20)) + 1e-6
    if chance >= (SURE if elsewhere > 0 else 2 * SURE):
        return ORDER
    if chance >= SOME / 2 and chance * elsewhere >= 5 * SURE:
        return ORDER_BACKED
    return ORDER_ALONE


def _beside(item: Item, tied: Sequence[Item]) -> str:
    """The module that an item stands in, as seen from where the tied items part: modules move as a whole."""
    around = [i.path.split(".")[:-1] for i in tied]
    depth = next((k for k, names in enumerate(zip(*around)) if len(set(names)) > 1), min(map(len, around)))
    return ".".join(item.path.split(".")[: depth + 1])


def _order_of_a_kind(certain: Sequence[Pair], tie: Tie, elsewhere: float) -> str | None:
    """The cell of vectors that one side registers apart from its matrices, which themselves follow one order."""
    matrices = sorted((p.source.start, p.target.start) for p in certain if p.source.rank >= 2)
    mine = [(f.start, g.start) for f, g in zip(tie.sources, tie.targets)]
    if not _ascending(
        sorted([*((p.source.start, p.target.start) for p in certain if min(p.source.rank, 2) == tie.rank), *mine])
    ):
        return None
    if tie.rank >= 2 or not _ascending(matrices) or not matrices:
        return ORDER_ALONE
    apart = any(
        max(v[k] for v in mine) < min(m[k] for m in matrices) or min(v[k] for v in mine) > max(m[k] for m in matrices)
        for k in (0, 1)
    )
    chance = math.factorial(min(len(matrices), 10))
    if apart and elsewhere > 0 and chance >= SOME and chance * elsewhere >= SURE:
        return ORDER_OF_KIND
    return ORDER_ALONE


def _ascending(row: Sequence[tuple[int, int]]) -> bool:
    return all(a[1] < b[1] for a, b in pairwise(row))


def agreement(certain: Sequence[Pair]) -> float:
    """In one of how many orders the decided siblings of a region would agree by chance; -1 if they don't agree."""
    places = [(p.source.start, p.target.start, p.source.rank < 2) for p in certain]
    if _ascending(sorted((s, t) for s, t, _ in places)):
        return math.exp(min(math.lgamma(len(certain) + 1), 20))
    apart = [sorted((s, t) for s, t, vector in places if vector == kind) for kind in (True, False)]
    return 1.0 if all(map(_ascending, apart)) else -1.0
