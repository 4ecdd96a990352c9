"""What a whole pair of models tells about its parts: the dictionary, how far order can be trusted, and orientation."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from lit_wsl.mapper.names import Dictionary


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

    @property
    def trust(self) -> float:
        """Trust in order, 0 to 1: 1 where all votes agree (or none were cast), 0 for a shuffle."""
        share = (self.same + 1) / (self.total + 1)
        return min(1.0, max(0.0, (share - 0.5) * 2))


@dataclass
class Evidence:
    """Gathered in one pass over the models, used in the next.

    Attributes:
        dictionary: Words of the source for words of the target.
        order: Votes on the trustworthiness of order.
        exact_matrices: Matched non-square matrices of the same shape.
        turned_matrices: Matched matrices that only fit transposed.
        roles: Paths inside a source region -> paths inside the target region that were certain partners.
        anchors: Places of certain matrices, (source, target).
        first: Whether nothing has been learned yet, so that only strong evidence counts.
    """

    dictionary: Dictionary = field(default_factory=Dictionary)
    order: OrderVotes = field(default_factory=OrderVotes)
    exact_matrices: int = 0
    turned_matrices: int = 0
    roles: dict[str, Counter[str]] = field(default_factory=dict)
    roles_back: dict[str, Counter[str]] = field(default_factory=dict)
    anchors: list[tuple[int, int]] = field(default_factory=list)
    first: bool = False

    def teach_role(self, source: str, target: str) -> None:
        """Remember that two paths inside corresponding regions were certain partners."""
        self.roles.setdefault(source, Counter())[target] += 1
        self.roles_back.setdefault(target, Counter())[source] += 1

    def role(self, source: str, target: str) -> float | None:
        """Share of the times the two were partners where either was certain; ``None`` if neither ever was."""
        there, back = self.roles.get(source), self.roles_back.get(target)
        if not there and not back:
            return None
        shares = [c[key] / c.total() for c, key in ((there, target), (back, source)) if c]
        return min(shares)

    @cached_property
    def _anchor_places(self) -> tuple[list[int], list[int]]:
        return sorted(s for s, _ in self.anchors), sorted(t for _, t in self.anchors)

    def misplaced(self, s: int, t: int, region_s: tuple[int, int], region_t: tuple[int, int]) -> float:
        """How differently two places lie among the certain matrices of their regions: 0 alike, 1 at opposite ends."""
        places_s, places_t = self._anchor_places
        low_s, high_s = (bisect_left(places_s, p) for p in region_s)
        low_t, high_t = (bisect_left(places_t, p) for p in region_t)
        count = min(high_s - low_s, high_t - low_t)
        if count < 1:
            return 0.0
        return min(1.0, abs((bisect_left(places_s, s) - low_s) - (bisect_left(places_t, t) - low_t)) / count)
