"""What one pass over two models teaches the next: partners in other blocks, renames, order and numbers.

The first pass decides what is certain; the second asks it for the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from lit_wsl.matching.likeness import own_name
from lit_wsl.matching.regions import BLOCK, Region, around, member_of
from lit_wsl.matching.tree import Item, place_in
from lit_wsl.matching.words import counted, split_numbers

Names = tuple[tuple[str, ...], tuple[str, ...]]
FEW = 2  # units of the same name say nothing yet of the two models


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
            places = _in_member(s, region.source), _in_member(t, region.target)
            self._regions.setdefault(region.key, (region, set()))[1].add(places)

    def elsewhere(self, region: Region) -> set[tuple[str, str]]:
        """The partners in other blocks of this make."""
        rows = (row for key, row in self._regions.items() if key != region.key)
        return {pair for other, pairs in rows if _same_make(region, other) for pair in pairs}


def are_partners(known: Iterable[tuple[str, str]], region: Region, s: Item, t: Item) -> bool:
    """Whether two places, or modules around them, are among known partners, and nothing else is with either."""
    a, b = around(_in_member(s, region.source)), around(_in_member(t, region.target))
    found = [pair for pair in known if pair[0] in a or pair[1] in b]
    return bool(found) and all(one in a and other in b for one, other in found)


def _same_make(a: Region, b: Region) -> bool:
    """Whether both stand in the same lists, and one's tensors are, in order, among the other's on both sides."""
    sides = (a.source, b.source), (a.target, b.target)
    members = [[member_of(root.path) for root in side] for side in sides]
    if any(split_numbers(one)[0] != split_numbers(other)[0] for (one, _), (other, _) in members):
        return False
    names = [[_names_from(root, rest) for root, (_, rest) in zip(*both)] for both in zip(sides, members)]
    return all(_within(x, y) or _within(y, x) for x, y in names)


def _names_from(root: Item, around: str) -> tuple[str, ...]:
    return tuple(f"{around}.{name}" for name in root.names) if around else root.names


def _in_member(item: Item, root: Item) -> str:
    """Where an item stands, as seen from the member of a list that it stands in."""
    around, place = member_of(root.path)[1], place_in(item, root)
    return f"{around}.{place}" if around else place


def _within(a: Sequence[str], b: Sequence[str]) -> bool:
    rest = iter(b)
    return all(name in rest for name in a)


class Renames:
    """Which units and modules have another name on the other side, by the names without numbers."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], set[Names]] = {}

    def teach(self, region: Region, s: Item, t: Item) -> None:
        """Remember a pair."""
        names = own_name(s), own_name(t)
        if all(names):
            self._names.setdefault(region.key, set()).add(names)

    def others(self, s: Item, t: Item) -> tuple[int, int]:
        """How many others were renamed anywhere, and how many kept their names."""
        return self.beyond({(own_name(s), own_name(t))})

    def beyond(self, names: Container[Names]) -> tuple[int, int]:
        """The same, of all but some names."""
        return _counted(self._names.values(), names)

    def all_but(self, s: Item, t: Item) -> set[Names]:
        """The names of all other pairs."""
        return set().union(*self._names.values()) - {(own_name(s), own_name(t))}

    def are_all(self, s: Item, t: Item) -> bool:
        """Whether everything else has another name on the other side, so that another name of a head is no wonder."""
        renamed, kept = self.others(s, t)
        return renamed > FEW and not kept

    def beside(self, region: Region, s: Item, t: Item) -> set[Names]:
        """The names of the pairs that stand in the same module."""
        return self._names.get(region.key, set()) - {(own_name(s), own_name(t))}

    def siblings(self, region: Region, s: Item, t: Item) -> tuple[int, int]:
        """The same, of what stands in the same module."""
        return _counted([self.beside(region, s, t)], {(own_name(s), own_name(t))})


def _counted(known: Iterable[set[Names]], names: Container[Names]) -> tuple[int, int]:
    renamed = Counter(a != b for a, b in set().union(*known) if (a, b) not in names)
    return renamed[True], renamed[False]


