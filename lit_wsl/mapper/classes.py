"""Deciding a class: several items of one size on both sides, which belongs to which?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lit_wsl.mapper.assignment import FORBIDDEN, assign
from lit_wsl.mapper.evidence import ORDER_WEIGHT, Evidence
from lit_wsl.mapper.families import (
    Family,
    aligned_axes,
    evened,
    families_of,
    literal_if_needed,
    same_numbering,
    telling_words,
)
from lit_wsl.mapper.names import (
    ABBREVIATION,
    best_pairs_similarity,
    path_tokens,
    shared_evidence,
    token_similarity,
    weighted_similarity,
)
from lit_wsl.mapper.options import MatchingOptions
from lit_wsl.mapper.pairing import ItemDoubt, Pair, Pairing, Region
from lit_wsl.mapper.shapes import TRANSPOSED, operation_cost
from lit_wsl.mapper.tree import Item, place_in, relative

MARGIN = 0.08
FIRST_MARGIN = 0.15  # while nothing has been learned, names alone must be clear
NAME_SUPPORT = 0.5


class ClassSolver:
    """Decides classes with the evidence of the whole pair of models.

    Args:
        options: How to match; ``shape_only`` ignores names.
        evidence: The dictionary and the trust in order.
        forbidden: Whether two paths must not match.
        turned: Whether the pair stores its matrices the other way round.
        ties: How many names each tied source tensor has.
    """

    def __init__(
        self,
        options: MatchingOptions,
        evidence: Evidence,
        forbidden: Callable[[str, str], bool],
        turned: bool,
        ties: Mapping[str, int],
    ) -> None:
        self.ties = ties
        self.margin = FIRST_MARGIN if evidence.first else MARGIN
        self._words: dict[int, tuple[Item, Counter[str]]] = {}
        self.names = options.strategy != "shape_only"
        self.evidence = evidence
        self.forbidden = forbidden
        self.turned = turned

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
        if len(s) == 1 and len(t) <= self.ties.get(s[0].main.path, 1) and all(self.cost(s[0], i) == 0.0 for i in t):
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
        if self.cost(s, t) is None:
            return Pairing()
        proof = region.complete or _strong(s) or region.distinct(s, t)
        if not proof and self.support(s, t, region) < NAME_SUPPORT:
            return Pairing()
        return Pairing([Pair(s, t, 1.0, "the only ones of this size and structure on both sides", certain=True)])

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
        return weighted_similarity(rare[0], rare[1], self.evidence.dictionary)

    def _counts(self, root: Item) -> Counter[str]:
        """How many tensors below a root have each word in their path."""
        if id(root) not in self._words:
            self._words[id(root)] = (root, _word_counts(root.tensors, root))
        return self._words[id(root)][1]

    def cost(self, s: Item, t: Item) -> float | None:
        """Cost of pairing two items by structure and shapes; ``None`` where they can't correspond."""
        if self.forbidden(s.path, t.path):
            return None
        if s.level == t.level == 0:
            return operation_cost(s.shape, t.shape, transposed=self.turned)
        if s.structure == t.structure:
            return 0.0
        if s.profile == t.profile and max(s.level, t.level) == 2:
            same = Counter(i.shape for i in s.tensors) == Counter(i.shape for i in t.tensors)
            return 0.0 if same or self.turned else TRANSPOSED
        if max(s.level, t.level) == 2:
            return 0.2
        return self._unit_cost(s, t)

    def _unit_cost(self, s: Item, t: Item) -> float | None:
        """Cost of pairing two units tensor by tensor, the largest with the largest."""
        if len(s.tensors) != len(t.tensors):
            return None
        by_size = [sorted(i.tensors, key=lambda x: (-x.numel, x.start)) for i in (s, t)]
        costs = [operation_cost(a.shape, b.shape, transposed=self.turned) for a, b in zip(*by_size)]
        known = [c for c in costs if c is not None]
        return max(known) if len(known) == len(costs) else None

    # several members --------------------------------------------------------------------------------------------

    def _assign(self, fs: list[Family], ft: list[Family], region: Region) -> Pairing:
        """Assign families to families, jointly, and their members by number."""
        n = len(fs)
        words_s, words_t = same_numbering(telling_words(fs), telling_words(ft))
        weak_s, weak_t = self._weak(fs, region.source), self._weak(ft, region.target)
        shape = np.full((n, n), FORBIDDEN)
        base = np.full((n, n), FORBIDDEN)
        for i, f in enumerate(fs):
            for j, g in enumerate(ft):
                cost = self._family_cost(f, g)
                if cost is None:
                    continue
                alike = 0.5
                if self.names:
                    alike = shared_evidence(words_s[i], words_t[j], self.evidence.dictionary, weak_s, weak_t)
                    alike = self._with_role(alike, f, g, region)
                shape[i, j] = cost
                base[i, j] = cost + 1.0 - alike
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

    def _with_role(self, alike: float, f: Family, g: Family, region: Region) -> float:
        """What other regions of the same make are certain of outweighs how names look."""
        if len(f.members) > 1 or region.make is None:
            return alike
        verdict = self.evidence.roles.verdict(region.make, region.key, *region.places(f.members[0], g.members[0]))
        if verdict is None:
            return alike
        return 1.0 if verdict else min(alike, 0.1)

    def _weak(self, families: list[Family], root: Item) -> set[str]:
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
        spans = [(r.positions[0], r.positions[-1] + 1) for r in (region.source, region.target)]
        trust = self.evidence.trust(spans[0], spans[1])
        if trust == 0.0 or fs[0].members[0].rank < 2:
            return trust
        for i in range(len(fs)):
            for j in range(len(ft)):
                if rank_s[i] == rank_t[j] and shape[i, j] < FORBIDDEN and self._misplaced(fs[i], ft[j], region):
                    return 0.0
        return trust

    def _misplaced(self, f: Family, g: Family, region: Region) -> bool:
        spans = [(r.positions[0], r.positions[-1] + 1) for r in (region.source, region.target)]
        return self.evidence.misplaced(f.start, g.start, spans[0], spans[1]) > 0.5

    def _family_cost(self, f: Family, g: Family) -> float | None:
        """Mean cost over the members paired by number; ``None`` if any can't correspond."""
        if len(f.members) != len(g.members):
            return None
        known: dict[tuple[int, int], float | None] = {}
        total = 0.0
        check_paths = f.members[0].path, g.members[0].path
        if self.forbidden(*check_paths):
            return None
        for a, b in zip(f.members, g.members):
            key = (a.structure, b.structure)
            if key not in known:
                known[key] = self.cost(a, b)
            cost = known[key]
            if cost is None:
                return None
            total += cost
        return total / len(f.members)

    def _by_order(self, s: list[Item], t: list[Item], region: Region) -> Pairing:
        """Families don't fit together; if order has proved trustworthy, go by it."""
        spans = [(r.positions[0], r.positions[-1] + 1) for r in (region.source, region.target)]
        margin = ORDER_WEIGHT * self.evidence.trust(spans[0], spans[1])
        crossed = s[0].rank >= 2 and any(
            self.evidence.misplaced(a.start, b.start, spans[0], spans[1]) > 0.5 for a, b in zip(s, t)
        )
        if margin >= self.margin and not crossed and all(self.cost(a, b) is not None for a, b in zip(s, t)):
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
                shape = self._family_cost(f, g) if f.numbers == g.numbers or len(f.members) == 1 else None
                if shape is None or region.stands_by_number(f.members[0], g.members[0]):
                    cost[i, j] = FORBIDDEN
                    continue
                alike = best_pairs_similarity(words_s[i], words_t[j], self.evidence.dictionary)
                whole = self.support(f.members[0], g.members[0], region)
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
        if not all(_strong(theirs[n]) and self.cost(theirs[n], ours[n]) is not None for n in common):
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


def _word_counts(tensors: Sequence[Item], root: Item) -> Counter[str]:
    return Counter(w for t in tensors for w in set(path_tokens(relative(t, root))) if not w.isdigit())


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
