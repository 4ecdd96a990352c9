"""What a whole pair of models tells about its parts: orientation, and which words stand for which."""

from __future__ import annotations

from dataclasses import dataclass, field

from lit_wsl.matching.decision import Roles
from lit_wsl.matching.words import Dictionary

ORDER_WEIGHT = 0.25


@dataclass
class Evidence:
    """Gathered in one pass over the models, used in the next.

    Attributes:
        dictionary: Words of the source for words of the target.
        exact_matrices: Matched non-square matrices of the same shape.
        turned_matrices: Matched matrices that only fit transposed.
    """

    dictionary: Dictionary = field(default_factory=Dictionary)
    exact_matrices: int = 0
    turned_matrices: int = 0
    agreement: dict[tuple[int, int], float] = field(default_factory=dict)
    roles: Roles = field(default_factory=Roles)
