"""What speaks against a pair that fits: numbers, letters of a formula, order, names that mean something else.

A kind of evidence that is nearly always right is wrong where something contradicts it. None of these decides for a
pair; any of them leaves it open.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations, pairwise

from lit_wsl.matching.formula import spelled
from lit_wsl.matching.likeness import (
    BACK,
    FORMULA,
    FRONT,
    GENERAL,
    HALF_WORDS,
    INITIALS,
    LETTERS,
    NEAR_WORDS,
    SHORT_WORDS,
    SIDES,
    WORDS,
    contrast,
    liken,
    own_name,
)
from lit_wsl.matching.numbers import BEHIND, counted_apart, counted_down, place_by
from lit_wsl.matching.regions import FEED, Pair, Region, makes_of, other_name
from lit_wsl.matching.replaced import TOWER, are_of_one_role, is_listed
from lit_wsl.matching.tree import (
    ROLES,
    Item,
    place_in,
    relative,
    role_of,
)
from lit_wsl.matching.words import counted, plain_words

STRONG = "much structure"
OTHER_NUMBER = "they are the only ones that fit, but their numbers say that they are not the same"
OTHER_DIRECTION = "the sizes of their lists say that one is counted the other way round"
OTHER_LENGTH = (
    "they have one length, but their blocks stand elsewhere too, where the lists may have become longer or shorter"
)
OTHER_LETTER = "one is named after the queries, keys or values of an attention, the other after another of these"
OTHER_OUTPUT = "one is the output of an attention, and of the other's siblings another may be it"
NETWORK_LETTER = "one letter of the names of two whole networks agrees, which may stand for anything"
OPPOSITE = "their names differ in words that distinguish neighbouring modules of other models"
NAMESAKE = "another module beside them has the name of one of the two in another size: it may have been resized"
OTHER_TWIN = "of twins that letters tell apart on both sides, each has the letter of the other"
OTHER_TOWER = (
    "each stands in a part of its model that also holds what the other's part has not: it stands elsewhere there"
)
LEFT_HOME = (
    "what one of them stands in is still there without it, and their names have nothing in common: it may be a new part"
)
NAMED_ELSEWHERE = "another part of the other model, where it fits too, is called like what one of them stands in"
LEFT_BLOCK = "one of them stands in a block, its attention or its feed-forward, and the other does not"
OTHER_MAKE = "one is a layer's weight and the other a tensor of its own, and their names have nothing in common"
OTHER_VALUES = "one is named after a function of the other, so its values are different"
NEIGHBOUR = "what their names have in common names the modules beside them: that decides nothing alone"
OUT_OF_ORDER = "little speaks for it, and they stand in another order than what is decided around them"
NAMELESS_ORDER = "nothing around them is decided, their names have nothing in common, and order alone does not decide"
FUNCTIONS = ("log", "exp", "inv", "sqrt", "neg")
TWINS = frozenset("abxy")  # letters at the end of a name that tell twins apart


def against(p: Pair, region: Region, agree: str, *, certain: bool, weak: bool) -> str:
    """What speaks against a pair; empty if nothing does.

    Args:
        p: The pair.
        region: Where it stands.
        agree: Whether it stands in the order of the others (:meth:`Rows.agree`), if the source has one.
        certain: Whether it is the only one that fits where everything must find a partner.
        weak: Whether so little speaks for it that order may overrule it.
    """
    pair = p.source, p.target
    if pair not in region.dissent:
        region.dissent[pair] = _by_names(*pair, region)
    if region.dissent[pair]:
        return region.dissent[pair]
    sure = region.complete and certain and agree not in ("against order", "out of line", "reordered")
    if not sure and counted_apart(p.source, p.target, region):
        return OTHER_NUMBER
    taken = p.cell.startswith(("open ", STRONG)) and _is_number_taken(p.source, p.target, region)
    if taken or _leaves_row(p.source, p.target, region):
        return OTHER_NUMBER
    if counted_down(p.source, p.target, region):
        return OTHER_DIRECTION
    if certain and _fits_where_it_is_named(p.source, p.target, region):
        return NAMED_ELSEWHERE
    if not region.complete and p.cell.startswith(STRONG):
        if agree in ("against order", "out of line"):
            return OUT_OF_ORDER
        if _repeats_elsewhere(p, region):
            return OTHER_LENGTH
    cell = p.cell.removeprefix("open ")
    weakly = cell.startswith((SHORT_WORDS, HALF_WORDS))
    left = (weakly or cell.startswith(WORDS)) and _leaves_block(p.source, p.target, region)
    if left or (weakly and region.leaves_part(p.source, p.target)):
        return LEFT_BLOCK
    if cell.startswith(LETTERS) and not cell.startswith(INITIALS) and min(len(p.source.units), len(p.target.units)) > 2:
        return NETWORK_LETTER
    if cell.startswith(NEAR_WORDS):
        return NEIGHBOUR
    return OUT_OF_ORDER if weak and agree == "against order" else ""


def _by_names(s: Item, t: Item, region: Region) -> str:
    """What names and the places in the two models say against a pair, whatever else is decided."""
    if letters_apart(s, t, region):
        return OTHER_LETTER
    if region.is_one_of_outputs(s, t):
        return OTHER_OUTPUT
    if are_front_and_end(s, t) or are_opposite(s, t, region) or _stand_at_other_parts(s, t):
        return OPPOSITE
    if lettered_apart(s, t, region):
        return OTHER_TWIN
    if _has_namesake(s, t, region):
        return NAMESAKE
    if _stand_in_other_towers(s, t, region):
        return OTHER_TOWER
    if _left_home(s, t, region):
        return LEFT_HOME
    if _are_lists_exchanged(s, t, region):
        return OTHER_NUMBER
    if _is_of_other_make(s, t, region):
        return OTHER_MAKE
    if max(s.level, t.level) < 2 and _is_function(s, t):
        return OTHER_VALUES
    return ""


def are_opposite(s: Item, t: Item, region: Region) -> bool:
    """Whether two items, or what they stand in, are called after things that stand beside each other elsewhere."""
    places = [plain_words(place_in(i, r)) for i, r in ((s, region.source), (t, region.target))]
    if region.whole:  # a file that is all text is no model of vision
        places = [(*plain_words(r.path), *place) for r, place in zip((region.source, region.target), places)]
    ours, theirs = own_name(s), own_name(t)
    return _are_opposite(ours, theirs) or _are_opposite(*places) or _are_turned_round(ours, theirs)


def _stand_at_other_parts(s: Item, t: Item) -> bool:
    """Whether one layer is called after the attention of a block and the other after its feed-forward."""
    if max(s.level, t.level) == 2:
        return False
    places = [-1 if BEHIND & {*own_name(i)} else place_by({*own_name(i)}) for i in (s, t)]
    return min(places) >= 0 and places[0] != places[1]


def _are_turned_round(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether two names spell the same parts in two orders: ``scale_shift``, ``shift_scale``."""
    if ours == theirs or sorted(ours) != sorted(theirs):
        return False
    moved = {a for a, b in zip(ours, theirs) if a != b}
    return any(contrast((a,), (b,)) for a, b in combinations(sorted(moved), 2))


