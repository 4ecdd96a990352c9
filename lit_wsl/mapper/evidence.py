"""What a whole pair of models tells about its parts: the dictionary, how far order can be trusted, and orientation."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """

    dictionary: Dictionary = field(default_factory=Dictionary)
    order: OrderVotes = field(default_factory=OrderVotes)
    exact_matrices: int = 0
    turned_matrices: int = 0
