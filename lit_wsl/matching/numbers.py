"""What the numbers in names tell: which member of a list became which, as far as direction and sets agree."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from itertools import pairwise

from lit_wsl.matching.likeness import (
    ATTENTIONS,
    CROSS,
    FEEDS,
    LAYER_NAMES,
    LAYERS,
    count_by_roles,
    liken,
    paired_by_roles,
)
from lit_wsl.matching.regions import Region
from lit_wsl.matching.tree import Family, Item, owner_path, relative, telling_words
from lit_wsl.matching.words import Lists, counted, lists_of_one_size, plain_words

NUMBERS, ASCENDING = "numbers", "ascending"
BEHIND = frozenset(("post", "after"))


def number_map(
    f: Family, g: Family, ordered: bool, written: bool, backwards: Container[tuple[str, str]]
) -> tuple[tuple[Item, ...], str] | None:
    """The members of ``g`` in the order of ``f``, and by which evidence; ``None`` if nothing tells.

    Where lists of these names count down elsewhere (:func:`lists_backwards`), the same numbers tell nothing.
    """
    if len(f.members) != len(g.members):
        return None
    if crosswise := _crosswise(f, g):
        return crosswise, NUMBERS
    if _may_be_crosswise(f, g):
        return None
    ours, theirs = (counted(fam.members[0].path)[-1:] for fam in (f, g))
    if ours and theirs and (_list_name(ours[0][0]), _list_name(theirs[0][0])) in backwards:
        return None
    up_s, up_t = _direction(f.members), _direction(g.members)
    sets = [[tuple(n[a] for n in fam.numbers) for a in fam.axes()] for fam in (f, g)]
    whole = [[tuple(n[a] for a in fam.axes()) for n in fam.numbers] for fam in (f, g)]
    if sorted(whole[0]) == sorted(whole[1]):
        if written and up_s * up_t < 0:
            return None  # counted down on one side
        place = dict(zip(whole[1], g.members))
        return tuple(place[n] for n in whole[0]), NUMBERS
    for a in sets[0]:
        for b in sets[1]:
            if len(set(a)) == len(a) == len(b) and set(a) == set(b):  # chunk and number, against number
                place_1 = dict(zip(b, g.members))
                return tuple(place_1[n] for n in a), NUMBERS
    if ordered and up_s == up_t == 1 and not _number_names(f, g) and not _counts_on(f, g):
        return g.members, ASCENDING
    return None


def lists_backwards(ours: Lists, theirs: Lists) -> frozenset[tuple[str, str]]:
    """Names of lists that have the same sizes only if one is read backwards, wherever lists of these names stand."""
    straight, backwards = (
        {(_list_name(a), _list_name(b)) for a, b in lists_of_one_size(ours, theirs, step)} for step in (1, -1)
    )
    return frozenset(backwards - straight)


def _list_name(place: str) -> str:
    """What a list is called, by the place where it counts: ``blocks`` of ``encoder.blocks.#``."""
    around, _, last = place.rpartition(".")
    return around.rpartition(".")[2] if last == "#" else last


def _number_names(f: Family, g: Family) -> bool:
    """Whether numbers stand in words and some stand on both sides, but count nothing: 2019, 2020 and 2020, 2021.

    So they do where they are no more or less on the other side by one number: folds 0, 1, 2 and 0, 1, 3.
    """
    if len(f.axes()) != 1 or len(g.axes()) != 1:
        return False
    ours, theirs = (sorted(n[fam.axes()[0]] for n in fam.numbers) for fam in (f, g))
    listed = any(part.isdigit() for fam in (f, g) for m in fam.members for part in m.path.split("."))
    if listed or set(ours).isdisjoint(theirs) or ours == theirs:
        return False
    return max(ours[0], theirs[0]) > 1 or len({b - a for a, b in zip(ours, theirs)}) > 1