def _is_number_taken(s: Item, t: Item, region: Region) -> bool:
    """Whether both are counted in one place, and something else of the one's name has the number of the other."""
    paths = [relative(i, r) for i, r in ((s, region.source), (t, region.target))]
    (places, ours), (others, theirs) = ((tuple(zip(*counted(path))) or ((), ())) for path in paths)
    if places != others or ours == theirs:
        return False
    taken = _renumber(paths[1], ours), _renumber(paths[0], theirs)
    return any(f"{name}.".startswith(f"{path}.") for path, names in zip(taken, region.names[::-1]) for name in names)


def _is_of_another_tower(ours: Item, theirs: Item, whole: Item, region: Region, side: int) -> bool:
    """Whether of two towers that one side has the other one is wanted: it holds what both models have only once.

    Args:
        ours: One of the towers.
        theirs: The only tower of the other side.
        whole: The other side's tower, or all of its model.
        region: Where they are compared.
        side: The side of the two towers.
    """
    rivals = _beside_of_one_make(ours, region, side) if region.whole else []
    if not rivals or _beside_of_one_make(theirs, region, 1 - side):
        return False
    alone = (ours.profile & theirs.profile).total()
    if any(2 * (((ours.profile + r.profile) & theirs.profile).total() - alone) > len(r.tensors) for r in rivals):
        return False  # it holds both
    single = {x.shape for x in whole.tensors if x.rank >= 2 and x.shape in region.single_shapes}
    single -= {x.shape for x in ours.tensors}
    return bool(single) and any(single <= {x.shape for x in rival.tensors} for rival in rivals)


