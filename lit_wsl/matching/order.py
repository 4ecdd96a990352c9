"""Order as evidence: the place of undecided siblings among the decided ones of the same module.

Whether a level was reordered is one hidden fact. So much of a region must agree that it can't be chance, and nothing
may dissent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from lit_wsl.matching.regions import Pair, Tie
from lit_wsl.matching.tree import Item

ORDER, ORDER_BACKED, ORDER_OF_KIND, ORDER_ALONE = "order", "order, as elsewhere", "order of a kind", "order alone"
SURE, SOME = 12, 6  # in one of so many orders as much would agree by chance


def order_cell(certain: Sequence[Pair], tie: Tie, others: Sequence[Tie], elsewhere: float) -> str | None:
    """The cell of a tie that goes by order; ``None`` if a decided sibling dissents.

    What counts is in one of how many orders of the siblings as much would agree by chance: if decided and tied siblings
    alternate alike on both sides, it is not chance.

    Args:
        certain: Decided siblings.
        tie: The tie.
        others: All ties of the region, in which order is followed alike.
        elsewhere: The same of the best other region; -1 if any of them dissents.
    """
    mine = [(f.start, g.start) for f, g in zip(tie.sources, tie.targets)]
    decided = [(p.source.start, p.target.start) for p in certain]
    more = [o for o in others if o is not tie]
    tied = [(f.start, g.start) for o in more for f, g in zip(o.sources, o.targets)]
    row = sorted([*decided, *tied, *mine])
    if not _ascending(row):
        return _order_of_a_kind(certain, tie, elsewhere)
    siblings = min(
        len({_beside(p.source, [f.members[0] for f in tie.sources]) for p in certain}),
        len({_beside(p.target, [g.members[0] for g in tie.targets]) for p in certain}),
    )
    chance = math.exp(min(math.lgamma(siblings + len(mine) + 1) - math.lgamma(len(mine) + 1), 20)) + 1e-6
    if chance >= (SURE if elsewhere > 0 else 2 * SURE):
        return ORDER
    if chance >= SOME / 2 and chance * elsewhere >= 5 * SURE:
        return ORDER_BACKED
    return ORDER_ALONE


def _beside(item: Item, tied: Sequence[Item]) -> str:
    """The module that an item stands in, as seen from where the tied items part: modules move as a whole."""
    around = [i.path.split(".")[:-1] for i in tied]
    depth = next((k for k, names in enumerate(zip(*around)) if len(set(names)) > 1), min(map(len, around)))
    return ".".join(item.path.split(".")[: depth + 1])


def _order_of_a_kind(certain: Sequence[Pair], tie: Tie, elsewhere: float) -> str | None:
    """The cell of vectors that one side registers apart from its matrices, which themselves follow one order."""
    matrices = sorted((p.source.start, p.target.start) for p in certain if p.source.rank >= 2)
    mine = [(f.start, g.start) for f, g in zip(tie.sources, tie.targets)]
    if not _ascending(
        sorted([*((p.source.start, p.target.start) for p in certain if min(p.source.rank, 2) == tie.rank), *mine])
    ):
        return None
    if tie.rank >= 2 or not _ascending(matrices) or not matrices:
        return ORDER_ALONE
    apart = any(
        max(v[k] for v in mine) < min(m[k] for m in matrices) or min(v[k] for v in mine) > max(m[k] for m in matrices)
        for k in (0, 1)
    )
    chance = math.factorial(min(len(matrices), 10))
    if apart and elsewhere > 0 and chance >= SOME and chance * elsewhere >= SURE:
        return ORDER_OF_KIND
    return ORDER_ALONE


def _ascending(row: Sequence[tuple[int, int]]) -> bool:
    return all(a[1] < b[1] for a, b in pairwise(row))


def agreement(certain: Sequence[Pair]) -> float:
    """In one of how many orders the decided siblings of a region would agree by chance; -1 if they don't agree."""
    places = [(p.source.start, p.target.start, p.source.rank < 2) for p in certain]
    if _ascending(sorted((s, t) for s, t, _ in places)):
        return math.exp(min(math.lgamma(len(certain) + 1), 20))
    apart = [sorted((s, t) for s, t, vector in places if vector == kind) for kind in (True, False)]
    return 1.0 if all(map(_ascending, apart)) else -1.0
