"""The decision: what earns a pair its place against all its rivals, and what stays open.

A *class* is a set of items of one size below two corresponding modules, any of which could be any other by its shape.
Its pairs are decided by kinds of evidence, the strongest first. How much of a kind there is does not count, since that
does not carry over to other code; whether it is there does (:mod:`lit_wsl.matching.risks` counts how often each kind
was right):

1. **path**: the same path with equal sets of numbers along it; never given away.
2. **words**: the words that tell an item from its rivals lead over every rival, from both sides.
3. **alone**: the only one of its size, where both sides hold the same number of elements.
4. **numbers**: members of a family go by their numbers, if both sides have the same, or count as they stand.
5. **exclusion**: the last one left, where everything else was decided by the steps before.
6. **order**: what is left goes by its place among the decided siblings of the same module, if the source has an order,
   if nothing dissents, and if so much agrees that it can't be chance.

Everything else stays open.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.risks import may_load
from lit_wsl.matching.shapes import TRANSPOSED, PairCosts
from lit_wsl.matching.tree import (
    Family,
    Item,
    evened,
    families_of,
    literal_if_needed,
    owner_path,
    place_in,
    relative,
    shape_key,
    telling_words,
)
from lit_wsl.matching.tree import literal as _literal
from lit_wsl.matching.words import is_abbreviation, path_tokens, split_numbers
from lit_wsl.structure.description import ParameterInfo, Shape

PATH, TIED, WORDS, HALF_WORDS, PART_WORDS = "path", "tied", "words", "half words", "some words"
LETTERS, NEAR_WORDS = "letters", "neighbour's words"
ALONE, DISTINCT, STRONG = "alone", "distinct shape", "much structure"
FORMULA = ("q", "k", "v")  # the letters of Attention(Q, K, V); any other letter may stand for anything
ORDER, ORDER_BACKED, ORDER_OF_KIND, ORDER_ALONE = "order", "order, as elsewhere", "order of a kind", "order alone"
ROLE, COUNT = "as in other blocks", "both count"
OTHER_WORDS = "the last ones left of their size, but their names fit others better"
TURNED = "the shapes fit as they are, but the names say that matrices are stored the other way round"
OTHER_HEAD = "the only ones of this size, but called after different things: it may be another head"
ENDS = frozenset(  # what the last layer is called in any model, so that it says nothing about what it is for
    (
        "head",
        "heads",
        "fc",
        "classifier",
        "linear",
        "last",
        "final",
        "logits",
        "output",
        "out",
        "proj",
        "projection",
        "dense",
        "layer",
        "lm",
        "predictions",
        "decoder",
        "cls",
        "model",
        "net",
        "module",
        "backbone",
        "to",
        "lin",
        "score",
    )
)
BLOCK = 64  # tensors; larger regions teach nothing about their like
SIDES = frozenset(("pre", "post", "before", "after"))  # says that the other words name a neighbour
SURE, SOME = 12, 6  # in one of so many orders as much would agree by chance
Key = tuple[Any, ...]
NUMBERS, ASCENDING, EXCLUSION = "numbers", "ascending", "exclusion"


@dataclass(frozen=True)
class Sides:
    """What is known of the two sides as wholes.

    Attributes:
        ties: How many names each tied source tensor has.
        ordered: Whether the source has an order of registration.
        execution: When the target runs each of its tensors, by ordinal.
        heads: Ordinals of the target's matrices at its ends (:func:`ends_of`).
    """

    ties: Mapping[str, int] = field(default_factory=dict)
    ordered: bool = True
    execution: tuple[int | None, ...] = ()
    heads: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Region:
    """Where items are compared: below ``source`` and ``target``.

    Attributes:
        source: Root of the source's side.
        target: Root of the target's side.
        complete: Whether both sides have the same number of elements, so that everything must find a partner.
        shapes: How many tensors of each shape (up to order and ones) the whole models have, source and target.
    """

    source: Item
    target: Item
    complete: bool
    shapes: tuple[Counter[Shape], Counter[Shape]] | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Equal for regions of the same structure, which are solved once."""
        return self.source.structure, self.target.structure

    @cached_property
    def _counters(self) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        return numbers_along(self.names[0]), numbers_along(self.names[1])

    def same_numbers(self, path: str) -> bool:
        """Whether every number along a path counts the same things on both sides."""
        return all(self._counters[0].get(place) == self._counters[1].get(place) for place, _ in counted(path))

    @cached_property
    def names(self) -> tuple[list[str], list[str]]:
        """The paths of all tensors below, source and target."""
        return tuple([relative(t, root) for t in root.tensors] for root in (self.source, self.target))  # type: ignore

    @cached_property
    def words(self) -> tuple[Counter[str], Counter[str]]:
        """How many tensors have each word in their path, source and target."""
        return _word_counts(self.source), _word_counts(self.target)