def _beside_of_one_make(tower: Item, region: Region, side: int) -> list[Item]:
    """Modules beside one that hold about what it holds."""
    around = region.homes[side].get(id(tower))
    beside = [i for i in around.children if i is not tower and i.level == 2] if around else []
    return [i for i in beside if 2 * (i.profile & tower.profile).total() >= len(tower.tensors)]


def _fits_where_it_is_named(s: Item, t: Item, region: Region) -> bool:
    """Whether a part of the other side is called like what one of two stands in, and holds matrices of its shapes.

    What tells one of two parts from the other may have moved: a norm, an adapter, the layer between two stages.
    """
    first = [relative(i, root).partition(".")[0] for i, root in ((s, region.source), (t, region.target))]
    if not all(first) or first[0] == first[1] or max(s.rank, t.rank) < 2:
        return False
    for side, item in enumerate((s, t)):
        shapes = (u.main.shape for u in item.units if u.rank >= 2)
        fits = {part for shape in shapes for part in region.parts_by_shape[1 - side].get(shape, ())} - {first[1 - side]}
        if (
            fits and region.parts_alike[side].get(first[side]) in fits
        ):  # names are compared only where there is a choice
            return True
    return False


def _leaves_row(s: Item, t: Item, region: Region) -> bool:
    """Whether two items of one name have other numbers, where what is counted beside them has the same on both sides.

    Of ``conv1, bn1, conv2, bn2`` and ``bn0, conv1, bn1, conv2`` a norm is new and one is gone.
    """
    rows = [counted(relative(i, root)) for i, root in ((s, region.source), (t, region.target))]
    for (place, ours), (other, theirs) in zip(*rows):
        if place != other or ours == theirs:
            continue
        around = place.rpartition(".")[0]
        beside = [p for p in region.lists[0] if p != place and p.rpartition(".")[0] == around and p in region.lists[1]]
        if any(len(region.lists[0][p]) > 1 and region.lists[0][p].keys() == region.lists[1][p].keys() for p in beside):
            members = [lists.get(place, {}) for lists in region.lists]
            return members[0].keys() != members[1].keys()
    return False


def _leaves_block(s: Item, t: Item, region: Region) -> bool:
    """Whether one of two layers stands in a block of a list and no number leads to the other."""
    counted_s, counted_t = (any(map(str.isdigit, i.path)) for i in (s, t))
    if counted_s == counted_t or max(s.level, t.level) == 2:
        return False
    return bool(region.block_of(s, 0) if counted_s else region.block_of(t, 1))


def _renumber(path: str, numbers: Sequence[str]) -> str:
    rest = iter(numbers)
    return re.sub(r"\d+", lambda found: next(rest, found[0]), path)


def _repeats_elsewhere(p: Pair, region: Region) -> bool:
    """Whether two modules are made of blocks that stand elsewhere, too, and one side has more of them."""
    if p.source.level < 2 or p.target.level < 2:
        return False
    ours, theirs = region.makes
    inside = makes_of(p.source)
    return any(
        count > 1 and max(ours[make], theirs[make]) > count and ours[make] != theirs[make]
        for make, count in inside.items()
    )


def _has_namesake(s: Item, t: Item, region: Region) -> bool:
    """Whether something else beside one of two items is called like the other: then that is it, in another size.

    What they stand in is asked, too, as far as both stand equally deep.
    """
    chains = [_chain(i, homes) for i, homes in zip((s, t), region.homes)]
    for (home_s, ours), (home_t, theirs) in zip(*map(pairwise, chains)):
        whole = ours is s and theirs is t
        if (ours is s) != (theirs is t) and _is_member_beside_like(ours, theirs, s, t):
            return True
        if whole or ours.level == theirs.level == 2:
            alike = region.namesakes(home_s, home_t, same=whole)
            if alike[0].get(id(ours), id(theirs)) != id(theirs) or alike[1].get(id(theirs), id(ours)) != id(ours):
                return True
    return False