def _counts_on(f: Family, g: Family) -> bool:
    """Whether one list goes on where the other began, by so many, and one is not counted from 0 and the other from 1.

    What has the same number may be the same, and the list shorter at one end and longer at the other.
    """
    lists = {_list_name(place) for fam in (f, g) for place, _ in counted(fam.members[0].path)[-1:]}
    if f.pattern != g.pattern or len(lists) != 1 or len(f.axes()) != 1:
        return False
    ours, theirs = (sorted(n[fam.axes()[0]] for n in fam.numbers) for fam in (f, g))
    steps = {b - a for a, b in zip(ours, theirs)}
    return len(steps) == 1 and not set(ours).isdisjoint(theirs) and {ours[0], theirs[0]} not in ({0, 1}, {ours[0]})


def _crosswise(f: Family, g: Family) -> tuple[Item, ...]:
    """The members of ``g`` in the order of ``f`` where two lists stand in each other the other way round.

    The numbers tell: ``norm1.0, norm2.0`` count from 1 and from 0, as ``layers.0.norm1, layers.0.norm2`` do.
    """
    if len(f.axes()) != 2 or len(g.axes()) != 2:
        return ()
    ours, theirs = ([tuple(n[a] for a in fam.axes()) for n in fam.numbers] for fam in (f, g))
    sets = [{n[k] for n in rows} for rows in (ours, theirs) for k in (0, 1)]
    place = {n[::-1]: m for n, m in zip(theirs, g.members)}
    if sets[0] != sets[3] or sets[1] != sets[2] or sets[0] == sets[1] or place.keys() != set(ours):
        return ()
    return tuple(place[n] for n in ours)


def _may_be_crosswise(f: Family, g: Family) -> bool:
    """Whether so many lists of so many layers are called ``convs1, convs2`` on one side: each may hold one of each."""
    names = [fam.members[0].path.rpartition(".")[2] for fam in (f, g)]
    layers = [any(w.removesuffix("s") in LAYERS - {"layer"} or "norm" in w for w in plain_words(n)) for n in names]
    listed = [name.isdigit() for name in names]
    rows = [[c.profile_key for c in m.children if c.level < 2 == m.level] for fam in (f, g) for m in fam.members]
    return any(layers) and any(listed) and all(len(row) == len(f.members) and len(set(row)) == 1 for row in rows)


def _direction(items: Sequence[Item]) -> int:
    """1 if items stand in the order given, -1 if the other way round, 0 if neither."""
    steps = {a.start < b.start for a, b in pairwise(items)}
    return (1 if steps == {True} else -1) if len(steps) == 1 else 0


def runs_apart(s: Sequence[Item], t: Sequence[Item], region: Region) -> bool:
    """Whether the members of two lists are counted alike, but registered in opposite directions."""
    places: list[dict[str, dict[int, int]]] = [{}, {}]
    for lists, side, root in zip(places, (s, t), (region.source, region.target)):
        for place, number, start in ((*n, i.start) for i in side for n in counted(relative(i, root))[:1]):
            if place.rpartition(".")[2] != "#":
                continue
            lists.setdefault(place, {}).setdefault(int(number), start)
    return any(_run_apart(ours, places[1][place]) for place, ours in places[0].items() if place in places[1])


def _run_apart(ours: Mapping[int, int], theirs: Mapping[int, int]) -> bool:
    """Whether two lists, by number where their members start, go up on one side and down on the other."""
    shared = sorted(ours.keys() & theirs.keys())
    ups = [[place[a] < place[b] for a, b in pairwise(shared)] for place in (ours, theirs)]
    return bool(ups[0]) and any(all(ups[k]) and not any(ups[1 - k]) for k in (0, 1))