@lru_cache(maxsize=200_000)
def counted(path: str) -> tuple[tuple[str, str], ...]:
    """The places along a path where something is counted, and the number there.

    >>> counted("layer1.0.conv")
    (('layer#', '1'), ('layer1.#', '0'))
    """
    parts, found = path.split("."), []
    for k, part in enumerate(parts):
        digits = "".join(c for c in part if c.isdigit())
        if digits:
            stem = "".join("#" if c.isdigit() else c for c in part)
            found.append((".".join((*parts[:k], stem)), digits))
    return tuple(found)


def numbers_along(paths: Iterable[str]) -> dict[str, set[str]]:
    """The numbers that occur at each place where paths count."""
    found: dict[str, set[str]] = {}
    for path in paths:
        for place, number in counted(path):
            found.setdefault(place, set()).add(number)
    return found


def _word_counts(root: Item) -> Counter[str]:
    return Counter(w for t in root.tensors for w in set(path_tokens(relative(t, root))) if not w.isdigit())


class Roles:
    """Partners by their places in blocks of one list, where they were certain.

    In the first block of a stage ``conv3`` and ``downsample`` may have one shape, so nothing there tells which is
    which; in the next block there is no ``downsample``, and ``conv3`` is certain.
    """

    def __init__(self) -> None:
        self._regions: dict[tuple[int, int], tuple[Region, set[tuple[str, str]]]] = {}

    def teach(self, region: Region, s: Item, t: Item) -> None:
        """Remember a certain pair."""
        if max(len(region.source.tensors), len(region.target.tensors)) <= BLOCK:
            places = (place_in(s, region.source), place_in(t, region.target))
            self._regions.setdefault(region.key, (region, set()))[1].add(places)

    def partners(self, region: Region, s: Item, t: Item) -> bool:
        """Whether two places were partners in other blocks of this make, and neither had another partner."""
        a, b = place_in(s, region.source), place_in(t, region.target)
        known = {
            pair
            for key, (other, pairs) in self._regions.items()
            if key != region.key and _same_make(region, other)
            for pair in pairs
            if a == pair[0] or b == pair[1]
        }
        return known == {(a, b)}


def _same_make(a: Region, b: Region) -> bool:
    """Whether both stand in the same lists, and one's tensors are, in order, among the other's on both sides."""
    lists = [(split_numbers(r.source.path)[0], split_numbers(r.target.path)[0]) for r in (a, b)]
    return lists[0] == lists[1] and all(
        _within(x, y) or _within(y, x) for x, y in ((a.names[0], b.names[0]), (a.names[1], b.names[1]))
    )


def _within(a: Sequence[str], b: Sequence[str]) -> bool:
    rest = iter(b)
    return all(name in rest for name in a)


def is_named(cell: str) -> bool:
    """Whether names decided."""
    return cell.startswith((PATH, TIED, WORDS, HALF_WORDS, PART_WORDS, "open"))


@dataclass(frozen=True)
class Pair:
    """A decided pair: what belongs together, and by which kind of evidence."""

    source: Item
    target: Item
    cell: str
    margin: float = 1.0
    first: bool = True  # of its family: the others follow from it, so they don't vote


@dataclass(frozen=True)
class Tie:
    """Families of both sides that belong together in an order that neither paths nor words tell; equally many."""

    sources: tuple[Family, ...]
    targets: tuple[Family, ...]
    reason: str = "same shapes, and neither names nor order decide between them"

    @property
    def rank(self) -> int:
        """Whether it is about matrices or vectors."""
        return min(self.sources[0].members[0].rank, 2)


@dataclass
class Decision:
    """What a class decided; members in none of the lists stay open for other steps."""

    pairs: list[Pair] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    closed: list[Item] = field(default_factory=list)


