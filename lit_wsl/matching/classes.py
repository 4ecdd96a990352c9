"""Deciding a class: several items of one size on both sides, which belongs to which?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.optimize import linear_sum_assignment

from lit_wsl.matching.evidence import MAX_TENSORS, ORDER_WEIGHT, Evidence, Make, make_of
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.shapes import TRANSPOSED, PairCosts
from lit_wsl.matching.tree import (
    Family,
    Item,
    aligned_axes,
    evened,
    families_of,
    literal_if_needed,
    place_end,
    place_in,
    relative,
    same_numbering,
    shape_key,
    telling_words,
)
from lit_wsl.matching.words import (
    ABBREVIATION,
    Dictionary,
    best_pairs_similarity,
    path_tokens,
    shared_evidence,
    token_similarity,
    weighted_similarity,
)
from lit_wsl.structure.description import Shape

FORBIDDEN = 1e6


def assign(cost: np.ndarray) -> list[tuple[int, int, float]]:
    """Solve the linear assignment problem and tell the margin of every pair.

    The margin of a pair is half the cost of the cheapest change of the whole assignment that breaks the pair: the
    cheapest alternating cycle through it in the residual graph (all-pairs shortest paths), half of it because the
    cheapest cycle is nearly always a swap, which changes two pairs.

    Args:
        cost: Matrix ``(n, m)``; entries of at least ``FORBIDDEN`` are impossible.

    Returns:
        ``(row, column, margin)`` of every possible pair, by row.

    >>> assign(np.array([[0.0, 1.0], [1.0, 0.0]]))
    [(0, 0, 1.0), (1, 1, 1.0)]
    >>> assign(np.array([[0.5, 0.5], [0.5, 0.5]]))[0][2]
    0.0
    """
    n, m = cost.shape
    size = max(n, m)
    square = np.zeros((size, size))  # missing rows and columns cost nothing, wherever they go
    square[:n, :m] = np.minimum(cost, FORBIDDEN)
    rows, columns = linear_sum_assignment(square)
    sigma = np.empty(size, dtype=int)
    sigma[rows] = columns
    own = square[np.arange(size), sigma]
    step = square[:, sigma] - own[:, None]  # (size, size): row i takes the column of row k
    np.fill_diagonal(step, np.inf)
    best = step.copy()
    for k in range(size):  # Floyd-Warshall; no negative cycles at the optimum
        np.minimum(best, best[:, k, None] + best[None, k, :], out=best)
    margins = np.diagonal(best) / 2
    return [
        (i, int(sigma[i]), float(min(max(margins[i], 0.0), 1.0)) if size > 1 else 1.0)
        for i in range(n)
        if sigma[i] < m and square[i, sigma[i]] < FORBIDDEN
    ]


@dataclass(frozen=True)
class Region:
    """Where items are compared: below ``source`` and ``target``.

    Attributes:
        source: Root of the source's side.
        target: Root of the target's side.
        complete: Whether both sides have the same number of elements, so that everything must find a partner and
            being the only one of a size is proof enough.
        shapes: How many tensors of each shape (up to order and ones) the whole models have, source and target.
    """

    source: Item
    target: Item
    complete: bool
    shapes: tuple[Counter[Shape], Counter[Shape]] | None = None

    @cached_property
    def make(self) -> Make | None:
        """The make of the region, if it is no larger than a block."""
        names = [[relative(t, root) for t in root.tensors[: MAX_TENSORS + 1]] for root in (self.source, self.target)]
        return make_of(names[0], names[1])

    @cached_property
    def renumbered(self) -> frozenset[str]:
        """Containers whose members were renumbered: an equal path there leads to tensors of different shapes.

        Where a layer was inserted into a sequence, equal numbers no longer mean equal places.
        """
        shapes = {relative(t, self.source): shape_key(t.shape) for t in self.source.tensors}
        found = set()
        for tensor in self.target.tensors:
            path = relative(tensor, self.target)
            if path in shapes and shapes[path] != shape_key(tensor.shape):
                container, _, member = place_in(tensor, self.target).rpartition(".")
                if member.isdigit():
                    found.add(container)
        return frozenset(found)

    def stands_by_number(self, s: Item, t: Item) -> bool:
        """Whether two items agree by a number that says nothing, since their container was renumbered."""
        return any(
            member.isdigit() and container in self.renumbered
            for container, _, member in (
                place_in(i, r).rpartition(".") for i, r in ((s, self.source), (t, self.target))
            )
        )

    @property
    def key(self) -> tuple[int, int]:
        """Equal for regions of the same structure, which are solved once."""
        return self.source.structure, self.target.structure

    @property
    def spans(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Ordinals of the region's tensors on both sides: the first, and the one behind the last."""
        s, t = self.source.positions, self.target.positions
        return (s[0], s[-1] + 1), (t[0], t[-1] + 1)

    def places(self, s: Item, t: Item) -> tuple[str, str, str, str]:
        """Where two items stand: their paths in the region, and the ends of their paths that other blocks share."""
        return place_in(s, self.source), place_in(t, self.target), place_end(s), place_end(t)

    def distinct(self, s: Item, t: Item) -> bool:
        """Whether the items are matrices of a shape that nothing else in either model has."""
        if self.shapes is None or s.rank < 2 or s.profile != t.profile:
            return False
        return all(counts[shape_key(i.main.shape)] == 1 for counts, i in zip(self.shapes, (s, t)))


