"""Where items are compared, what is known there, and what a decision says.

A *region* is a pair of modules that correspond. Its decisions are pairs, ties (families that fit together in an order
that nothing tells) and, from the pass before, the partners of other blocks and the units that kept their names.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from lit_wsl.matching.formula import PERHAPS, Letters, in_both, letters_below
from lit_wsl.matching.likeness import (
    ATTENTIONS,
    FEEDS,
    HALF_WORDS,
    LAYER_NAMES,
    LISTS,
    SHORT_WORDS,
    WORDS,
    foreign,
    leads,
    liken,
    own_name,
    related,
    strength,
)
from lit_wsl.matching.tree import Family, Item, families_of, literal, owner_path, place_in, relative, shape_key
from lit_wsl.matching.words import Lists, counted, lists_of_one_size, path_tokens, plain_words, unlike_lists
from lit_wsl.structure.description import ParameterInfo, Shape, cached_property

TELLING = (WORDS, SHORT_WORDS, HALF_WORDS)  # likenesses by which a name singles out another
ATTENTION, FEED = "attention", "feed-forward"
BLOCK = 64  # tensors; larger regions teach nothing about their like


@dataclass(frozen=True)
class Sides:
    """What is known of the two sides as wholes."""

    ties: Mapping[str, int] = field(default_factory=dict)  # how many names each tied source tensor has
    ordered: bool = True  # whether the source has an order of registration
    written: bool = True  # whether its order, be it only that of a dict, says something, so that it may contradict
    execution: tuple[int | None, ...] = ()  # when the target runs each of its tensors, by ordinal
    heads: frozenset[int] = frozenset()  # ordinals of the target's matrices at its ends (ends_of)
    # ordinals of source tensors, and of the target's tensors of the same path and shape
    twins: Mapping[int, int] = field(default_factory=dict)
    backwards: frozenset[tuple[str, str]] = frozenset()  # names of lists that count down on one side (lists_backwards)
    moved: Mapping[object, bool] = field(default_factory=dict)  # shapes of norms that may stand elsewhere (moved_norms)
    wraps: bool = True  # whether layers of one side may stand in modules of their name on the other (may_wrap)

    @cached_property
    def sources_of(self) -> dict[int, int]:
        """The twins by the target's ordinals."""
        return {t: s for s, t in self.twins.items()}