def _stand_in_other_towers(s: Item, t: Item, region: Region) -> bool:
    """Whether both stand in large modules of one make that share nothing of what each side has only once.

    Of two encoders one holds the only table of words and the other the only patch projection, whatever they are called.
    """
    chains = [_chain(i, homes)[1:] for i, homes in zip((s, t), region.homes)]
    for ours, theirs in zip(*(chain[:-1] or chain for chain in chains)):
        if any(i.path.rpartition(".")[2].isdigit() for i in (ours, theirs)):
            return False  # what leads from one stage to the next may stand in either
        sizes = len(ours.tensors), len(theirs.tensors)
        if min(sizes) < TOWER:
            return False
        if any(_is_of_another_tower(ours, theirs, x, region, 0) for x in (theirs, region.target)):
            return True
        if any(_is_of_another_tower(theirs, ours, x, region, 1) for x in (ours, region.source)):
            return True
        if 2 * (ours.profile & theirs.profile).total() < max(sizes):
            return False
        single = [{x.shape for x in i.tensors if x.shape in region.single_shapes} for i in (ours, theirs)]
        if all(single) and single[0].isdisjoint(single[1]):
            return True
    return False


def _left_home(s: Item, t: Item, region: Region) -> bool:
    """Whether two matrices of a block have foreign names, and the module around one is on the other side, too."""
    listed = all(any(c.isdigit() for c in i.path) for i in (s, t))
    if not listed or s.rank < 2 or max(s.level, t.level) == 2 or not other_name(s, t, region):
        return False
    places = place_in(s, region.source), place_in(t, region.target)
    homes = [place.rpartition(".")[0] for place in places]
    return any(
        home in region.modules[1 - side] and not place.startswith(f"{home}.") and not home.rpartition(".")[2].isdigit()
        for side, (home, place) in enumerate(zip(homes, places[::-1]))
    )


def _is_member_beside_like(ours: Item, theirs: Item, s: Item, t: Item) -> bool:
    """Whether a whole list on one side is a member of a list on the other side, which has more of its kind."""
    whole, member = (theirs, t) if ours is s else (ours, s)
    names = [i.path.rpartition(".")[2] for i in (ours, theirs)]
    if names[0] != names[1] or names[0].isdigit():
        return False
    inside = [c for c in whole.children if c.level == 2 and relative(c, whole).partition(".")[0].isdigit()]
    return len(inside) > 1 and any(c is member for c in inside)


def _are_lists_exchanged(s: Item, t: Item, region: Region) -> bool:
    """Whether of lists in lists the inner one became the outer one, and its number is not the same.

    ``stages.0.cells.1`` is ``cells.1.units.0``, and of ``stages.0`` and ``cells.0`` neither is in the other.
    """
    ours, theirs = (_lists_along(i, root) for i, root in ((s, region.source), (t, region.target)))
    if len(ours) != len(theirs) or len(ours) < 2:
        return False
    return any(
        i != j and len(region.lists[0].get(a, ())) == len(region.lists[1].get(b, ())) > 1 and number != other
        for i, (name, a, number) in enumerate(ours)
        for j, (called, b, other) in enumerate(theirs)
        if name == called and not name.isdigit()
    )


def _lists_along(item: Item, root: Item) -> list[tuple[str, str, str]]:
    """The lists that an item stands in and those in it: their names, places, and its number, if it stands in them."""
    known = len(counted(relative(item, root)))
    return [
        ((place.rstrip("#.") or root.path).rpartition(".")[2], place, number if k < known else "")
        for k, (place, number) in enumerate(counted(relative(item.main, root)))
    ]


def _chain(item: Item, homes: Mapping[int, Item]) -> list[Item]:
    """An item and all that it stands in, the outermost first."""
    chain = [item]
    while id(chain[-1]) in homes:
        chain.append(homes[id(chain[-1])])
    return chain[::-1]


