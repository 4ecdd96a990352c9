"""What it costs to pair two items or two families by structure and shapes alone, names left aside.

The costs are those of the operations that would be needed (:func:`lit_wsl.mapper.shapes.operation_cost`), so they add
up with what names and order say when a class is assigned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from lit_wsl.mapper.families import Family
from lit_wsl.mapper.shapes import TRANSPOSED, operation_cost
from lit_wsl.mapper.tree import Item

OTHER_INSIDE = 0.2  # modules of one size that hold other shapes

Forbidden = Callable[[str, str], bool]


class PairCosts:
    """Costs of pairs in one pair of models.

    Args:
        forbidden: Whether two paths must not match.
        turned: Whether the pair stores its matrices the other way round.
    """

    def __init__(self, forbidden: Forbidden, turned: bool) -> None:
        self.forbidden = forbidden
        self.turned = turned

    def of(self, s: Item, t: Item) -> float | None:
        """Cost of pairing two items by structure and shapes; ``None`` where they can't correspond."""
        if self.forbidden(s.path, t.path):
            return None
        if s.level == t.level == 0:
            return operation_cost(s.shape, t.shape, transposed=self.turned)
        if s.structure == t.structure:
            return 0.0
        if s.profile == t.profile and max(s.level, t.level) == 2:
            same = Counter(i.shape for i in s.tensors) == Counter(i.shape for i in t.tensors)
            return 0.0 if same or self.turned else TRANSPOSED
        if max(s.level, t.level) == 2:
            return OTHER_INSIDE
        return self._of_units(s, t)

    def _of_units(self, s: Item, t: Item) -> float | None:
        """Cost of pairing two units tensor by tensor, the largest with the largest."""
        if len(s.tensors) != len(t.tensors):
            return None
        by_size = [sorted(i.tensors, key=lambda x: (-x.numel, x.start)) for i in (s, t)]
        costs = [operation_cost(a.shape, b.shape, transposed=self.turned) for a, b in zip(*by_size)]
        known = [c for c in costs if c is not None]
        return max(known) if len(known) == len(costs) else None

    def of_families(self, f: Family, g: Family) -> float | None:
        """Mean cost over the members paired by number; ``None`` if any can't correspond."""
        if len(f.members) != len(g.members) or self.forbidden(f.members[0].path, g.members[0].path):
            return None
        known: dict[tuple[int, int], float | None] = {}
        total = 0.0
        for a, b in zip(f.members, g.members):
            key = (a.structure, b.structure)
            if key not in known:
                known[key] = self.of(a, b)
            cost = known[key]
            if cost is None:
                return None
            total += cost
        return total / len(f.members)