class ClassSolver:
    """Decides classes.

    Args:
        options: How to match; ``shape_only`` ignores names.
        costs: What pairs cost by structure and shapes.
        sides: What is known of the two sides as wholes.
        roles: What other blocks were certain of, in the pass before.
    """

    def __init__(self, options: MatchingOptions, costs: PairCosts, sides: Sides, roles: Roles) -> None:
        self.names = options.strategy != "shape_only"
        self.costs = costs
        self.ties = sides.ties
        self.heads = sides.heads
        self.ordered = sides.ordered
        self.roles = roles

    def solve(self, s: list[Item], t: list[Item], region: Region) -> Decision:
        """Decide a class: members in registration order, and where they stand."""
        if (
            len(s) == 1
            and 1 < len(t) <= self.ties.get(s[0].main.path, 1)
            and all(self.costs.of(s[0], i) == 0.0 for i in t)
        ):
            return Decision([Pair(s[0], i, TIED) for i in t])
        out = Decision()
        parts = _parts(s, t, exact=not self.costs.turned)
        if len(parts) > 1 and self.names and self._named_turned(s, t, region):
            left = [list(x) for x in self._by_path(s, t, region, out)]
            if all(left):
                fs, ft = (_literal(families_of(x, r)) for x, r in zip(left, (region.source, region.target)))
                out.ties.append(Tie(tuple(fs), tuple(ft), TURNED))
            return out
        for a, b, balanced in parts:
            self._solve_part(a, b, balanced, region, out)
        return out

    def _named_turned(self, s: list[Item], t: list[Item], region: Region) -> bool:
        """Whether names single out a partner that would have to be transposed, where the shapes say another."""
        if not any(len(i.main.shape) == 2 and i.level < 2 for i in s):
            return False
        fs, ft = families_of(s, region.source), families_of(t, region.target)
        shared, _ = self._likenesses(fs, ft, region)
        return any(self.costs.of_families(fs[i], ft[j]) == TRANSPOSED for i, j, _ in leads(shared))

    def _solve_part(self, s: list[Item], t: list[Item], balanced: bool, region: Region, out: Decision) -> None:
        if len(s) == len(t) == 1:
            self._single(s[0], t[0], region, out)
            return
        alone = len(s), len(t)
        s, t = self._by_path(s, t, region, out)
        if not s or not t or not self.names:
            if s and t and balanced and region.complete:
                self._tie(_literal(families_of(s, region.source)), _literal(families_of(t, region.target)), out)
            return
        sure = region.complete or all(_strong(i) for i in (*s, *t))
        fs, ft = families_of(s, region.source), families_of(t, region.target)
        if len(s) == len(t) and sure:
            fs, ft = evened(fs, ft)
            if sorted(len(f.members) for f in fs) != sorted(len(f.members) for f in ft):
                fs, ft = _literal(fs), _literal(ft)
        else:
            fs, ft = literal_if_needed(fs, ft)
        self._by_words(fs, ft, region, sure and len(s) == len(t), out, fixed=(len(s), len(t)) != alone)

    # the only one ------------------------------------------------------------------------------------------------

    def _single(self, s: Item, t: Item, region: Region, out: Decision) -> None:
        if self.costs.of(s, t) is None:
            return
        if self._other_head(s, t, region):
            out.ties.append(
                Tie(
                    tuple(_literal(families_of([s], region.source))),
                    tuple(_literal(families_of([t], region.target))),
                    OTHER_HEAD,
                )
            )
            return
        paths = relative(s, region.source), relative(t, region.target)
        if paths[0] == paths[1] and region.same_numbers(paths[0]) and s.profile == t.profile:
            cell = PATH
        elif region.complete and (s.profile == t.profile or max(s.level, t.level) < 2):
            cell = ALONE
        elif region.complete and max(s.level, t.level) == 2:
            words = [[w for w in path_tokens(p) if not w.isdigit()] for p in paths]
            likeness = liken(words[0], words[1])
            if paths[0] != paths[1] and likeness.best < 2:
                return
            cell = ALONE + ", other inside"
        elif _strong(s) and s.profile == t.profile:
            cell = STRONG
        else:
            words = [[w for w in path_tokens(p) if not w.isdigit()] for p in paths]
            likeness = liken(words[0], words[1])
            if likeness.shared and likeness.kind == WORDS:
                cell = "open " + WORDS
            elif region.shapes is not None and s.rank >= 2 and s.profile == t.profile and _unique(s, t, region):
                cell = DISTINCT
            elif _called_alike(s, t):
                cell = "open own name"
            else:
                return
        if may_load(cell):
            out.pairs.append(Pair(s, t, cell))

    def _other_head(self, s: Item, t: Item, region: Region) -> bool:
        """Whether two units stand at the end of their models and are called after different things."""
        if t.start not in self.heads or max(s.level, t.level) == 2:
            return False
        if any(c.isdigit() for i in (s, t) for c in owner_path(i.main.path)):
            return False
        named = [_own_words(i) for i in (s, t)]
        apart = [{w for w in words - ENDS if len(w) > 1} for words in named]
        if s.path == t.path or not (apart[0] and apart[1]):
            return False
        return not any(strength(a, b)[0] >= 0.6 for a in apart[0] for b in apart[1])

    # the same path -----------------------------------------------------------------------------------------------

    def _by_path(self, s: list[Item], t: list[Item], region: Region, out: Decision) -> tuple[list[Item], list[Item]]:
        theirs = {relative(i, region.source): i for i in s}
        taken: set[int] = set()
        for i in t:
            path = relative(i, region.target)
            twin = theirs.get(path)
            if twin is not None and self.costs.of(twin, i) is not None and region.same_numbers(path):
                out.pairs.append(Pair(twin, i, PATH, first=not path or path[-1] in "0" or not path[-1].isdigit()))
                taken |= {id(twin), id(i)}
        return [i for i in s if id(i) not in taken], [i for i in t if id(i) not in taken]

    # words -------------------------------------------------------------------------------------------------------

    def _by_words(
        self, fs: list[Family], ft: list[Family], region: Region, sure: bool, out: Decision, fixed: bool
    ) -> None:
        n, m = len(fs), len(ft)
        if n == m == 1:
            if sure or _alike(fs[0], ft[0]):
                if fixed and _called_otherwise(fs[0].members[0], ft[0].members[0]):
                    out.ties.append(Tie(tuple(_literal(fs)), tuple(_literal(ft)), OTHER_WORDS))
                    return
                cell = EXCLUSION if fixed else ALONE if region.complete else STRONG
                cell = cell if sure else "open " + cell
                if any(self._other_head(a, b, region) for a, b in zip(fs[0].members, ft[0].members)):
                    out.ties.append(Tie(tuple(_literal(fs)), tuple(_literal(ft)), OTHER_HEAD))
                elif may_load(cell):
                    self._zip(fs[0], ft[0], cell, out)
            return
        shared, kinds = self._likenesses(fs, ft, region)
        open_s, open_t = set(range(n)), set(range(m))
        for i, j in self._by_role(fs, ft, region) if sure else ():
            self._zip(fs[i], ft[j], ROLE, out)
            open_s.discard(i)
            open_t.discard(j)
            shared[i, :] = shared[:, j] = -1.0
        for i, j, lead in leads(shared):
            cell = kinds[i][j]
            cell = cell if sure else "open " + cell
            if not may_load(cell):
                continue
            self._zip(fs[i], ft[j], cell, out, lead)
            open_s.discard(i)
            open_t.discard(j)
        if not sure or not open_s or not open_t:
            return
        left_s, left_t = [fs[i] for i in sorted(open_s)], [ft[j] for j in sorted(open_t)]
        if _counted_alike(left_s, left_t):
            for f, g in zip(*(sorted(side, key=lambda f: _count(f, side)) for side in (left_s, left_t))):
                self._zip(f, g, COUNT, out)
            return
        if len(left_s) == len(left_t) == 1 and len(left_s[0].members) == len(left_t[0].members):
            i, j = next(iter(open_s)), next(iter(open_t))
            better = max(shared[i].max(), shared[:, j].max()) > shared[i, j]
            better = better or (fixed and _called_otherwise(left_s[0].members[0], left_t[0].members[0]))
            head = any(self._other_head(a, b, region) for a, b in zip(left_s[0].members, left_t[0].members))
            if better or head:
                out.ties.append(
                    Tie(tuple(_literal(left_s)), tuple(_literal(left_t)), OTHER_HEAD if head else OTHER_WORDS)
                )
                return
            self._zip(left_s[0], left_t[0], EXCLUSION, out)
            return
        self._tie(left_s, left_t, out)

    def _by_role(self, fs: list[Family], ft: list[Family], region: Region) -> list[tuple[int, int]]:
        """Pairs that were partners wherever else blocks of this list were certain of them, and had no other partner."""
        found = []
        for i, f in enumerate(fs):
            for j, g in enumerate(ft):
                (s, *more_s), (t, *more_t) = f.members, g.members
                alone = not more_s and not more_t
                if alone and self.costs.of(s, t) is not None and self.roles.partners(region, s, t):
                    found.append((i, j))
        return found

    def _likenesses(self, fs: list[Family], ft: list[Family], region: Region) -> tuple[np.ndarray, list[list[str]]]:
        words_s, words_t = _telling(fs, ft), _telling(ft, fs)
        near_s, near_t = self._near((fs, ft), region, 0), self._near((fs, ft), region, 1)
        shared = np.full((len(fs), len(ft)), -1.0)
        kinds = [[""] * len(ft) for _ in fs]
        for i, f in enumerate(fs):
            for j, g in enumerate(ft):
                if self.costs.of_families(f, g) is None:
                    continue
                likeness = liken(words_s[i], words_t[j], near_s, near_t)
                shared[i, j] = likeness.shared
                kinds[i][j] = likeness.kind
        return shared, kinds

    def _near(self, families: tuple[list[Family], list[Family]], region: Region, side: int) -> frozenset[str]:
        """Words of own names of vectors that also name other things: ``attention_norm`` stands near the attention."""
        if families[side][0].members[0].rank >= 2:
            return frozenset()
        outside: set[str] = set()
        own: set[str] = set()
        for k, root in enumerate((region.source, region.target)):
            here: Counter[str] = Counter()
            for m in (m for f in families[k] for m in f.members):
                for t in m.tensors:
                    here.update(set(path_tokens(relative(t, root))))
                if k == side:
                    own.update(path_tokens(place_in(m, root).rpartition(".")[2]))
            outside |= {w for w, c in region.words[k].items() if c > here[w]}
        return frozenset(w for w in own if any(strength(w, o)[1] >= 2 for o in outside))

    # families and ties --------------------------------------------------------------------------------------------

    def _zip(self, f: Family, g: Family, cell: str, out: Decision, lead: float = 1.0) -> None:
        """Pair the members of two families by number."""
        if len(f.members) == 1:
            out.pairs.append(Pair(f.members[0], g.members[0], cell, lead))
            return
        found = number_map(f, g, self.ordered)
        if found is None:
            why = "numbered otherwise on the two sides, and nothing tells which number became which"
            out.ties.append(Tie(tuple(_literal([f])), tuple(_literal([g])), why))
            return
        members, kind = found
        for k, (a, b) in enumerate(zip(f.members, members)):
            out.pairs.append(Pair(a, b, cell if kind == NUMBERS else f"{cell}, {kind}", lead, first=k == 0))

    def _tie(self, left_s: list[Family], left_t: list[Family], out: Decision) -> None:
        """Leave families open that fit together; order may decide."""
        if sorted(len(f.members) for f in left_s) != sorted(len(f.members) for f in left_t):
            left_s, left_t = _literal(left_s), _literal(left_t)
        if len(left_s) == len(left_t):
            out.ties.append(Tie(tuple(left_s), tuple(left_t)))


