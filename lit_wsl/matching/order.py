"""Order as evidence: the place of undecided siblings among the decided ones of the same module.

Whether a level was reordered is one hidden fact. What counts is how many decided siblings stand among the undecided
ones alike on both sides, and whether the other levels of the two models kept their order; nothing here may dissent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lit_wsl.matching.regions import Pair, Tie, ascending
from lit_wsl.matching.tree import Item

ORDER = "order"
AMONG_MANY, AMONG_TWO, BESIDE_ONE = "order among many", "order among two", "order beside one"
ORDER_OF_KIND, ORDER_ALONE = "order of a kind", "order alone"
MANY = 4  # by chance one in 24 orders is the reverse of another
AS_ELSEWHERE, AS_OFTEN, AS_SOMEWHERE = "as elsewhere", "as often elsewhere", "as somewhere else"
UNLIKE_ELSEWHERE = "unlike elsewhere"
NEEDED = {ORDER_ALONE: (AS_ELSEWHERE, AS_OFTEN), BESIDE_ONE: (AS_ELSEWHERE, AS_OFTEN)}  # of other regions of this level


def order_cell(certain: Sequence[Pair], tie: Tie, others: Sequence[Tie], elsewhere: str) -> str | None:
    """The cell of a tie that goes by order; ``None`` if a decided sibling, here or elsewhere, dissents.

    Args:
        certain: Decided siblings.
        tie: The tie.
        others: All ties of the region, in which order is followed alike.
        elsewhere: Whether other regions kept their order (:func:`kept_elsewhere`).
    """
    kind = _kind(certain, tie, others)
    if kind is None or elsewhere == UNLIKE_ELSEWHERE:
        return None
    if elsewhere not in NEEDED.get(kind, (elsewhere,)):
        return None  # blocks and what holds them are reordered apart, so other levels say nothing of this one
    return f"{kind}, {elsewhere}" if elsewhere else kind


def _kind(certain: Sequence[Pair], tie: Tie, others: Sequence[Tie]) -> str | None:
    mine = [(f.start, g.start) for f, g in zip(tie.sources, tie.targets)]
    decided = [(p.source.start, p.target.start) for p in certain]
    more = [o for o in others if o is not tie]
    tied = [(f.start, g.start) for o in more for f, g in zip(o.sources, o.targets)]
    if not ascending(sorted([*decided, *tied, *mine])):
        return _order_of_a_kind(certain, tie)
    siblings = min(
        len({_beside(p.source, [f.members[0] for f in tie.sources]) for p in certain}),
        len({_beside(p.target, [g.members[0] for g in tie.targets]) for p in certain}),
    )
    if siblings == 1 and _mirrors(decided, mine):
        return ORDER_ALONE
    return (ORDER_ALONE, BESIDE_ONE, AMONG_TWO)[siblings] if siblings < 3 else AMONG_MANY


def _mirrors(decided: Sequence[tuple[int, int]], mine: Sequence[tuple[int, int]]) -> bool:
    """Whether the decided siblings would stand alike too if one side had everything the other way round."""
    turned = [(s, t) for (s, _), (_, t) in zip(mine, reversed(mine))]
    return ascending(sorted((s, -t) for s, t in [*decided, *turned]))


def _beside(item: Item, tied: Sequence[Item]) -> str:
    """The module that an item stands in, as seen from where the tied items part: modules move as a whole."""
    return ".".join(item.path.split(".")[: parting([i.path for i in tied]) + 1])


def parting(paths: Sequence[str]) -> int:
    """How many modules lead to the place where paths part."""
    around = [path.split(".")[:-1] for path in paths]
    return next((k for k, names in enumerate(zip(*around)) if len(set(names)) > 1), min(map(len, around)))


def _order_of_a_kind(certain: Sequence[Pair], tie: Tie) -> str | None:
    """The cell of vectors that one side registers apart from its matrices, which themselves follow one order."""
    matrices = sorted((p.source.start, p.target.start) for p in certain if p.source.rank >= 2)
    mine = [(f.start, g.start) for f, g in zip(tie.sources, tie.targets)]
    alike = [(p.source.start, p.target.start) for p in certain if min(p.source.rank, 2) == tie.rank]
    if not ascending(sorted([*alike, *mine])):
        return None
    if tie.rank < 2 and not ascending(matrices):
        return None  # what they stand before was registered in another order
    if tie.rank >= 2 or not matrices:
        return ORDER_ALONE
    apart = any(
        max(v[k] for v in mine) < min(m[k] for m in matrices) or min(v[k] for v in mine) > max(m[k] for m in matrices)
        for k in (0, 1)
    )
    return ORDER_OF_KIND if apart and len(matrices) >= 3 else ORDER_ALONE


def agreement(certain: Sequence[Pair]) -> int:
    """How many decided siblings of a region stand in one order on both sides; -1 if they don't."""
    places = [(p.source.start, p.target.start, p.source.rank < 2) for p in certain]
    if ascending(sorted((s, t) for s, t, _ in places)):
        return len(places)
    apart = [sorted((s, t) for s, t, vector in places if vector == kind) for kind in (True, False)]
    return 0 if all(map(ascending, apart)) else -1


def is_mirrored(certain: Sequence[Pair]) -> bool:
    """Whether all matrices that are decided in a region, and these are many, stand the other way round on one side."""
    places = sorted((p.source.start, -p.target.start) for p in certain if p.source.rank >= 2)
    return len(places) >= MANY and ascending(places)


@dataclass(frozen=True)
class Kept:
    """Whether a region kept its order, as far as its decided siblings show it.

    Attributes:
        level: How deep it stands in the block of a list, -1 outside; blocks, what is in them, and what holds them are
            reordered apart.
        siblings: How many decided siblings agree; -1 if they don't.
    """

    level: int
    siblings: int


def kept_elsewhere(here: int, others: Iterable[Kept]) -> str:
    """Whether other regions kept their order, those of this level before the others.

    Args:
        here: The level of this region.
        others: The other regions.
    """
    told: dict[bool, list[int]] = {True: [], False: []}
    for other in others:
        same = (other.level < 0) == (here < 0)
        if other.siblings >= 0 or other.level == here or not same:  # what is inside may be reordered alone
            told[same].append(other.siblings)
    kind = next((k for k in (True, False) if min(told[k], default=0) < 0 or max(told[k], default=0) >= 2), None)
    if kind is None:
        return ""
    if min(told[kind]) < 0:
        return UNLIKE_ELSEWHERE
    if not kind:
        return "as on other levels"
    by_chance = math.prod(math.factorial(min(n, 10)) for n in told[kind])
    if by_chance >= 100:  # in one of so many orders all of it would agree
        return AS_ELSEWHERE
    return AS_OFTEN if by_chance >= math.factorial(MANY) else AS_SOMEWHERE