def _are_opposite(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether two names differ in words that elsewhere tell siblings apart; what stands before or behind is no such."""
    likeness = liken(ours, theirs)
    if SIDES & {*likeness.left_s, *likeness.left_t}:
        return False
    alone = [name[0] for name in (ours, theirs) if len(name) == 1]
    return contrast(likeness.left_s, likeness.left_t, alone)


def are_front_and_end(s: Item, t: Item) -> bool:
    """Whether one of two norms is called after the beginning of a model and the other after its end.

    A matrix may be both: the table of words that is tied to the last layer.
    """
    if max(s.level, t.level) == 2 or s.rank >= 2 or is_listed(s, t):
        return False
    names = [{*own_name(i)} for i in (s, t)]
    places = [(bool(name & FRONT), bool(name & BACK)) for name in names]
    return sorted(places) == [(False, True), (True, False)]


def _is_of_other_make(s: Item, t: Item, region: Region) -> bool:
    """Whether one is the weight of a layer and the other stands alone, where their names have nothing in common."""
    if max(s.level, t.level) == 2 or len({role_of(i.main.path) in ROLES for i in (s, t)}) == 1:
        return False
    if is_listed(s, t):
        return False  # blocks are written by hand here and built of layers there
    return bool(other_name(s, t, region)) and not are_of_one_role(s, t)


def _is_function(s: Item, t: Item) -> bool:
    """Whether one name is the other and a function: ``log_sigma`` and ``sigma``, ``A_log`` and ``A``."""
    short, long = sorted(("".join(own_name(i)) for i in (s, t)), key=len)
    return bool(short) and any(long in (f + short, short + f) for f in FUNCTIONS)


# letters ------------------------------------------------------------------------------------------------------------


def letters_apart(s: Item, t: Item, region: Region) -> bool:
    """Whether two items are named after different ones of the queries, keys, values and the output of an attention."""
    names = spelled(own_name(s)), spelled(own_name(t))
    if min(s.level, t.level) == 2:
        return all(names) and not names[0] & names[1]
    ours, theirs = region.letters_of(s, 0), region.letters_of(t, 1)
    if ours != theirs and (ours ^ theirs) & region.shared_letters:
        return True
    if max(s.level, t.level) < 2 and region.is_value_twice(s, 0) != region.is_value_twice(t, 1):
        return True
    if (ours and region.part_of(t, 1) == FEED) or (theirs and region.part_of(s, 0) == FEED):
        return True
    if max(s.level, t.level) == 2:
        return all(names) and not names[0] & names[1]
    if names[0] & names[1]:
        return names[0] | names[1] == {"v"} and ours != theirs  # a value beside queries, and one beside a gate
    return all(names) or _has_other_letter(ours, t) or _has_other_letter(theirs, s)


def _has_other_letter(letters: frozenset[str], other: Item) -> bool:
    """Whether nothing but a letter tells what another item is beside queries, keys and values: ``wg``."""
    name = [w for w in plain_words(other.called.rpartition(".")[2]) if w not in GENERAL]
    letter = name[0].removeprefix("w") if len(name) == 1 else ""
    return len(letter) == 1 and bool(letters & {*FORMULA}) and letter not in letters


def lettered_apart(s: Item, t: Item, region: Region) -> bool:
    """Whether two items stand in twins of other letters, ``net_a`` and ``net_b``, which both sides have."""
    ours, theirs = (_twins_along(relative(i, root)) for i, root in ((s, region.source), (t, region.target)))
    if not ours or not theirs or not ours.isdisjoint(theirs):
        return False
    return ours | theirs <= _twins_among(region.modules[0]) & _twins_among(region.modules[1])


@lru_cache(maxsize=64)
def _twins_among(modules: frozenset[str]) -> frozenset[str]:
    return frozenset().union(*map(_twins_along, modules))


@lru_cache(maxsize=10_000)
def _twins_along(path: str) -> frozenset[str]:
    """The letters along a path that tell twins apart: ``net_a``, ``net_b``."""
    parts = [plain_words(part) for part in path.split(".")]
    return frozenset(words[-1] for words in parts if len(words) > 1 and words[-1] in TWINS)