def _parts(s: list[Item], t: list[Item], *, exact: bool) -> list[tuple[list[Item], list[Item], bool]]:
    """Cut a class by shapes where that gives both sides equally many; the rest stays together.

    By exact shapes first, so that nothing is transposed without need.
    """
    if len(s) == len(t) == 1:
        return [(s, t, True)]
    parts = []
    for key in (_exact_shapes, _shapes) if exact else (_shapes,):
        keys_s, keys_t = _by(key, s), _by(key, t)
        s, t = [], []
        for value in sorted({*keys_s, *keys_t}):
            a, b = keys_s.get(value, []), keys_t.get(value, [])
            if len(a) == len(b):
                parts.append((a, b, True))
            else:
                s += a
                t += b
    if s and t:
        s, t = (sorted(side, key=lambda i: i.start) for side in (s, t))
        parts.append((s, t, len(s) == len(t)))
    return parts


def _telling(families: Sequence[Family], others: Sequence[Family]) -> list[tuple[str, ...]]:
    """The words that tell families from their rivals; where there is no rival, those that tell the other side's."""
    common = set.intersection(*(set(f.words) for f in others)) if len(families) == 1 < len(others) else set()
    return [tuple(w for w in ws if not w.isdigit() and w not in common) for ws in telling_words(families)]


