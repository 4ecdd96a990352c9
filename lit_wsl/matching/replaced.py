"""What may be another part, and no renamed one: other heads, parts that alone are called after something else.

What fits is nearly always the same part under another name, unless everything around it was kept or understood.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

from lit_wsl.matching.learned import Learned, Renames
from lit_wsl.matching.likeness import (
    BLOCKS,
    CALLED,
    ENDS,
    FORMULA,
    LISTS,
    NOTHING,
    SIDES,
    TASKS,
    WHOLES,
    called_otherwise,
    liken,
    of_one_role,
    own_name,
    own_words,
    roles_of,
    same_role,
    strength,
)
from lit_wsl.matching.regions import Pair, Region, member_of
from lit_wsl.matching.tree import Item, owner_path, place_in, relative
from lit_wsl.matching.words import plain_words

RENAMED_ALONE = "everything beside them kept its name, and only theirs mean different things: it may be a new part"
TOWER = 6  # tensors of a network that stands beside others: exchanged, it would be lost as a whole
TOLD_NOTHING = NOTHING - {"decoder"}  # of a whole network; a last layer may be called so, whatever it is for
KEPT = 3  # so many siblings of the same name, and none of another, show that names were kept


def other_head(s: Item, t: Item, heads: Collection[int]) -> bool:
    """Whether two units stand at the end of their models and are named after different things.

    Args:
        s: A unit of the source.
        t: A unit of the target.
        heads: Ordinals of the target's matrices at its ends.
    """
    paths = {i.path.replace("_", "").lower() for i in (s, t)}
    if t.start not in heads or max(s.level, t.level) == 2 or len(paths) == 1:
        return False
    if any(part.isdigit() for i in (s, t) for part in owner_path(i.main.path).split(".")):
        return False
    letters = [set(own_name(i)) if len(own_name(i)) > 1 else set() for i in (s, t)]  # alone it may be anything
    ends = ENDS - TASKS if len(heads) > 1 else ENDS
    apart = [{w for w in own_words(i) - ends if len(w) > 1 or w in ls} for i, ls in zip((s, t), letters)]
    return all(apart) and not any(strength(a, b)[0] >= 0.6 for a in apart[0] for b in apart[1])


def renamed_alone(p: Pair, region: Region, learned: Learned) -> bool:
    """Whether only these two are called after different things: all siblings kept their names, or all else its meaning.

    A new part of the same size is called after what it is for; a code base that is renamed is renamed at many places.
    """
    if not _renamed_to_other(p.source, p.target, region):
        return False
    if _is_only_new_name(p.source, p.target, region):
        return True
    siblings = learned.renames.beside(region, p.source, p.target)
    unit = max(p.source.level, p.target.level) < 2
    if unit and len(siblings) >= KEPT and not any(ours != theirs for ours, theirs in siblings):
        return True
    if _may_have_any_name(p.source, p.target) or _is_most(p.source, p.target, region):
        return False
    change = _change_of(*_telling_names(p.source, p.target, region))  # one word may be exchanged in several names
    others = {names for names in learned.renames.all_but(p.source, p.target) if _change_of(*names) != change}
    if not others:
        return False
    if all(ours == theirs for ours, theirs in others):
        return True
    if len(others) < KEPT or is_listed(p.source, p.target):  # what all blocks have is no new part
        return False
    return not any(_are_renamed(ours, theirs) for ours, theirs in others)


@lru_cache(maxsize=10_000)  # asked for every name with every other
def _change_of(ours: tuple[str, ...], theirs: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    """The words that took the place of others; none if one side has no words of its own."""
    likeness = liken(ours, theirs)
    change = frozenset(likeness.left_s) - TOLD_NOTHING, frozenset(likeness.left_t) - TOLD_NOTHING
    return change if all(change) else ()


def _is_most(s: Item, t: Item, region: Region) -> bool:
    """Whether either holds two thirds of the layers around: a trunk may have any name but for one word."""
    most = any(2 * len(root.units) < 3 * len(i.units) for i, root in ((s, region.source), (t, region.target)))
    names = own_name(s), own_name(t)
    return most and (names[0] == names[1] or not {*names[0]} & {*names[1]})


def _are_renamed(ours: tuple[str, ...], theirs: tuple[str, ...]) -> bool:
    """Whether one thing is called after different things on the two sides, as far as its names say what it is for."""
    known = ours == theirs or of_one_role(ours, theirs) or are_called_one(ours, theirs)
    return not known and mean_otherwise(ours, theirs)


def _is_only_new_name(s: Item, t: Item, region: Region) -> bool:
    """Whether all other units of the module that two units stand in have the same names on both sides.

    Where they are many, a member of a list would have kept its number.
    """
    homes = tuple(known.get(id(i)) for known, i in zip(region.homes, (s, t)))
    for around in (homes, (region.source, region.target)):
        names = [{_last_parts(u) for u in home.units if not _is_in(u, i)} for home, i in zip(around, (s, t)) if home]
        enough = max(KEPT if _may_have_any_name(s, t) else KEPT - 1, *(len(i.units) for i in (s, t)))
        if len(names) == 2 and names[0] == names[1] and len(names[0]) >= enough:
            return True
    return False


def _is_in(unit: Item, item: Item) -> bool:
    return item.start <= unit.start < item.start + len(item.tensors)


def is_listed(s: Item, t: Item) -> bool:
    """Whether a number stands in the path of either."""
    return any(c.isdigit() for i in (s, t) for c in i.path)


def _last_parts(unit: Item) -> str:
    return ".".join(owner_path(unit.main.path).split(".")[-2:])


def _may_have_any_name(s: Item, t: Item) -> bool:
    """Whether only one is a member of a list, or both are a whole of two kinds: ``yolo_net``, ``resnet_net``."""
    listed = {i.path.rpartition(".")[2].isdigit() for i in (s, t)}
    return len(listed) == 2 or bool({*own_name(s)} & {*own_name(t)} & WHOLES)


def _renamed_to_other(s: Item, t: Item, region: Region) -> bool:
    """Whether two names mean different things, and neither is the other, wrapped."""
    ours, theirs = _telling_names(s, t, region)
    nothing = TOLD_NOTHING if min(s.level, t.level) == 2 or min(len(ours), len(theirs)) > 1 else NOTHING
    if own_name(s) == own_name(t):
        return mean_otherwise(ours, theirs, nothing)
    if set(ours) <= set(own_name(t, 2)) or set(theirs) <= set(own_name(s, 2)):
        return max(s.level, t.level) < 2 <= min(s.rank, t.rank) and not is_listed(s, t) and _is_for_more(ours, theirs)
    return mean_otherwise(ours, theirs, nothing) and not _alike_inside(s, t, region)


def _telling_names(s: Item, t: Item, region: Region) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Their own names, or all of their places if these are the same; of modules if they tell nothing."""
    names = own_name(s), own_name(t)
    if names[0] != names[1] or (min(s.level, t.level) == 2 and not NOTHING.issuperset(names[0])):
        return names
    ours, theirs = (tuple(plain_words(place_in(i, r))) for i, r in ((s, region.source), (t, region.target)))
    return ours, theirs


