"""What a whole pair of models tells about its parts: the dictionary, how far order can be trusted, and orientation."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, pairwise

from lit_wsl.mapper.names import Dictionary
from lit_wsl.mapper.roles import RoleMemory

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