def _counted_alike(fs: Sequence[Family], ft: Sequence[Family]) -> bool:
    """Whether nothing but a count tells either side's items apart: 1 and 2, a and b, before and after."""
    if len(fs) != len(ft) or any(len(f.members) != 1 for f in (*fs, *ft)):
        return False
    return all(sorted(_count(f, side) for f in side) == list(range(len(side))) for side in (fs, ft))


def _count(family: Family, side: Sequence[Family]) -> int:
    """Place of a family among those of its side by what tells it from them; -1 if that is no count."""
    telling = telling_words(side)
    words = telling[list(side).index(family)]
    every = sorted({w for ws in telling for w in ws})
    if len(words) != 1 or any(len(ws) != 1 for ws in telling):
        return -1
    if all(w.isdigit() for w in every):
        return sorted(map(int, every)).index(int(words[0]))
    for row in ("abcdefgh", ("before", "after"), ("pre", "post")):
        if set(every) == set(row[: len(every)]):
            return row.index(words[0])
    return -1


def _by(key: Callable[[Item], Key], items: Sequence[Item]) -> dict[Key, list[Item]]:
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _exact_shapes(item: Item) -> tuple[Any, ...]:
    return tuple(sorted(Counter(tuple(d for d in t.shape if d != 1) for t in item.tensors).items()))