def in_count(fs: Sequence[Family], ft: Sequence[Family]) -> list[tuple[Family, Family]]:
    """Pairs of items that nothing but a count tells apart on either side: 1 and 2, a and b, before and after.

    The two norms of a block are counted by what they stand before or behind: ``attention_norm`` and ``ffn_norm``,
    ``input_layernorm`` and ``post_attention_layernorm``.
    """
    if len(fs) != len(ft) or len(fs) < 2 or any(len(f.members) != 1 for f in (*fs, *ft)):
        return []
    behind = [[all(words & set(f.words) for f in side) for words in (BEHIND, BEHIND | OUTPUT)] for side in (fs, ft)]
    if any(ours[0] and not theirs[1] for ours, theirs in (behind, behind[::-1])):
        return []  # norms that all stand behind their parts don't stand before them
    told = [_told(side, FINAL) for side in (fs, ft)]
    counts = any(found and found[0] == "count" for found in told)
    told = [
        _told(side, OUTPUT) if not found and (counts or all(OUTPUT & set(f.words) for f in side)) else found
        for side, found in zip((fs, ft), told)
    ]
    if not (told[0] and told[1]):
        return []
    ways, rows = zip(*told)
    if ways[0] != ways[1] and (_are_listed(fs) or _are_listed(ft)):
        return []  # in a list of two norms, either may be the first
    return list(zip(*rows))


def known_for_roles(fs: Sequence[Family], ft: Sequence[Family]) -> list[tuple[Family, Family]]:
    """Pairs of items whose names the lexicon knows for the parts of one thing, each for another."""
    paths = ([owner_path(f.members[0].main.path) for f in side] for side in (fs, ft))
    return [(fs[i], ft[j]) for i, j in paired_by_roles(*paths)]


def told_otherwise(side: Sequence[Family]) -> bool:
    """Whether what tells items apart counts them in another order than that in which they are registered."""
    row = sorted(side, key=lambda f: f.start)
    layers = all(
        len(f.members) == 1 and f.members[0].level < 2 for f in side
    )  # a decoder begins with the deepest block
    told = _told(row, FINAL) if layers else None
    return told is not None and told[1] != row


def _told(side: Sequence[Family], last: frozenset[str]) -> tuple[str, list[Family]] | None:
    """In which way items are counted, and the items in that order; words may say which of two norms is the last."""
    roles = count_by_roles([owner_path(f.members[0].main.path) for f in side])
    ways = (
        *(("count", row) for row in (counts_of(side), _numbers(side), roles)),
        ("place", _places(side, last)),
    )
    for way, counts in ways:
        if sorted(counts) == list(range(len(side))):
            return way, [side[counts.index(k)] for k in range(len(side))]
    return None


def _are_listed(side: Sequence[Family]) -> bool:
    """Whether items are, or stand in, members of a list: where their paths part, there are numbers."""
    paths = zip(*(f.members[0].path.split(".") for f in side))
    parting = next((parts for parts in paths if len(set(parts)) > 1), ())
    return any(map(str.isdigit, parting))


FINAL, OUTPUT = frozenset(("final",)), frozenset(("final", "output"))


def _places(side: Sequence[Family], last: frozenset[str]) -> list[int]:
    """Where the two norms of a block stand by their words: 0 before the attention, 1 behind it; -1 if not told.

    Of three the second stands before the cross attention.
    """
    if len(side) not in (2, 3) or any(f.members[0].rank >= 2 for f in side):
        return []
    if len(side) == 3:
        return [_place_of_three({*f.words}, last) for f in side]
    return [place_by(set(ws), last) for ws in (telling_words(side) if last is FINAL else [f.words for f in side])]


def _place_of_three(words: set[str], last: frozenset[str]) -> int:
    """0 for the norm of the self attention, 1 for that of the cross attention, 2 for that of the feed-forward."""
    if words & CROSS:
        return 1
    return 0 if words & (ATTENTIONS | {"self"}) else 2 if words & (FEEDS | last) else -1


def runs_otherwise(side: Sequence[Family], root: Item) -> bool:
    """Whether a block is registered in another order than usual, so that its norms may be counted otherwise.

    It begins with its feed-forward, and so does the norm named after it; or with its cross attention.
    """
    places = _places(side, OUTPUT) if len(side) == 2 else []
    fed = sorted(places) == [0, 1] and side[places.index(1)].start < side[places.index(0)].start
    if not fed and len(side) != 3:
        return False
    matrices = [({*plain_words(relative(u.main, root))}, u.start) for u in root.units if u.rank >= 2]

    def first(known: frozenset[str], without: frozenset[str] = frozenset()) -> int:
        return min((start for words, start in matrices if words & known and not words & without), default=-1)

    if fed:
        return -1 < first(FEEDS) < first(ATTENTIONS)
    return told_otherwise(side) or -1 < first(CROSS) < first(ATTENTIONS | {"self"}, CROSS)


