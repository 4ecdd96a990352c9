"""Order as evidence: the place of undecided siblings among the decided ones of the same module; what speaks against it.

Whether a level was reordered is one hidden fact. What counts is how many decided siblings stand among the undecided
ones alike on both sides, and whether the other levels of the two models kept their order.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from rapidfuzz.distance import Levenshtein

from lit_wsl.matching.dissent import are_front_and_end
from lit_wsl.matching.learned import Renames, ascending
from lit_wsl.matching.likeness import (
    ATTENTIONS,
    BACK,
    FEEDS,
    FRONT,
    NOTHING,
    SIDES,
    liken,
    own_name,
)
from lit_wsl.matching.numbers import BEHIND, counted_apart, told_otherwise
from lit_wsl.matching.regions import Pair, Region, Tie
from lit_wsl.matching.replaced import KEPT, TOWER, mean_otherwise
from lit_wsl.matching.tree import (
    Family,
    Item,
    layer_kind,
    place_in,
    relative,
    shape_key,
    telling_words,
)
from lit_wsl.matching.words import best_pairs_similarity, counted, plain_words

ORDER = "order"
AMONG_MANY, AMONG_TWO, BESIDE_ONE = "order among many", "order among two", "order beside one"
ORDER_ALONE = "order alone"
MANY = 4  # by chance one in 24 orders is the reverse of another
AS_ELSEWHERE, AS_OFTEN, AS_SOMEWHERE = "as elsewhere", "as often elsewhere", "as somewhere else"
UNLIKE_ELSEWHERE = "unlike elsewhere"
NEEDED = {ORDER_ALONE: (AS_ELSEWHERE, AS_OFTEN), BESIDE_ONE: (AS_ELSEWHERE, AS_OFTEN)}  # of other regions of this level
PART_WORDS = {**dict.fromkeys(ATTENTIONS, "attention"), **dict.fromkeys((*FEEDS, "forward"), "feed")}
COUNTED_OTHERWISE = "numbered in one order and registered in another"
TOWERS = (
    "whole networks of the same structure, named differently on the two sides; order alone does not show which is which"
)
NAMESAKES_MOVED = "by order each would become what stands under the name of the next one"
AGAINST_NAMES = "their order says one thing and their names another"
LISTS_CUT = "one list became several that names tell apart: which member went into which can't be told from a number"
MOVED = "norms stand before the blocks here and behind them there: each may be that of the neighbouring block"
TWINS_RENAMED = "everything beside them kept its name, and only theirs are new: their order may be new as well"
CLEARLY = 0.2  # of 2: by so much more must two names say that they are exchanged


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
        return ORDER_ALONE if _is_ordered_apart(certain, tie) else None
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


def _is_ordered_apart(certain: Sequence[Pair], tie: Tie) -> bool:
    """Whether a tie follows the order of its kind: of matrices, or of vectors where the matrices are in order too."""
    matrices = sorted((p.source.start, p.target.start) for p in certain if p.source.rank >= 2)
    mine = [(f.start, g.start) for f, g in zip(tie.sources, tie.targets)]
    alike = [(p.source.start, p.target.start) for p in certain if min(p.source.rank, 2) == tie.rank]
    return ascending(sorted([*alike, *mine])) and (tie.rank >= 2 or ascending(matrices))


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


def against_order(tie: Tie, region: Region, cell: str, renames: Renames) -> str:
    """What speaks against pairing a tie in the order in which its families stand; empty if nothing does."""
    if _names_dissent(tie.sources, tie.targets, region):
        return AGAINST_NAMES
    if _moves_namesakes(tie, region):
        return NAMESAKES_MOVED
    if _counted_backwards(tie.sources, tie.targets) or _counted_backwards(tie.targets, tie.sources):
        return COUNTED_OTHERWISE
    if _stand_otherwise(tie) or told_otherwise(tie.sources) or told_otherwise(tie.targets):
        return COUNTED_OTHERWISE
    if _follow_otherwise(tie.sources, region.source) or _follow_otherwise(tie.targets, region.target):
        return COUNTED_OTHERWISE
    if _leaves_formula(tie.sources, 0, tie.targets, region) or _leaves_formula(tie.targets, 1, tie.sources, region):
        return COUNTED_OTHERWISE
    if (
        _joins_blocks(tie, region)
        or _is_list_cut(tie.sources, tie.targets, region)
        or _is_list_cut(tie.targets, tie.sources, region)
    ):
        return LISTS_CUT
    if _are_twins_renamed(tie, renames):
        return TWINS_RENAMED
    single = [
        (f.members[0], g.members[0]) for f, g in zip(tie.sources, tie.targets) if len(f.members) == 1 == len(g.members)
    ]
    counted = all(len({f.pattern for f in side}) == 1 for side in (tie.sources, tie.targets))
    told = counted or (cell.startswith(AMONG_MANY) and cell.endswith(f", {AS_ELSEWHERE}"))
    if len(single) == len(tie.sources) and not told and any(_are_towers(s, t) for s, t in single):
        return TOWERS
    return COUNTED_OTHERWISE if any(counted_apart(s, t, region) for s, t in single) else ""


def _moves_namesakes(tie: Tie, region: Region) -> bool:
    """Whether order would give something away that stands under its very path on the other side: counted on by one."""
    places = [
        [relative(m, root) for f in side for m in f.members]
        for side, root in ((tie.sources, region.source), (tie.targets, region.target))
    ]
    lists = [root.path.rpartition(".")[2] for root in (region.source, region.target)]
    if lists[0] != lists[1] and any(place.partition(".")[0].isdigit() for side in places for place in side):
        return False
    there = set(places[1])
    return any(a != b and a in there for a, b in zip(*places))


def _counted_backwards(families: Sequence[Family], others: Sequence[Family]) -> bool:
    """Whether what is counted under one name, ``norm`` and ``norm2``, is not registered in that order.

    Blocks may be counted down on both sides: a decoder begins with the deepest level.
    """
    orders = [(numbers, sorted(numbers)) for numbers in _counts(families)]
    counted = any(len(numbers) > 1 for numbers in _counts(others))
    blocks = families[0].members[0].level == 2 and counted
    return any(numbers != up and not (blocks and numbers == up[::-1]) for numbers, up in orders)


def _stand_otherwise(tie: Tie) -> bool:
    """Whether families of several lengths, ``w1, w2`` and ``v1``, stand between one another in two ways."""
    if len({len(f.members) for f in tie.sources}) == 1:
        return False
    rows = (
        sorted((m.start, k, n) for k, f in enumerate(side) for n, m in enumerate(f.members))
        for side in (tie.sources, tie.targets)
    )
    ours, theirs = ([(k, n) for _, k, n in row] for row in rows)
    return ours != theirs


def _follow_otherwise(side: Sequence[Family], root: Item) -> bool:
    """Whether norms are called after parts of their block, and not registered in the order of these parts."""
    if any(len(f.members) > 1 or f.members[0].rank > 1 or f.members[0].level == 2 for f in side):
        return False
    norms = [_part_words(f.words) for f in sorted(side, key=lambda f: f.start)]
    parts: dict[frozenset[str], int] = {}
    for unit in root.units:
        if unit.rank > 1:
            parts.setdefault(_part_words(plain_words(relative(unit.main, root).partition(".")[0])), unit.start)
    found = [parts[words] for words in norms if words in parts]
    return found != sorted(found)


def _part_words(words: Iterable[str]) -> frozenset[str]:
    """What a part of a block is, by the words that name it or its norm."""
    return frozenset(PART_WORDS.get(w, w) for w in words if w not in NOTHING and "norm" not in w and w != "self")


def _leaves_formula(named: Sequence[Family], side: int, counted_only: Sequence[Family], region: Region) -> bool:
    """Whether the parts of an attention are not registered as in its formula, and stand in a list of their own there.

    Its numbers may follow either.
    """
    letters = [region.letters_of(f.members[0], side) for f in sorted(named, key=lambda f: f.start)]
    places = ["qkvo".index("".join(found)) for found in letters if len(found) == 1]
    if len(places) < len(named) or places == sorted(places):
        return False
    root = (region.source, region.target)[1 - side]
    lists = {counted(relative(f.members[0].main, root))[-1:] for f in counted_only}
    return all(lists) and all(len(root.lists[place]) == len(named) for found in lists for place, _ in found)


def _counts(families: Sequence[Family]) -> list[list[tuple[int, ...]]]:
    """The numbers under each name, in the order of registration."""
    counts = defaultdict(list)
    for f in sorted(families, key=lambda f: f.start):
        counts[tuple(w for w in f.pattern if w != "#")].append(f.numbers[0])
    return list(counts.values())


def _is_list_cut(whole: Sequence[Family], parts: Sequence[Family], region: Region) -> bool:
    """Whether the members of one list stand in several on the other side: one after another, or by turns."""
    if min(f.members[0].level for f in (*whole, *parts)) < 2 and _is_nearly_all(whole[0].members[0], region):
        return False
    lists = [{f.pattern for f in side} for side in (whole, parts)]
    return len(lists[0]) == 1 < len(lists[1]) and min(Counter(f.pattern for f in parts).values()) > 1


def _joins_blocks(tie: Tie, region: Region) -> bool:
    """Whether order would fill one block of a list from two, or two from one."""
    pairs = {
        (region.block_of(a, 0), region.block_of(b, 1))
        for f, g in zip(tie.sources, tie.targets)
        for a, b in zip(f.members, g.members)
    }
    return all(map(all, pairs)) and any(len(set(side)) < len(pairs) for side in zip(*pairs))


def _is_nearly_all(layer: Item, region: Region) -> bool:
    """Whether a layer stands in a flat list of nearly all that there is."""
    for root, lists in zip((region.source, region.target), region.lists):
        place = counted(relative(layer, root))[-1:]
        if place and 4 * len(lists.get(place[0][0], ())) > 3 * len(root.units):
            return True
    return False


def _are_twins_renamed(tie: Tie, renames: Renames) -> bool:
    """Whether nothing else was renamed anywhere, and the matrices tied here have names with nothing in common."""
    if tie.rank < 2:
        return False
    ours, theirs = ([own_name(f.members[0]) for f in side] for side in (tie.sources, tie.targets))
    if not all((*ours, *theirs)) or not all(mean_otherwise(a, b) for a in ours for b in theirs):
        return False
    renamed, kept = renames.beyond({(a, b) for a in ours for b in theirs})
    return kept >= KEPT and not renamed


def _are_towers(s: Item, t: Item) -> bool:
    """Whether two modules are whole networks that are called otherwise on the two sides."""
    return min(len(s.tensors), len(t.tensors)) >= TOWER and not liken(own_name(s), own_name(t)).shared


def _names_dissent(sources: Sequence[Family], targets: Sequence[Family], region: Region) -> bool:
    """Whether the names of two pairs that stand in one order say that they are exchanged.

    Names that are too unlike to decide may be like enough to contradict: ``reset`` and ``update`` stand before ``r``
    and ``z``, ``word2char`` and ``char2word`` before ``char_to_word`` and ``word_to_char``.
    """
    words = [[_with_kinds(ws) for ws in telling_words(side)] for side in (sources, targets)]
    if any(SIDES & set(ws) for side in words for ws in side):
        return False  # post_attention_norm is not the attention's norm
    if any(words[0]) and any(words[1]):
        like = [[best_pairs_similarity(a, b) if a and b else 0.0 for b in words[1]] for a in words[0]]
    else:  # the same words on both sides of each, in another order
        names = [
            [" ".join(plain_words(place_in(f.members[0], root))) for f in side]
            for side, root in ((sources, region.source), (targets, region.target))
        ]
        if any(len(set(side)) < len(side) for side in names):
            return False
        like = [[Levenshtein.normalized_similarity(a, b) for b in names[1]] for a in names[0]]
    return any(
        like[i][j] + like[j][i] > like[i][i] + like[j][j] + CLEARLY for i, j in combinations(range(len(sources)), 2)
    )


def _with_kinds(words: Sequence[str]) -> list[str]:
    """Words without numbers; what a norm calls its scale and its shift in one word each."""
    return [layer_kind(w) if len(w) > 1 and layer_kind(w) else w for w in words if not w.isdigit()]


def is_moved(p: Pair, moved: Mapping[object, bool]) -> bool:
    """Whether two norms may not be the same, as some stand elsewhere (:func:`moved_norms`)."""
    shape = shape_key(p.source.main.shape)
    if p.source.rank >= 2 or p.source.level == 2 or shape not in moved:
        return False
    return moved[shape] or not (_is_in_block(p.source) or _is_in_block(p.target))


def moved_norms(source: Item, target: Item, ordered: bool) -> dict[object, bool]:
    """Shapes of norms that stand before all blocks here and behind them there; whether blocks may hold them as well.

    ``stem_norm, blocks.#.(fc, norm)`` is ``blocks.#.(norm, fc), final_norm``: what stood behind a block stands at the
    beginning of the next one. Of a source without an order the norms outside of the blocks are told by their names.
    """
    roots = source, target
    sides = [_norms(root) for root in roots]
    found: dict[object, bool] = {}
    for shape in sides[0].keys() & sides[1].keys():
        (front_s, back_s), (front_t, back_t) = places = [_outside(side[shape]) for side in sides]
        if not (front_s or back_s) or bool(front_t) == bool(back_t) or (ordered and bool(front_s) == bool(back_s)):
            continue
        outside = [(a, b) for a in (*front_s, *back_s) for b in (*front_t, *back_t)]
        if any(a.path == b.path or liken(own_name(a, 2), own_name(b, 2)).shared >= 1.0 for a, b in outside):
            continue  # it is registered elsewhere
        front, back = front_t + front_s * ordered, back_t + back_s * ordered
        if _are_called(front, BACK) or _are_called(back, FRONT):
            continue  # the order of registration says nothing
        told = bool(front_s) != bool(front_t) if ordered else any(are_front_and_end(*pair) for pair in outside)
        rows = list(zip(roots, sides, places))[not ordered :]
        if told:
            found[shape] = all(_begin_blocks(root, side[shape]) == bool(back) for root, side, (_, back) in rows)
    return found


def _norms(root: Item) -> dict[object, list[Item]]:
    """The norms of a model by shape."""
    found: dict[object, list[Item]] = defaultdict(list)
    for unit in root.units:
        if unit.level == 1 and unit.rank < 2:
            found[shape_key(unit.main.shape)].append(unit)
    return found


def _are_called(norms: Sequence[Item], words: frozenset[str]) -> bool:
    return any(not words.isdisjoint(own_name(unit, 2)) for unit in norms)


def _is_in_block(unit: Item) -> bool:
    return any(c.isdigit() for c in unit.path.rpartition(".")[0])


def _outside(norms: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """The norms before and behind all blocks that hold some."""
    starts = [unit.start for unit in norms if _is_in_block(unit)]
    outside = [unit for unit in norms if starts and not _is_in_block(unit)]
    return [u for u in outside if u.start < min(starts)], [u for u in outside if u.start > max(starts)]


def _begin_blocks(root: Item, norms: Sequence[Item]) -> bool:
    """Whether one of some norms stands before all matrices of its block."""
    first: dict[str, int] = {}
    for unit in root.units:
        home = unit.path if unit.rank >= 2 else ""
        while home := home.rpartition(".")[0]:
            first[home] = min(first.get(home, unit.start), unit.start)
    homes = ((unit, unit.path.rpartition(".")[0]) for unit in norms if _is_in_block(unit))
    return any(u.start < first.get(home, u.start) and not BEHIND & {*own_name(u)} for u, home in homes)