def _is_for_more(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether one of two last layers is called after what it is for, and the other is not: ``rotation_classifier``."""
    more, shared = {*ours} ^ {*theirs}, {*ours} & {*theirs}
    return bool(shared) and shared <= ENDS and any(len(w) > 1 and w not in NOTHING | BLOCKS for w in more)


def _alike_inside(s: Item, t: Item, region: Region) -> bool:
    """Whether two units are known for one role, or two modules hold something of one name or role that tells.

    What is beside them, too, tells nothing; the role of a layer not which of two lists of blocks it is; and the insides
    of two small modules are called alike wherever they are of one class.
    """
    names = own_name(s), own_name(t)
    if are_called_one(*names) or max(s.level, t.level) < 2:
        return are_called_one(*names) or of_one_role(*names)
    blocks = _is_list(s) or s.path.rpartition(".")[2].isdigit()
    large = min(len(i.tensors) for i in (s, t)) >= TOWER and not {*names[0]} & {*names[1]} & LISTS  # lstm_, attn_layers
    inside = zip(s.units, *([plain_words(place_in(u, i)) for u in i.units] for i in (s, t)))
    around = {own_name(u) for u in region.source.units if not _is_in(u, s)}
    for unit, a, b in inside:
        told = not blocks or ({*a} - NOTHING - BLOCKS and not roles_of(unit.path))
        if told and own_name(unit) not in around and ((a and large) if a == b else of_one_role(a, b) and not blocks):
            return True
    return False


def _is_list(item: Item) -> bool:
    return any(c.level == 2 and relative(c, item).partition(".")[0].isdigit() for c in item.children)


def mean_otherwise(ours: Sequence[str], theirs: Sequence[str], nothing: Collection[str] = NOTHING) -> bool:
    """Whether both names hold words that tell something, and that the other one lacks."""
    likeness = liken(ours, theirs)
    left = (ours, likeness.left_s), (theirs, likeness.left_t)
    if are_called_one(likeness.left_s, likeness.left_t):
        return False
    return all(
        any((len(w) > 1 or w in FORMULA or len(name) > 1) and w not in nothing for w in words) for name, words in left
    )


def are_kept_apart(s: Item, t: Item) -> bool:
    """Whether each of two names outside of all lists says something more, be it by a letter: ``x_mean, z_mean``."""
    likeness = liken(own_name(s), own_name(t))
    return bool(likeness.left_s and likeness.left_t) and not is_listed(s, t)


def are_others(
    s: Item,
    t: Item,
    region: Region,
    renames: Renames,
    *,
    fixed: bool,
    told: bool = False,
    words: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> bool:
    """Whether the last two left are no partners: their siblings kept their paths, or names told these apart.

    The output of an attention may be called anything.

    Args:
        s: Of the source.
        t: Of the target.
        region: Where they are compared.
        renames: Which names changed.
        fixed: Whether others of their size have the same path on both sides.
        told: Whether names told others of their size apart.
        words: What tells each from its siblings, if words told these apart.
    """
    if region.letters_of(s, 0) == {"o"} == region.letters_of(t, 1):
        return False
    whole = told and min(s.level, t.level) == 2 and not renames.are_all(s, t)
    whole = whole and not (_is_list(s) and _is_list(t))  # resblocks, layers: what stands around them tells
    if (fixed and are_kept_apart(s, t)) or ((fixed or whole) and called_otherwise(s, t)):
        return True
    return ((fixed or told) and _is_something_else(s, t)) or _are_called_apart(s, t, words)


def _are_called_apart(s: Item, t: Item, words: tuple[Sequence[str], Sequence[str]]) -> bool:
    """Whether what tells two units from their siblings means different things on the two sides.

    The parts of a block are few and of known kinds, so that there only the names around the block count.
    """
    names = []
    for item, telling in zip((s, t), words):
        around, inside = member_of(owner_path(item.main.path))
        names.append([w for w in telling if w not in SIDES and not (around and w in plain_words(inside))])
    return mean_otherwise(*names) and not same_role(owner_path(s.main.path), owner_path(t.main.path))


def _is_something_else(s: Item, t: Item) -> bool:
    """Whether two units outside of all lists are called after different things; norms say only where they stand."""
    names = own_name(s), own_name(t)
    if is_listed(s, t) or of_one_role(*names) or are_called_one(*names):
        return False
    return mean_otherwise(*([w for w in name if w not in SIDES and "norm" not in w] for name in names))


def are_of_one_role(s: Item, t: Item) -> bool:
    """Whether two layers are known for one role, or two tables hold words or positions."""
    return same_role(owner_path(s.main.path), owner_path(t.main.path)) or are_called_one(own_name(s), own_name(t))


def are_called_one(ours: Collection[str], theirs: Collection[str]) -> bool:
    """Whether two names are two of those that one thing goes by."""
    telling = [{*name} - NOTHING for name in (ours, theirs)]
    return all(telling) and any(telling[0] | telling[1] <= names for names in CALLED)