def _shapes(item: Item) -> tuple[Any, ...]:
    return item.profile_key


def _called_alike(s: Item, t: Item) -> bool:
    """Whether the last parts of two paths say the same."""
    own = [[w for w in path_tokens(owner_path(i.main.path).rpartition(".")[2]) if not w.isdigit()] for i in (s, t)]
    telling = all(set(words) - ENDS for words in own)
    return telling and liken(own[0], own[1]).kind == WORDS


def _called_otherwise(s: Item, t: Item) -> bool:
    """Whether both have names of their own that don't agree: where the others kept theirs, it is another thing."""
    own = [[w for w in path_tokens(owner_path(i.main.path).rpartition(".")[2]) if not w.isdigit()] for i in (s, t)]
    likeness = liken(own[0], own[1])
    return all(any(len(w) > 2 for w in left) for left in (likeness.left_s, likeness.left_t))


def _own_words(item: Item) -> frozenset[str]:
    """The words of the last two parts of a path."""
    parts = owner_path(item.main.path).split(".")[-2:]
    return frozenset(w for part in parts for w in path_tokens(part) if not w.isdigit())


def ends_of(infos: Sequence[ParameterInfo]) -> frozenset[int]:
    """Ordinals of the matrices at the ends of a model: outside of lists, and nothing takes in what they put out."""
    matrices = [(k, i) for k, i in enumerate(infos) if len(shape_key(i.shape)) >= 2]
    return frozenset(
        k
        for k, i in matrices
        if "Embed" not in i.module_type
        and i.leaf == "weight"
        and i.shape[0] > 1
        and not any(later.shape[1] == i.shape[0] for n, later in matrices if n > k)
    )


def _strong(item: Item) -> bool:
    """Whether so much structure is below that an equal one elsewhere can't be chance."""
    return len(item.tensors) >= 4 and len(item.profile) >= 2


def _unique(s: Item, t: Item, region: Region) -> bool:
    assert region.shapes is not None
    return all(counts[shape_key(i.main.shape)] == 1 for counts, i in zip(region.shapes, (s, t)))


def _alike(f: Family, g: Family) -> bool:
    return f.pattern == g.pattern