@dataclass(frozen=True)
class Pair:
    """A decided pair.

    Attributes:
        source: Item of the source.
        target: Item of the target.
        margin: How much worse the best alternative assignment would be.
        reason: What decided, in words.
        certain: Whether something other than order decided, so that the pair may vote on order.
    """

    source: Item
    target: Item
    margin: float
    reason: str
    certain: bool = False


@dataclass(frozen=True)
class ItemDoubt:
    """Targets and sources that belong together in an order that nothing decides."""

    targets: tuple[Item, ...]
    sources: tuple[Item, ...]
    reason: str


@dataclass
class Pairing:
    """The decisions of a class.

    Attributes:
        pairs: What belongs together.
        doubts: What belongs together in an order that nothing decides.
        closed: What has no partner as a whole, nor has anything inside it: blocks that the other side doesn't have.
    """

    pairs: list[Pair] = field(default_factory=list)
    doubts: list[ItemDoubt] = field(default_factory=list)
    closed: list[Item] = field(default_factory=list)


class RegionWords:
    """Counts words below the roots of regions, each root once.

    Args:
        dictionary: Words of the source for words of the target.
    """

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self._known: dict[int, tuple[Item, Counter[str]]] = {}

    def support(self, s: Item, t: Item, region: Region) -> float:
        """How far names alone support a pair: similarity of their words, rare words of the region counting most."""
        paths = relative(s, region.source), relative(t, region.target)
        if paths[0] == paths[1]:
            return 1.0
        words = [[w for w in path_tokens(p) if not w.isdigit()] for p in paths]
        rare = [
            {w: 1.0 / max(1, self._counts(root)[w] / len(item.tensors)) for w in ws}
            for ws, root, item in zip(words, (region.source, region.target), (s, t))
        ]
        return weighted_similarity(rare[0], rare[1], self.dictionary)

    def weak(self, families: Sequence[Family], root: Item) -> set[str]:
        """Words of own names that also stand elsewhere in the region: ``attention_norm`` is near the attention.

        Words of the modules around an item are no such hints: they say where the item is.
        """
        if len(families) < 2:
            return set()
        everywhere = self._counts(root)
        here = _word_counts([t for f in families for m in f.members for t in m.tensors], root)
        outside = sorted(w for w, count in everywhere.items() if count > here[w])
        places = [place_in(m, root).rpartition(".") for f in families for m in f.members]
        own = {w for _, _, name in places for w in path_tokens(name)}
        around = {w for above, _, _ in places for w in path_tokens(above)}
        return {w for w in own - around if any(token_similarity(w, o) >= ABBREVIATION for o in outside)}

    def _counts(self, root: Item) -> Counter[str]:
        """How many tensors below a root have each word in their path."""
        if id(root) not in self._known:
            self._known[id(root)] = (root, _word_counts(root.tensors, root))
        return self._known[id(root)][1]


def _word_counts(tensors: Sequence[Item], root: Item) -> Counter[str]:
    return Counter(w for t in tensors for w in set(path_tokens(relative(t, root))) if not w.isdigit())


MARGIN = 0.08


FIRST_MARGIN = 0.15  # while nothing has been learned, names alone must be clear


NAME_SUPPORT = 0.5


