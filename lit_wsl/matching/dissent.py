"""What speaks against a pair that fits: numbers, letters of a formula, order, names that mean something else.

A kind of evidence that is nearly always right is wrong where something contradicts it. None of these decides for a
pair; any of them leaves it open.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import combinations

from rapidfuzz.distance import Levenshtein

from lit_wsl.matching.formula import spelled
from lit_wsl.matching.likeness import (
    ENDS,
    KINDS,
    LAYER_WORDS,
    LAYERS,
    NEAR_WORDS,
    SIDES,
    liken,
    own_name,
    own_words,
    strength,
)
from lit_wsl.matching.numbers import counted_apart, counted_down
from lit_wsl.matching.order import AMONG_MANY, AMONG_TWO
from lit_wsl.matching.regions import Learned, Pair, Region, Tie, makes_of
from lit_wsl.matching.tree import Family, Item, layer_kind, owner_path, place_in, telling_words
from lit_wsl.matching.words import best_pairs_similarity, plain_words

STRONG = "much structure"
OTHER_NUMBER = "they are the only ones that fit, but their numbers say that they are not the same"
OTHER_DIRECTION = "the sizes of their lists say that one is counted the other way round"
OTHER_LENGTH = (
    "they have one length, but their blocks stand elsewhere too, where the lists may have become longer or shorter"
)
OTHER_LETTER = "one is named after the queries, keys or values of an attention, the other after another of these"
OTHER_VALUES = "one is named after a function of the other, so its values are different"
RENAMED_ALONE = "everything beside them kept its name, and only theirs mean different things: it may be a new part"
NEIGHBOUR = "what their names have in common names the modules beside them, or any layer: that decides nothing alone"
OUT_OF_ORDER = "little speaks for it, and they stand in another order than what is decided around them"
COUNTED_OTHERWISE = "numbered in one order and registered in another"
TOWERS = (
    "whole networks of the same structure, named differently on the two sides; order alone does not show which is which"
)
AGAINST_NAMES = "their order says one thing and their names another"
FUNCTIONS = ("log", "exp", "inv", "sqrt", "neg")
KEPT = 3  # so many siblings of the same name, and none of another, show that names were kept


def against(p: Pair, region: Region, agree: str, *, certain: bool, weak: bool) -> str:
    """What speaks against a pair; empty if nothing does.

    Args:
        p: The pair.
        region: Where it stands.
        agree: Whether it stands in the order of the others (:meth:`Rows.agree`), if the source has one.
        certain: Whether it is the only one that fits where everything must find a partner.
        weak: Whether so little speaks for it that order may overrule it.
    """
    units = max(p.source.level, p.target.level) < 2
    if units and letters_apart(p.source, p.target, region):
        return OTHER_LETTER
    if units and _is_function(p.source, p.target):
        return OTHER_VALUES
    if not (region.complete and certain) and counted_apart(p.source, p.target, region):
        return OTHER_NUMBER
    if counted_down(p.source, p.target, region):
        return OTHER_DIRECTION
    if not region.complete and p.cell.startswith(STRONG) and _repeats_elsewhere(p, region):
        return OTHER_LENGTH
    cell = p.cell.removeprefix("open ")
    if cell.startswith(NEAR_WORDS) or (cell.startswith(LAYER_WORDS) and agree not in ("in order", "in line")):
        return NEIGHBOUR
    return OUT_OF_ORDER if weak and agree == "against order" else ""


def other_head(s: Item, t: Item, heads: Container[int]) -> bool:
    """Whether two units stand at the end of their models and are named after different things.

    Args:
        s: A unit of the source.
        t: A unit of the target.
        heads: Ordinals of the target's matrices at its ends.
    """
    if t.start not in heads or max(s.level, t.level) == 2 or s.path == t.path:
        return False
    if any(part.isdigit() for i in (s, t) for part in owner_path(i.main.path).split(".")):
        return False
    letters = [set(own_name(i)) if len(own_name(i)) > 1 else set() for i in (s, t)]  # alone it may be anything
    apart = [{w for w in own_words(i) - ENDS if len(w) > 1 or w in ls} for i, ls in zip((s, t), letters)]
    return all(apart) and not any(strength(a, b)[0] >= 0.6 for a in apart[0] for b in apart[1])


def _repeats_elsewhere(p: Pair, region: Region) -> bool:
    """Whether two modules are made of blocks that stand elsewhere, too, and one side has more of them."""
    if p.source.level < 2 or p.target.level < 2:
        return False
    ours, theirs = region.makes
    inside = makes_of(p.source)
    return any(count > 1 and ours[make] > count and ours[make] != theirs[make] for make, count in inside.items())


def renamed_alone(p: Pair, region: Region, learned: Learned) -> bool:
    """Whether all siblings kept their very names and only this unit's mean different things on the two sides."""
    if max(p.source.level, p.target.level) == 2:
        return False
    siblings = learned.renames.beside(region, p.source, p.target)
    if len(siblings) < KEPT or any(ours != theirs for ours, theirs in siblings):
        return False
    if set(own_name(p.source)) <= set(own_name(p.target, 2)) or set(own_name(p.target)) <= set(own_name(p.source, 2)):
        return False  # one is wrapped
    return _mean_otherwise(own_name(p.source), own_name(p.target))


def _mean_otherwise(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether both names hold words that tell something, and that the other one lacks."""
    likeness, general = liken(ours, theirs), (ENDS - {"cls"}) | KINDS | LAYERS
    return all(any(len(w) > 1 and w not in general for w in left) for left in (likeness.left_s, likeness.left_t))


def _is_function(s: Item, t: Item) -> bool:
    """Whether one name is the other with a function in front: ``log_sigma`` and ``sigma``."""
    short, long = sorted(("".join(own_name(i)) for i in (s, t)), key=len)
    return any(long == f + short for f in FUNCTIONS)


# letters ------------------------------------------------------------------------------------------------------------


def letters_apart(s: Item, t: Item, region: Region) -> bool:
    """Whether two units are named after different ones of the queries, keys, values and the output of an attention."""
    ours, theirs = region.letters_of(s, 0), region.letters_of(t, 1)
    if (ours ^ theirs) & region.shared_letters:
        return True
    names = spelled(own_name(s)), spelled(own_name(t))
    if names[0] & names[1]:
        return ours != theirs  # a value beside queries, and one beside a gate
    return all(names)


# order --------------------------------------------------------------------------------------------------------------

TOWER = 6  # tensors of a network that stands beside others: exchanged, it would be lost as a whole
CLEARLY = 0.2  # of 2: by so much more must two names say that they are exchanged


def against_order(tie: Tie, region: Region, cell: str) -> str:
    """What speaks against pairing a tie in the order in which its families stand; empty if nothing does."""
    if _names_dissent(tie.sources, tie.targets, region):
        return AGAINST_NAMES
    single = [
        (f.members[0], g.members[0]) for f, g in zip(tie.sources, tie.targets) if len(f.members) == 1 == len(g.members)
    ]
    alone = len(single) == len(tie.sources) and not cell.startswith((AMONG_MANY, AMONG_TWO))
    if alone and any(_are_towers(s, t) for s, t in single):
        return TOWERS
    return COUNTED_OTHERWISE if any(counted_apart(s, t, region) for s, t in single) else ""


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