def number_map(f: Family, g: Family, ordered: bool) -> tuple[tuple[Item, ...], str] | None:
    """The members of ``g`` in the order of ``f``, and by which evidence; ``None`` if nothing tells."""
    if len(f.members) != len(g.members):
        return None
    up_s, up_t = _direction(f.members), _direction(g.members)
    sets = [[tuple(n[a] for n in fam.numbers) for a in fam.axes()] for fam in (f, g)]
    whole = [[tuple(n[a] for a in fam.axes()) for n in fam.numbers] for fam in (f, g)]
    if sorted(whole[0]) == sorted(whole[1]):
        if ordered and up_s * up_t < 0:
            return None  # counted down on one side
        place = dict(zip(whole[1], g.members))
        return tuple(place[n] for n in whole[0]), NUMBERS
    for a in sets[0]:
        for b in sets[1]:
            if len(set(a)) == len(a) == len(b) and set(a) == set(b):  # chunk and number, against number
                place_1 = dict(zip(b, g.members))
                return tuple(place_1[n] for n in a), NUMBERS
    if ordered and up_s == up_t == 1:
        return g.members, ASCENDING
    return None


def _direction(items: Sequence[Item]) -> int:
    """1 if items stand in the order given, -1 if the other way round, 0 if neither."""
    steps = {a.start < b.start for a, b in pairwise(items)}
    return (1 if steps == {True} else -1) if len(steps) == 1 else 0


# words ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=200_000)
def strength(a: str, b: str) -> tuple[float, int]:
    """How strongly two words stand for each other, and how: 3 equal, 2 abbreviated or inflected, 1 a letter."""
    if a == b:
        return 1.0, 3
    if a.isdigit() or b.isdigit():
        return 0.0, 0
    a, b = (w[1:] if len(w) == 2 and w[0] == "w" else w for w in (a, b))  # wq: the weight of the queries
    if a == b:
        return 0.9, 1 + (a.isdigit() or a in FORMULA)
    short, long = sorted((a, b), key=lambda w: (len(w), w))
    if is_abbreviation(short, long) and (long.startswith(short) or not set(short[1:]) & set("aeiou")):
        return (0.8, 2) if len(short) > 1 else (0.7, 1) if short in FORMULA else (0.0, 0)
    if short in long and len(short) >= 3:
        return 0.6, 2
    stem = next((k for k, (x, y) in enumerate(zip(short, long)) if x != y), len(short))
    if stem >= 3 and stem >= 0.75 * len(short):
        return 0.6, 2
    return 0.0, 0


@dataclass(frozen=True)
class Likeness:
    """How two lists of words agree: weight shared, the best kind of a shared word, and what is left over."""

    shared: float
    best: int
    left_s: tuple[str, ...]
    left_t: tuple[str, ...]
    only_near: bool = False

    @property
    def kind(self) -> str:
        """The cell of a pair that leads by it."""
        left = {*self.left_s, *self.left_t}
        if (self.only_near and left) or left & SIDES:
            return NEAR_WORDS
        if self.best == 1:
            return LETTERS
        return PART_WORDS if self.left_s and self.left_t else HALF_WORDS if self.left_s or self.left_t else WORDS


def liken(
    a: Sequence[str], b: Sequence[str], near_a: frozenset[str] = frozenset(), near_b: frozenset[str] = frozenset()
) -> Likeness:
    """Pair the words of two lists one to one, the strongest first."""
    scored = sorted(
        (-value, -kind, i, j)
        for i, x in enumerate(a)
        for j, y in enumerate(b)
        for value, kind in [strength(x, y)]
        if value
    )
    used_a: set[int] = set()
    used_b: set[int] = set()
    shared, best, near = 0.0, 0, True
    for value, kind, i, j in scored:
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            shared -= value
            best = max(best, -kind)
            near = near and (a[i] in near_a or b[j] in near_b)
    left_a, left_b = (
        tuple(w for i, w in enumerate(a) if i not in used_a),
        tuple(w for j, w in enumerate(b) if j not in used_b),
    )
    return Likeness(shared, best, left_a, left_b, bool(used_a) and near)


def leads(shared: np.ndarray) -> list[tuple[int, int, float]]:
    """Pairs that lead over every rival of their row and of their column, and by how much."""
    found = []
    for i, row in enumerate(shared):
        j = int(row.argmax())
        value = row[j]
        rivals = max((*np.delete(row, j), *np.delete(shared[:, j], i)), default=0.0)
        if value > 0 and value > rivals + 1e-9:
            found.append((i, j, float(min(1.0, value - max(rivals, 0.0)))))
    return found


# order ---------------------------------------------------------------------------------------------------------------


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