def _numbers(side: Sequence[Family]) -> list[int]:
    """Which place each has by its number, if what else the names say is the same, in short or in full: ``lyr_nrm2``."""
    names = [[w for w in f.words if not w.isdigit() and w not in LAYER_NAMES] for f in side]
    numbers = [[int(w) for w in f.words if w.isdigit()] for f in side]
    listed = {any(part.isdigit() for part in f.members[0].path.split(".")) for f in side}
    alike = [liken(names[0], words) for words in names[1:]]
    if any(len(ns) != 1 for ns in numbers) or len(listed) > 1 or any(like.left_s or like.left_t for like in alike):
        return []
    return [sorted(numbers).index(ns) for ns in numbers]


def place_by(words: set[str], last: frozenset[str] = frozenset()) -> int:
    """Where a norm of a block stands by the words of its name: 0 before the attention, 1 behind it; -1 if not told."""
    if words & {"post", "after"}:
        return -1 if words & FEEDS else 1
    if bool(words & ATTENTIONS) != bool(words & FEEDS):
        return int(bool(words & FEEDS))
    return 0 if words & {"pre", "before", "input"} else 1 if words & last else -1


def counts_of(side: Sequence[Family]) -> list[int]:
    """Place of each family among those of its side by what tells it from them; empty if that is no count."""
    telling = telling_words(side)
    if any(len(words) != 1 for words in telling):
        return []
    told = [words[0] for words in telling]
    if all(word.isdigit() for word in told):
        return [sorted(set(map(int, told))).index(int(word)) for word in told]
    # of a gated linear unit the gate's matrix is numbered first (Shazeer, GLU Variants Improve Transformer, 2020)
    for row in (
        "abcdefgh",
        ("before", "after"),
        ("pre", "post"),
        ("pre", "mid"),
        ("gate", "up"),
        ("in", "out"),
        ("wi", "wo"),
    ):
        if set(told) == set(row[: len(set(told))]):
            return [row.index(word) for word in told]
    return []


def counted_apart(s: Item, t: Item, region: Region) -> bool:
    """Whether two items are counted among as many numbers, and stand at different places among them."""
    along = _counted_along(s, t, region)
    if not all(along):
        return False
    known = [[sorted(region.lists[k][place], key=int) for place, _ in side] for k, side in enumerate(along)]
    if list(map(len, known[0])) != list(map(len, known[1])):
        return False
    if known[0] != known[1] and [place for place, _ in along[0]] != [place for place, _ in along[1]]:
        return False  # lists of one length, but of other names and other numbers
    places = [[row.index(number) for row, (_, number) in zip(known[k], side)] for k, side in enumerate(along)]
    return places[0] != places[1]


def counted_down(s: Item, t: Item, region: Region) -> bool:
    """Whether two members of lists that count in opposite directions don't stand opposite to each other."""
    along = _counted_along(s, t, region) if region.backwards else ((), ())
    if len(along[0]) != 1 or len(along[1]) != 1:
        return False
    (ours, number), (theirs, other) = along[0][0], along[1][0]
    if (ours, theirs) not in region.backwards:
        return False
    numbers = [sorted(lists[place], key=int) for lists, place in zip(region.lists, (ours, theirs))]
    return numbers[0].index(number) + numbers[1].index(other) != len(numbers[0]) - 1


def _counted_along(s: Item, t: Item, region: Region) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Of two items the places where they stand among others in a list, and their numbers there."""
    found = [
        [(place, number) for place, number in counted(relative(item, root)) if len(root.lists.get(place, {})) > 1]
        for item, root in ((s, region.source), (t, region.target))
    ]
    return found[0], found[1]