class Rows:
    """The order of decided pairs, by region: whether another pair stands among them alike on both sides."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, bool], set[tuple[int, int]]] = {}

    def teach(self, region: Region, s: Item, t: Item, *, named: bool) -> None:
        """Remember a decided pair, and whether names decided it."""
        for kind in {named, False}:
            self._rows.setdefault((*region.key, kind), set()).add(_place(region, s, t))

    def allow(self, region: Region, s: Sequence[Item], t: Sequence[Item]) -> bool:
        """Whether items of both sides could be paired in the order in which they stand among what is decided."""
        pairs = zip(sorted(s, key=lambda i: i.start), sorted(t, key=lambda i: i.start))
        mine = {_place(region, a, b) for a, b in pairs}
        return ascending(sorted(self._rows.get((*region.key, False), set()) | mine))

    def agree(self, region: Region, s: Item, t: Item) -> str:
        """Whether a pair stands among others alike; empty if they are too few.

        Those that names decided come first: ``in order``, ``against order``, or ``reordered`` if they don't agree among
        themselves; of all that are decided it is ``in line`` or ``out of line``.
        """
        if not self._rows:
            return ""
        mine = _place(region, s, t)
        for named, words in ((True, ("in order", "against order")), (False, ("in line", "out of line"))):
            others = sorted(self._rows.get((*region.key, named), set()) - {mine})
            if len(others) >= 2:
                if not ascending(others):
                    return "reordered"
                return words[0] if ascending(sorted([*others, mine])) else words[1]
        return ""


class Renumbered:
    """Lists whose members have other numbers on the two sides, as those show that more than a number tells apart."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], dict[tuple[str, str], set[tuple[int, int]]]] = {}

    def teach(self, s: Item, t: Item) -> None:
        """Remember the numbers of a pair that was not told by them."""
        if (ours := _counted_once(s.path)) and (theirs := _counted_once(t.path)):
            lists = self._found.setdefault((ours[0], theirs[0]), {})
            lists.setdefault((ours[1], theirs[1]), set()).add((ours[2], theirs[2]))

    def deny(self, s: Sequence[Item], t: Sequence[Item]) -> bool:
        """Whether nothing but numbers tells members apart, and lists of this length beside theirs were renumbered."""
        if not self._found or not 1 < len(s) == len(t) or len({i.profile_key for i in (*s, *t)}) > 1:
            return False
        along = [[_counted_once(i.path) for i in side] for side in (s, t)]
        if not all(map(all, along)):
            return False
        (around, ours, _), (beside, theirs, _) = (side[0] or ("", "", 0) for side in along)
        return any(
            names != (ours, theirs) and 1 < len(other) <= len(s) and not ascending(sorted(other))
            for names, other in self._found.get((around, beside), {}).items()
        )


@lru_cache(maxsize=100_000)
def _counted_once(path: str) -> tuple[str, str, int] | None:
    """Where the only list stands along a path in which something is counted, the path without its number, and that."""
    along = counted(path)
    if len(along) != 1 or along[0][0].count("#") != 1:
        return None
    ((place, number),) = along
    inside = path.split(".")[place.count(".") + 1 :]
    return place.removesuffix(".#").rpartition(".")[0], ".".join((place, *inside)), int(number)


def _place(region: Region, s: Item, t: Item) -> tuple[int, int]:
    return s.start - region.source.start, t.start - region.target.start


def ascending(row: Sequence[tuple[int, int]]) -> bool:
    """Whether pairs of places, sorted by the first, are sorted by the second too."""
    return all(a[1] < b[1] for a, b in pairwise(row))


@dataclass
class Learned:
    """What a pass over the models tells the next: partners in other blocks, renames, order of what names paired."""

    roles: Roles = field(default_factory=Roles)
    renames: Renames = field(default_factory=Renames)
    rows: Rows = field(default_factory=Rows)
    renumbered: Renumbered = field(default_factory=Renumbered)
    mirrored: set[tuple[int, int]] = field(default_factory=set)  # keys of regions that stand the other way round
