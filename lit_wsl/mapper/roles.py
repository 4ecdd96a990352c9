"""Roles: what one block is certain of, the other blocks of its make may use.

In the first block of a stage ``conv1`` and ``downsample`` may have one shape, so nothing there tells which is which;
in the next block there is no ``downsample``, and ``conv1`` is certain. Blocks are of one make if the tensors of one
are, in order, among those of the other, on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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
