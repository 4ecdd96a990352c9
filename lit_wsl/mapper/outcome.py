"""What an alignment gives: matches and doubts, region by region.

Regions of one structure are solved once and share an outcome, so an outcome of thousands of layers is small until
:meth:`Outcome.flat` writes out every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from lit_wsl.mapper.tree import Item
from lit_wsl.transfer.operations import Operation


@dataclass(frozen=True)
class Match:
    """Source tensors become target tensors; positions are ordinals of the two sides."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    operations: tuple[Operation, ...]
    margin: float
    reason: str


@dataclass(frozen=True)
class Doubt:
    """Targets whose sources nothing decides between."""

    targets: tuple[int, ...]
    sources: tuple[int, ...]
    reason: str


@dataclass
class Outcome:
    """What a region gave: its own matches, and the outcomes of the regions inside it.

    Regions of one structure share an outcome, which stands at the ordinals of the first of them; ``inside`` holds by
    how much the others are shifted, and the margin of the pair that led to them. ``pairs`` are the region's own items.
    """

    matches: list[Match] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    inside: list[tuple[Outcome, int, int, float]] = field(default_factory=list)
    pairs: list[tuple[Item, Item]] = field(default_factory=list)

    @cached_property
    def size(self) -> int:
        """Number of targets that are matched; call it when the outcome is complete."""
        return sum(len(m.targets) for m in self.matches) + sum(o.size for o, *_ in self.inside)

    def flat(self) -> tuple[list[Match], list[Doubt]]:
        """All matches and doubts at their own ordinals."""
        matches: list[Match] = []
        doubts: list[Doubt] = []
        stack = [(self, 0, 0, 1.0)]
        while stack:
            outcome, ds, dt, cap = stack.pop()
            for m in outcome.matches:
                sources, targets = tuple(p + ds for p in m.sources), tuple(p + dt for p in m.targets)
                matches.append(Match(sources, targets, m.operations, min(m.margin, cap), m.reason))
            for d in outcome.doubts:
                doubts.append(Doubt(tuple(p + dt for p in d.targets), tuple(p + ds for p in d.sources), d.reason))
            stack += [(o, ds + s, dt + t, min(cap, margin)) for o, s, t, margin in outcome.inside]
        return matches, doubts

    def distinct(self) -> Iterator[tuple[Outcome, float]]:
        """This outcome and all inside it, each once, with the best margin of the pairs that lead to it."""
        best: dict[int, float] = {id(self): 1.0}
        outcomes: dict[int, Outcome] = {id(self): self}
        stack = [self]
        while stack:
            outcome = stack.pop()
            for inner, _, _, margin in outcome.inside:
                cap = min(best[id(outcome)], margin)
                if cap > best.get(id(inner), -1.0):
                    best[id(inner)] = cap
                    outcomes[id(inner)] = inner
                    stack.append(inner)
        for key, outcome in outcomes.items():
            yield outcome, best[key]