@dataclass(frozen=True)
class Region:
    """Where items are compared: below ``source`` and ``target``."""

    source: Item  # root of the source's side
    target: Item  # root of the target's side
    complete: bool  # whether both sides have the same number of elements, so that everything must find a partner
    whole: bool = False  # whether these are the whole models
    loose: bool = False  # whether vectors stand in other modules on the two sides, so that these say nothing about them
    # whether only matrices are compared, as one side has biases or norms that the other does without
    by_core: bool = False
    wraps: bool = True  # whether one side has modules that are called like layers of the other (may_wrap)

    def alike(self, s: Item, t: Item) -> bool:
        """Whether two items hold tensors of the same shapes."""
        return s.profile_key == t.profile_key or (self.by_core and bool(s.core) and s.core == t.core)

    def holds_once(self, s: Item, t: Item) -> bool:
        """Whether each side has one tensor only of the shape of an item's largest one."""
        return all(root.profile[shape_key(i.main.shape)] == 1 for root, i in ((self.source, s), (self.target, t)))

    @property
    def key(self) -> tuple[int, int]:
        """Equal for regions of the same structure, which are solved once."""
        return self.source.structure, self.target.structure

    @property
    def lists(self) -> tuple[Lists, Lists]:
        """By each place where paths count the sizes of what stands there, by number; source and target."""
        return self.source.lists, self.target.lists

    @cached_property
    def backwards(self) -> frozenset[tuple[str, str]]:
        """Places of two lists whose members have the same sizes only if one is read backwards."""
        return frozenset(lists_of_one_size(*self.lists, -1))

    @property
    def level(self) -> int:
        """How many modules the source's side stands below the last number of its path; -1 if there is none."""
        around, below = member_of(self.source.path)
        return (below.count(".") + bool(below)) if around else -1

    def same_numbers(self, path: str) -> bool:
        """Whether every number along a path counts the same things on both sides."""
        return not self._unlike or all(place not in self._unlike for place, _ in counted(path))

    def count_alike(self, ours: str, theirs: str) -> bool:
        """Whether every number along two paths, from their ends, counts the same things on both sides."""
        if ours == theirs:
            return self.same_numbers(ours)
        places = zip(reversed(counted(ours)), reversed(counted(theirs)))
        return all(self.lists[0].get(a, {}).keys() == self.lists[1].get(b, {}).keys() for (a, _), (b, _) in places)

    def like_numbers(self, path: str) -> bool:
        """Whether the numbers along a path are those of the other side, or among them: nothing is counted from one."""
        return not self._not_within or all(place not in self._not_within for place, _ in counted(path))

    @cached_property
    def _unlike(self) -> frozenset[str]:
        return unlike_lists(*self.lists)

    @cached_property
    def _not_within(self) -> frozenset[str]:
        return unlike_lists(*self.lists, within=True)

    @cached_property
    def homes(self) -> tuple[dict[int, Item], dict[int, Item]]:
        """By the identity of each item below the module that it stands in; source and target."""
        return _homes(self.source), _homes(self.target)

    @cached_property
    def parts_by_shape(self) -> tuple[dict[Shape, dict[str, None]], dict[Shape, dict[str, None]]]:
        """By the shape of a matrix the first parts of the paths that lead to one; source and target."""
        sides: tuple[dict[Shape, dict[str, None]], dict[Shape, dict[str, None]]] = ({}, {})
        for found, root in zip(sides, (self.source, self.target)):
            for unit in root.units:
                if unit.rank >= 2:
                    found.setdefault(unit.main.shape, {})[relative(unit, root).partition(".")[0]] = None
        return sides

    @cached_property
    def parts_alike(self) -> tuple[dict[str, str], dict[str, str]]:
        """By the first part of the paths to matrices, which parts of the two sides are called alike; both ways."""
        parts = [dict.fromkeys(part for known in side.values() for part in known) for side in self.parts_by_shape]
        numbers = [{part for part in side if part.isdigit()} for side in parts]
        pairs = {part: part for part in numbers[0] if numbers[0] == numbers[1]}
        ours, theirs = ([part for part in side if not part.isdigit()] for side in parts)
        alike = [[liken(plain_words(a), plain_words(b)) for b in theirs] for a in ours]
        shared = [[x.shared if x.kind in TELLING and not x.only_layers else 0.0 for x in row] for row in alike]
        pairs |= {ours[i]: theirs[j] for i, j in (leads(shared) if theirs else [])}
        return pairs, {b: a for a, b in pairs.items()}

    @cached_property
    def dissent(self) -> dict[tuple[Item, Item], str]:
        """What names say against pairs, as far as it was asked; the same in every pass."""
        return {}

    @cached_property
    def _namesakes(self) -> dict[tuple[int, int, bool], tuple[dict[int, int], dict[int, int]]]:
        return {}

    def namesakes(self, ours: Item, theirs: Item, *, same: bool) -> tuple[dict[int, int], dict[int, int]]:
        """What is called alike in two modules and like nothing else there, whatever its size: identities, both ways.

        With ``same`` also what has one name that says no more than a kind of layer.
        """
        key = id(ours), id(theirs), same
        if key not in self._namesakes:
            pairs = _called_alike(ours, theirs) + (_called_the_same(ours, theirs) if same else [])
            self._namesakes[key] = {id(s): id(t) for s, t in pairs}, {id(t): id(s) for s, t in pairs}
        return self._namesakes[key]

    @cached_property
    def makes(self) -> tuple[Counter[object], Counter[object]]:
        """How many modules of each make are below; source and target."""
        return makes_of(self.source), makes_of(self.target)

    @cached_property
    def single_shapes(self) -> frozenset[Shape]:
        """Shapes of which each side has just one tensor."""
        ours, theirs = (
            {x for x, n in Counter(t.shape for t in i.tensors).items() if n == 1} for i in (self.source, self.target)
        )
        return frozenset(ours & theirs)

    @cached_property
    def letters(self) -> tuple[Letters, Letters]:
        """Which units are what in an attention; source and target."""
        return letters_below(self.source), letters_below(self.target)

    @cached_property
    def _values(self) -> tuple[Counter[str], Counter[str]]:
        """How many layers of each module are called values, and nothing more."""
        ours, theirs = (
            Counter(p.rpartition(".")[0] for p in map(owner_path, side) if len(plain_words(p.rpartition(".")[2])) == 1)
            for side in ([path for path, letters in side.items() if letters == {"v"}] for side in self.letters)
        )
        return ours, theirs

    def is_value_twice(self, item: Item, side: int) -> bool:
        """Whether a unit and another in its module are called values: ``v`` of an attention, ``value`` of a gate."""
        path = owner_path(relative(item.main, (self.source, self.target)[side]))
        return self.letters_of(item, side) == {"v"} and self._values[side][path.rpartition(".")[0]] > 1

    @cached_property
    def shared_letters(self) -> frozenset[str]:
        """What as many units are on both sides, so that each must find its like."""
        return in_both(*self.letters)

    def letters_of(self, item: Item, side: int) -> frozenset[str]:
        """What a unit is in an attention; nothing for modules."""
        root = (self.source, self.target)[side]
        found = self.letters[side].get(relative(item.main, root), frozenset()) if item.level < 2 else frozenset()
        return found - {PERHAPS}

    def is_one_of_outputs(self, s: Item, t: Item) -> bool:
        """Whether one is the output of an attention, and the other one of several that may be it."""
        if max(s.level, t.level) == 2:
            return False
        names = relative(s.main, self.source), relative(t.main, self.target)
        return {"o", PERHAPS} == {x for side, name in zip(self.letters, names) for x in side.get(name, "")}

    @cached_property
    def _blocks(self) -> tuple[frozenset[str], frozenset[str]]:
        """The members of lists that hold more than one matrix, source and target."""
        sides = []
        for root in (self.source, self.target):
            places = (owner_path(relative(u.main, root)) for u in root.units if u.rank >= 2)
            held = Counter(p for place in places for p in around(place) - {place} if p.rpartition(".")[2].isdigit())
            sides.append(frozenset(p for p, count in held.items() if count > 1))
        return sides[0], sides[1]

    def block_of(self, layer: Item, side: int) -> str:
        """The outermost member of a list that a layer stands in with others; empty if there is none."""
        place = owner_path(relative(layer.main, (self.source, self.target)[side]))
        return min((around(place) - {place}) & self._blocks[side], key=len, default="")

    def part_of(self, item: Item, side: int) -> str:
        """Whether a layer stands in the attention or the feed-forward of a block, as the modules around it say."""
        place = relative(item, (self.source, self.target)[side])
        return _part_of(place.rpartition(".")[0]) if item.level < 2 else ""

    @cached_property
    def _parts(self) -> tuple[frozenset[str], frozenset[str]]:
        """The parts of blocks that the two sides are made of."""
        ours, theirs = (
            frozenset(_part_of(place.rpartition(".")[0]) for place in set(map(owner_path, side))) for side in self.names
        )
        return ours, theirs

    def leaves_part(self, s: Item, t: Item) -> bool:
        """Whether one of two layers stands in a part of a block that the other side has too, and the other does not."""
        ours, theirs = self.part_of(s, 0), self.part_of(t, 1)
        if max(s.level, t.level) == 2 or (ours and theirs):
            return False
        flat = _part_of(s.path if theirs else t.path)  # attention_out_lin
        return any(part and part != flat and part in self._parts[k] for part, k in ((ours, 1), (theirs, 0)))

    def neighbours_words(self, families: Sequence[Sequence[Family]], side: int) -> frozenset[str]:
        """Words of own names of vectors that also name other things: ``attention_norm`` stands near the attention."""
        if families[side][0].members[0].rank >= 2:
            return frozenset()
        outside: set[str] = set()
        own: set[str] = set()
        for k, root in enumerate((self.source, self.target)):
            here: Counter[str] = Counter()
            for m in (m for f in families[k] for m in f.members):
                for t in m.tensors:
                    here.update(set(path_tokens(relative(t, root))))
                if k == side:
                    place = place_in(m, root)
                    own.update(path_tokens(place if self.loose else place.rpartition(".")[2]))
            outside |= {w for w, c in self.words[k].items() if c > here[w]}
        return frozenset(w for w in own if any(strength(w, o)[1] >= 2 for o in outside))

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The paths of all tensors below, source and target."""
        return self.source.names, self.target.names

    @cached_property
    def modules(self) -> tuple[frozenset[str], frozenset[str]]:
        """The paths of all modules below, source and target."""
        ours, theirs = (frozenset(p for n in set(map(owner_path, side)) for p in around(n)) for side in self.names)
        return ours, theirs

    @cached_property
    def twins(self) -> tuple[tuple[int, int], ...]:
        """Tensors of the same path and shape, as seen from here, where both sides count alike along it: ordinals."""
        theirs = dict(zip(self.names[1], self.target.tensors))
        found = ((path, s, theirs.get(path)) for path, s in zip(self.names[0], self.source.tensors))
        same = [(s.start, t.start) for path, s, t in found if t and t.shape == s.shape and self.like_numbers(path)]
        return (*same, *((s, t) for t, s in self.wrapped.items()))

    @cached_property
    def wrapped(self) -> dict[int, int]:
        """What stands in a module of its old name on one side, ``q`` and ``q.base_layer``: ordinals, by the target's.

        Only where nothing else of its shape stands there.
        """
        if not self.wraps:
            return {}
        tensors = self.source.tensors, self.target.tensors
        sides = [{(n, t.shape): t.start for n, t in zip(*side)} for side in zip(self.names, tensors)]
        found: dict[int, int] = {}
        for outer, inner in (sides, sides[::-1]):
            inside: dict[tuple[str, Shape], list[int]] = defaultdict(list)
            for (path, shape), start in inner.items():
                owner, _, leaf = path.rpartition(".")
                place = owner.rpartition(".")[0]
                if (path, shape) not in outer and not place[-1:].isdigit() and self.like_numbers(path):
                    inside[f"{place}.{leaf}", shape].append(start)
            for key, starts in inside.items():
                if len(starts) == 1 and key in outer and key not in inner:
                    ours, theirs = (outer[key], *starts) if outer is sides[0] else (*starts, outer[key])
                    found[theirs] = ours
        return found

    @cached_property
    def words(self) -> tuple[Counter[str], Counter[str]]:
        """How many tensors have each word in their path, source and target."""
        return _word_counts(self.source), _word_counts(self.target)

    def have_word_alone(self, s: Item, t: Item) -> bool:
        """Whether a word for no kind of layer stands in the names of these two alone, on either side."""
        shared = {w for w in {*own_name(s)} & {*own_name(t)} if len(w) > 2 and w not in LAYER_NAMES}
        return any(
            all(counts[w] == len(i.tensors) for counts, i in zip(self.words, (s, t))) for w in shared if w not in LISTS
        )


def may_wrap(source: Iterable[ParameterInfo], target: Iterable[ParameterInfo]) -> bool:
    """Whether a layer of one side has the name of a module of the other, in which it may stand."""
    modules = [{info.module_path for info in infos} for infos in (source, target)]
    called = [{path.rpartition(".")[2] for path in side if path} for side in modules]
    around = [{path.rsplit(".", 2)[-2] for path in side if "." in path} for side in modules]
    return not (called[0].isdisjoint(around[1]) and called[1].isdisjoint(around[0]))


def _homes(root: Item) -> dict[int, Item]:
    found: dict[int, Item] = {}
    modules = [root]
    while modules:
        module = modules.pop()
        found.update((id(child), module) for child in module.children)
        modules += [child for child in module.children if child.level == 2]
    return found


def _called_the_same(ours: Item, theirs: Item) -> list[tuple[Item, Item]]:
    sides = [{place_in(i, home): i for i in home.children if i.rank >= 2} for home in (ours, theirs)]
    counts = [{n for p in side for n in p.split(".") if n.isdigit()} for side in sides]
    return [
        (i, sides[1][p])
        for p, i in sides[0].items()
        if p in sides[1] and (counts[0] == counts[1] or not any(map(str.isdigit, p.split("."))))
    ]


def _called_alike(ours: Item, theirs: Item) -> list[tuple[Item, Item]]:
    sides = [_by_name(home) for home in (ours, theirs)]
    shared = [[0.0] * len(sides[1]) for _ in sides[0]]
    for i, (a, s) in enumerate(sides[0].items()):
        for j, (b, t) in enumerate(sides[1].items()):
            modules = {x.level == 2 or "." in place_in(x, home) for x, home in ((s, ours), (t, theirs))}
            if len({len(x.units) > 1 for x in (s, t)}) == 2:
                continue  # a layer has not become a network
            known = TELLING if modules == {True} else TELLING[:2]  # token, token_type
            likeness = liken(a, b)
            if len(modules) == 1 and likeness.kind in known and not likeness.only_layers:
                shared[i][j] = likeness.shared
    items = [list(side.values()) for side in sides]
    return [(items[0][i], items[1][j]) for i, j in leads(shared)] if all(sides) else []


def _by_name(home: Item) -> dict[tuple[str, ...], Item]:
    """What stands in a module and is no vector, by what its name says beyond a kind of layer; no two say the same."""
    items = [i for i in home.children if i.rank >= 2]
    names = [_telling_part(place_in(i, home)) for i in items]
    counts = Counter(names)
    return {name: i for name, i in zip(names, items) if name and counts[name] == 1}


def _telling_part(path: str) -> tuple[str, ...]:
    """The words of the last part of a path that says more than a kind of layer or a list."""
    parts = (tuple(w for w in plain_words(p) if len(w) > 1) for p in reversed(path.split(".")))
    return next((tuple(w for w in ws if w not in LAYER_NAMES) for ws in parts if set(ws) - LAYER_NAMES - LISTS), ())


def makes_of(root: Item) -> Counter[object]:
    """How many members of lists below a module hold tensors of the same shapes."""
    found: Counter[object] = Counter()
    modules = [root]
    while modules:
        inside = [child for child in modules.pop().children if child.level == 2]
        found.update(child.profile_key for child in inside if any(c.isdigit() for c in child.path.rpartition(".")[2]))
        modules += inside
    return found


def _word_counts(root: Item) -> Counter[str]:
    return Counter(w for name in root.names for w in set(plain_words(name)))


@dataclass(frozen=True)
class Pair:
    """A decided pair: what belongs together, and by which kind of evidence."""

    source: Item
    target: Item
    cell: str
    first: bool = True  # of its family: the others follow from it, so they don't vote
    by_number: bool = False  # nothing but its number tells it from others of its family


@dataclass(frozen=True)
class Tie:
    """Families of both sides that belong together in an order that neither paths nor words tell; equally many."""

    sources: tuple[Family, ...]
    targets: tuple[Family, ...]
    reason: str = "same shapes, and neither names nor order decide between them"

    @classmethod
    def of(cls, s: Item, t: Item, region: Region, reason: str) -> Tie:
        """Two items that belong together or to nothing."""
        return cls(tuple(families_of([s], region.source)), tuple(families_of([t], region.target)), reason)

    @classmethod
    def between(cls, sources: Sequence[Family], targets: Sequence[Family], reason: str) -> Tie:
        """The members of families, one by one."""
        return cls(tuple(literal(sources)), tuple(literal(targets)), reason)

    @property
    def rank(self) -> int:
        """Whether it is about matrices or vectors."""
        return min(self.sources[0].members[0].rank, 2)


@dataclass
class Decision:
    """What a class decided; members in none of the lists stay open for other steps."""

    pairs: list[Pair] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)


@lru_cache(maxsize=10_000)
def around(place: str) -> frozenset[str]:
    """A place and those of the modules around it."""
    parts = place.split(".")
    return frozenset(".".join(parts[:k]) for k in range(1, len(parts) + 1))


@lru_cache(maxsize=10_000)
def _part_of(path: str) -> str:
    words = {*plain_words(path)}
    found = [name for name, known in ((ATTENTION, ATTENTIONS), (FEED, FEEDS)) if words & known]
    return found[0] if len(found) == 1 else ""


@lru_cache(maxsize=10_000)
def member_of(path: str) -> tuple[str, str]:
    """A path down to the last number, and the rest of it."""
    parts = path.split(".")
    k = next((k for k in range(len(parts), 0, -1) if any(map(str.isdigit, parts[k - 1]))), 0)
    return ".".join(parts[:k]), ".".join(parts[k:])


def other_name(s: Item, t: Item, region: Region) -> str:
    """Whether the names of two items have nothing in common: their own names, or all below the region."""
    if not foreign(own_name(s), own_name(t)):
        return ""
    if related(own_name(s, 2), own_name(t)) or related(own_name(s), own_name(t, 2)):
        return ""  # one is wrapped: query.base_layer and query
    whole = [
        plain_words(owner_path(relative(i.main, r)) if i.level < 2 else relative(i, r))
        for i, r in ((s, region.source), (t, region.target))
    ]
    own = "" if foreign(whole[0], whole[1]) else "own "
    module = ("small " if len(s.tensors) < 4 else "") + "module " if max(s.level, t.level) == 2 else ""
    return f"other {own}{module}name"


def ends_of(infos: Sequence[ParameterInfo]) -> frozenset[int]:
    """Ordinals of the matrices at the ends of a model: nothing takes in what they put out.

    What stands in a part of the model beside two others, and not all of it, is no end: a branch, a gate. Nor is that
    beside which a norm of its outputs stands.
    """
    matrices = [(k, i, i.module_path.rpartition(".")[0]) for k, i in enumerate(infos) if len(shape_key(i.shape)) >= 2]
    parts: Counter[str] = Counter()
    for path, count in Counter(home for _, _, home in matrices).items():
        parts.update(dict.fromkeys(around(path), count))
    large = {part for part, count in parts.items() if part and 2 < count <= len(matrices) / 2}
    normed = {(i.module_path.rpartition(".")[0], *i.shape) for i in infos if i.leaf == "weight" and len(i.shape) == 1}
    found: set[int] = set()
    taken_in: set[int] = set()
    for k, i, home in reversed(matrices):
        is_map = "Embed" not in i.module_type and i.leaf in ("weight", "kernel")  # no table, no gates of a cell
        is_end = is_map and i.shape[0] > 1 and i.shape[0] not in taken_in
        if is_end and (home, i.shape[0]) not in normed and large.isdisjoint(around(home)):
            found.add(k)
        taken_in.add(i.shape[1])
    return frozenset(found)
