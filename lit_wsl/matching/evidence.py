"""What a whole pair of models tells about its parts: the dictionary, how far order can be trusted, and orientation."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, pairwise

from lit_wsl.matching.words import Dictionary

MAX_TENSORS = 64  # regions larger than a block teach nothing


Make = tuple[tuple[str, ...], tuple[str, ...]]


Key = tuple[int, int]


def make_of(source_names: Sequence[str], target_names: Sequence[str]) -> Make | None:
    """The make of a region: its tensors' last name parts on both sides; ``None`` if it is too large for a block."""
    if max(len(source_names), len(target_names)) > MAX_TENSORS:
        return None
    short = [tuple(".".join(n.split(".")[-3:]) for n in names) for names in (source_names, target_names)]
    return short[0], short[1]


def _within(a: Sequence[str], b: Sequence[str]) -> bool:
    rest = iter(b)
    return all(name in rest for name in a)


def same_make(a: Make, b: Make) -> bool:
    """Whether one region's tensors are, in order, among the other's, on both sides.

    >>> same_make((("conv1", "conv2"), ("a", "b")), (("conv1", "conv2", "down"), ("proj", "a", "b")))
    True
    """
    return all(_within(x, y) or _within(y, x) for x, y in zip(a, b))


class _Table:
    """Who was whose partner, both ways."""

    def __init__(self) -> None:
        self.there: dict[str, Counter[str]] = {}
        self.back: dict[str, Counter[str]] = {}

    def add(self, source: str, target: str) -> None:
        self.there.setdefault(source, Counter())[target] += 1
        self.back.setdefault(target, Counter())[source] += 1

    def merge(self, other: _Table) -> None:
        for mine, theirs in ((self.there, other.there), (self.back, other.back)):
            for name, counter in theirs.items():
                mine.setdefault(name, Counter()).update(counter)

    def verdict(self, source: str, target: str) -> bool | None:
        """``True`` if the two were always partners, ``False`` if never, ``None`` if unknown or now and then."""
        known = [(c, key) for c, key in ((self.there.get(source), target), (self.back.get(target), source)) if c]
        if not known:
            return None
        shares = [c[key] / c.total() for c, key in known]
        if min(shares) == 1.0:
            return True
        return False if max(shares) == 0.0 else None


class RoleMemory:
    """Partners by their paths inside corresponding regions, kept apart by the make of the regions."""

    def __init__(self) -> None:
        self._tables: dict[tuple[Make, Key], tuple[_Table, _Table]] = {}
        self._merged: dict[tuple[Make, Key], tuple[_Table, _Table]] = {}

    def teach(self, make: Make, key: Key, source: str, target: str, source_end: str, target_end: str) -> None:
        """Remember that two places inside a region were partners, by their paths and by the ends of their paths."""
        whole, ends = self._tables.setdefault((make, key), (_Table(), _Table()))
        whole.add(source, target)
        ends.add(source_end, target_end)

    def verdict(self, make: Make, key: Key, source: str, target: str, source_end: str, target_end: str) -> bool | None:
        """Whether two places are partners in all (``True``) or none (``False``) of the other regions of one make.

        A region is no witness for itself. Paths are compared whole first; then by their ends, since a part can stand
        a level deeper in one block than in the next.
        """
        if (make, key) not in self._merged:
            merged = (_Table(), _Table())
            for (other, whose), tables in self._tables.items():
                if whose != key and same_make(make, other):
                    merged[0].merge(tables[0])
                    merged[1].merge(tables[1])
            self._merged[make, key] = merged
        whole, ends = self._merged[make, key]
        by_path = whole.verdict(source, target)
        if by_path is True:
            return True
        by_end = ends.verdict(source_end, target_end)
        return by_end if by_end is not None else by_path


ORDER_WEIGHT = 0.25  # what order counts beside names where it is fully trusted; less than any clear name


ENOUGH = 3  # pairs of certain matrices in a region, for it to judge order by itself


def _trust(same: int, total: int) -> float:
    """Trust in order from votes: 1 where all agree or there are none, 0 from four in ten against."""
    return min(1.0, max(0.0, ((same + 1) / (total + 1) - 0.6) / 0.4))


@dataclass
class OrderVotes:
    """How often two certain matches stand in the same order on both sides."""

    same: int = 0
    total: int = 0

    def add(self, pairs: list[tuple[int, int]]) -> None:
        """Count neighbours among certain pairs of (place in source, place in target)."""
        pairs = sorted(pairs)
        for (_, first), (_, second) in pairwise(pairs):
            self.same += first < second
            self.total += 1


@dataclass
class Evidence:
    """Gathered in one pass over the models, used in the next.

    Attributes:
        dictionary: Words of the source for words of the target.
        order: Votes on the trustworthiness of order.
        exact_matrices: Matched non-square matrices of the same shape.
        turned_matrices: Matched matrices that only fit transposed.
        roles: Partners inside regions of the same make.
        anchors: Places of certain matrices, (source, target).
        first: Whether nothing has been learned yet, so that only strong evidence counts.
    """

    dictionary: Dictionary = field(default_factory=Dictionary)
    order: OrderVotes = field(default_factory=OrderVotes)
    exact_matrices: int = 0
    turned_matrices: int = 0
    roles: RoleMemory = field(default_factory=RoleMemory)
    anchors: list[tuple[int, int]] = field(default_factory=list)
    first: bool = False

    @cached_property
    def _anchor_places(self) -> tuple[list[int], list[int]]:
        known = set(self.anchors)
        return sorted(s for s, _ in known), sorted(t for _, t in known)

    def misplaced(self, s: int, t: int, region_s: tuple[int, int], region_t: tuple[int, int]) -> float:
        """How differently two places lie among the certain matrices of their regions: 0 alike, 1 at opposite ends."""
        places_s, places_t = self._anchor_places
        low_s, high_s = (bisect_left(places_s, p) for p in region_s)
        low_t, high_t = (bisect_left(places_t, p) for p in region_t)
        count = min(high_s - low_s, high_t - low_t)
        if count < 1:
            return 0.0
        return min(1.0, abs((bisect_left(places_s, s) - low_s) - (bisect_left(places_t, t) - low_t)) / count)

    def trust(self, region_s: tuple[int, int], region_t: tuple[int, int]) -> float:
        """Trust in order inside a region: from its own certain matrices if they are enough, else also from all."""
        low, high = (bisect_left(self._sorted_anchors, (p, -1)) for p in region_s)
        inside = [t for _, t in self._sorted_anchors[low:high] if region_t[0] <= t < region_t[1]]
        pairs = list(combinations(inside, 2)) if len(inside) <= 16 else list(pairwise(inside))
        same = sum(a < b for a, b in pairs)
        if len(pairs) >= ENOUGH:
            return _trust(same, len(pairs))
        return _trust(same + self.order.same, len(pairs) + self.order.total)

    @cached_property
    def _sorted_anchors(self) -> list[tuple[int, int]]:
        return sorted(set(self.anchors))