class ClassSolver:
    """Decides classes with the evidence of the whole pair of models.

    Args:
        options: How to match; ``shape_only`` ignores names.
        evidence: The dictionary and the trust in order.
        costs: What pairs cost by structure and shapes.
        ties: How many names each tied source tensor has.
    """

    def __init__(self, options: MatchingOptions, evidence: Evidence, costs: PairCosts, ties: Mapping[str, int]) -> None:
        self.ties = ties
        self.margin = FIRST_MARGIN if evidence.first else MARGIN
        self.names = options.strategy != "shape_only"
        self.evidence = evidence
        self.costs = costs
        self.words = RegionWords(evidence.dictionary)

    def solve(self, s: list[Item], t: list[Item], region: Region) -> Pairing:
        """Pair the members of a class.

        Args:
            s: Source members, in registration order.
            t: Target members, in registration order.
            region: Where they stand.

        Returns:
            Pairs and doubts; members in neither stay open.
        """
        if len(s) == len(t) == 1:
            return self._single(s[0], t[0], region)
        if len(s) == 1 and len(t) <= self.ties.get(s[0].main.path, 1) and all(self.costs.of(s[0], i) == 0.0 for i in t):
            return Pairing([Pair(s[0], i, 1.0, "tied in the source to all tensors of this shape") for i in t])
        families_s, families_t = families_of(s, region.source), families_of(t, region.target)
        if len(s) != len(t):
            return self._unbalanced(families_s, families_t, region)
        families_s, families_t = evened(families_s, families_t)
        if not region.complete and len(s) < 3 and not all(_strong(i) for i in (*s, *t)):
            return self._unbalanced(families_s, families_t, region)
        if sorted(len(f.members) for f in families_s) != sorted(len(f.members) for f in families_t):
            return self._by_order(s, t, region)
        return self._assign(families_s, families_t, region)

    # one member -------------------------------------------------------------------------------------------------

    def _single(self, s: Item, t: Item, region: Region) -> Pairing:
        if self.costs.of(s, t) is None:
            return Pairing()
        proof = region.complete or _strong(s) or region.distinct(s, t)
        if not proof and self.words.support(s, t, region) < NAME_SUPPORT:
            return Pairing()
        return Pairing([Pair(s, t, 1.0, "the only ones of this size and structure on both sides", certain=True)])

    # several members --------------------------------------------------------------------------------------------

    def _assign(self, fs: list[Family], ft: list[Family], region: Region) -> Pairing:
        """Assign families to families, jointly, and their members by number."""
        n = len(fs)
        shape, base = self._matrices(fs, ft, region)
        rank_s, rank_t = _ranks(shape), _ranks(shape.T)
        unlike = (rank_s[:, None] != rank_t[None, :]).astype(float)
        trust = self._trust_here(fs, ft, rank_s, rank_t, shape, region)
        solved = assign(base + ORDER_WEIGHT * trust * unlike)
        by_names = {(i, j): margin for i, j, margin in assign(base)}
        pairing = Pairing()
        open_s, open_t = set(range(n)), set(range(n))
        for i, j, margin in solved:
            if n > 1 and margin < self.margin:
                continue
            open_s.discard(i)
            open_t.discard(j)
            certain = by_names.get((i, j), 0.0) >= self.margin
            reason = _reason(n, len(fs[i].members), certain)
            pairing.pairs += _zip(fs[i], ft[j], margin, reason, certain)
        if open_s and open_t:
            pairing.doubts.append(
                ItemDoubt(
                    tuple(m for j in sorted(open_t) for m in ft[j].members),
                    tuple(m for i in sorted(open_s) for m in fs[i].members),
                    "same shapes, and neither names nor order decide between them",
                )
            )
        return pairing

    def _matrices(self, fs: list[Family], ft: list[Family], region: Region) -> tuple[np.ndarray, np.ndarray]:
        """Costs of all pairs of families, ``(n, n)``: by shapes alone, and with what names and roles say."""
        n = len(fs)
        words_s, words_t = same_numbering(telling_words(fs), telling_words(ft))
        weak_s, weak_t = self.words.weak(fs, region.source), self.words.weak(ft, region.target)
        shape = np.full((n, n), FORBIDDEN)
        base = np.full((n, n), FORBIDDEN)
        for i, f in enumerate(fs):
            for j, g in enumerate(ft):
                cost = self.costs.of_families(f, g)
                if cost is None:
                    continue
                alike = 0.5
                if self.names:
                    alike = shared_evidence(words_s[i], words_t[j], self.evidence.dictionary, weak_s, weak_t)
                    alike = self._with_role(alike, f, g, region)
                shape[i, j] = cost
                base[i, j] = cost + 1.0 - alike
        return shape, base

    def _with_role(self, alike: float, f: Family, g: Family, region: Region) -> float:
        """What other regions of the same make are certain of outweighs how names look."""
        if len(f.members) > 1 or region.make is None:
            return alike
        verdict = self.evidence.roles.verdict(region.make, region.key, *region.places(f.members[0], g.members[0]))
        if verdict is None:
            return alike
        return 1.0 if verdict else min(alike, 0.1)

    def _trust_here(
        self,
        fs: list[Family],
        ft: list[Family],
        rank_s: np.ndarray,
        rank_t: np.ndarray,
        shape: np.ndarray,
        region: Region,
    ) -> float:
        """Trust in order for this class: none if going by rank would cross what is certain of the matrices."""
        trust = self.evidence.trust(*region.spans)
        if trust == 0.0 or fs[0].members[0].rank < 2:
            return trust
        for i in range(len(fs)):
            for j in range(len(ft)):
                if rank_s[i] == rank_t[j] and shape[i, j] < FORBIDDEN and self._misplaced(fs[i], ft[j], region):
                    return 0.0
        return trust

    def _misplaced(self, s: Item | Family, t: Item | Family, region: Region) -> bool:
        return self.evidence.misplaced(s.start, t.start, *region.spans) > 0.5

    def _by_order(self, s: list[Item], t: list[Item], region: Region) -> Pairing:
        """Families don't fit together; if order has proved trustworthy, go by it."""
        margin = ORDER_WEIGHT * self.evidence.trust(*region.spans)
        crossed = s[0].rank >= 2 and any(self._misplaced(a, b, region) for a, b in zip(s, t))
        if margin >= self.margin and not crossed and all(self.costs.of(a, b) is not None for a, b in zip(s, t)):
            reason = "same place in order among those of its shape"
            return Pairing([Pair(a, b, margin, reason) for a, b in zip(s, t)])
        return Pairing(doubts=[ItemDoubt(tuple(t), tuple(s), "same shapes, and the order can't be trusted")])

    def _unbalanced(self, fs: list[Family], ft: list[Family], region: Region) -> Pairing:
        """More on one side than on the other: only names that leave no doubt decide, the rest stays open."""
        if not self.names:
            return Pairing()
        longer = self._by_number(fs, ft)
        if longer is not None:
            return longer
        fs, ft = literal_if_needed(fs, ft)
        cost = np.full((len(fs), len(ft) + len(fs)), 1.0 - NAME_SUPPORT)
        words_s, words_t = telling_words(fs), telling_words(ft)
        for i, f in enumerate(fs):
            for j, g in enumerate(ft):
                shape = self.costs.of_families(f, g) if f.numbers == g.numbers or len(f.members) == 1 else None
                if shape is None or region.stands_by_number(f.members[0], g.members[0]):
                    cost[i, j] = FORBIDDEN
                    continue
                alike = best_pairs_similarity(words_s[i], words_t[j], self.evidence.dictionary)
                whole = self.words.support(f.members[0], g.members[0], region)
                cost[i, j] = shape + 1.0 - (alike + 3 * whole) / 4
        pairing = Pairing()
        for i, j, margin in assign(cost):
            if j < len(ft) and margin >= self.margin and cost[i, j] <= 1.0 - NAME_SUPPORT:
                pairing.pairs += _zip(fs[i], ft[j], margin, "their names single them out", True)
        return pairing

    def _by_number(self, fs: list[Family], ft: list[Family]) -> Pairing | None:
        """The only repeated blocks of their size on both sides, more on one: block ``i`` goes to block ``i``."""
        if len(fs) != 1 or len(ft) != 1:
            return None
        (f,), (g,) = fs, ft
        common = sorted(set(f.numbers) & set(g.numbers))
        if len(common) < min(len(f.members), len(g.members)) or len(common) < 2:
            return None
        theirs, ours = dict(zip(f.numbers, f.members)), dict(zip(g.numbers, g.members))
        if not all(_strong(theirs[n]) and self.costs.of(theirs[n], ours[n]) is not None for n in common):
            return None
        reason = "the only repeated modules of this size, by number"
        pairs = [Pair(theirs[n], ours[n], ORDER_WEIGHT, reason, certain=n == common[0]) for n in common]
        rest = [m for family in (f, g) for n, m in zip(family.numbers, family.members) if n not in common]
        return Pairing(pairs, closed=rest)


def _ranks(shape: np.ndarray) -> np.ndarray:
    """Rank of each row among the rows that fit the same columns without being turned."""
    seen: Counter[bytes] = Counter()
    ranks = []
    for row in shape < TRANSPOSED:
        key = row.tobytes()
        ranks.append(seen[key])
        seen[key] += 1
    return np.array(ranks)


def _strong(item: Item) -> bool:
    """Whether so much structure is below that an equal one elsewhere can't be chance."""
    return len(item.tensors) >= 4 and len(item.profile) >= 2


def _reason(rivals: int, members: int, certain: bool) -> str:
    if rivals == 1:
        return "same family of repeated modules, by number" if members > 1 else "the only ones of this shape"
    return "their names tell them apart" if certain else "same place in order among those of its shape"


def _zip(f: Family, g: Family, margin: float, reason: str, certain: bool) -> list[Pair]:
    members = aligned_axes(f, g)
    # one vote of a family is enough: its members follow from each other
    return [Pair(a, b, margin, reason, certain and k == 0) for k, (a, b) in enumerate(zip(f.members, members))]
