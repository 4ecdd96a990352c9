"""Alignment of two trees: equal subtrees first, from the largest down, then units, then single tensors.

The method, for a region (a pair of subtrees known to correspond; at first the two whole models):

1. **Top-down by size.** Take the largest item of either side. If both sides have items with that number of elements
   they are a *class* and are paired; otherwise the item is dissolved into its children, or folded with its like into
   a stack if the other side holds one (:mod:`lit_wsl.matching.fusion`). The number of elements is invariant under every
   lossless operation, so this finds corresponding subtrees under renaming, regrouping, fusing and splitting.
   (The idea of matching isomorphic subtrees greedily from the top is that of GumTree, Falleri et al. 2014, with an
   invariant instead of a hash.)
2. **A class with several members** is decided jointly: members whose paths differ only by numbers are a family and go
   by their numbers; families are assigned to one another by the words that tell them apart, by the dictionary
   learned from this pair of models, and by order as far as order has proved trustworthy. What has no margin over the
   best alternative assignment is ambiguous.
3. **Left-over units** are joined and cut (:mod:`lit_wsl.matching.fusion`), then matched tensor by tensor.

Every pair found is a region of its own. Regions of the same structure are solved once, so thousands of layers cost
no more than one, and all of them get the same answer.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lit_wsl.matching.classes import ClassSolver, Pair, Pairing, Region
from lit_wsl.matching.evidence import Evidence
from lit_wsl.matching.fusion import Fusion, find_fusions, fold_run
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.shapes import Forbidden, PairCosts, operations_between
from lit_wsl.matching.tree import Item, TreeBuilder, role_of, shape_key
from lit_wsl.plan.operations import Operation


@dataclass(frozen=True)
class Match:
    """Source tensors become target tensors; positions are ordinals of the two sides."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    operations: tuple[Operation, ...]
    margin: float
    reason: str


@dataclass(frozen=True)
class Doubt:
    """Targets whose sources nothing decides between."""

    targets: tuple[int, ...]
    sources: tuple[int, ...]
    reason: str


@dataclass
class Outcome:
    """What a region gave: its own matches, and the outcomes of the regions inside it.

    Regions of one structure share an outcome, which stands at the ordinals of the first of them; ``inside`` holds by
    how much the others are shifted, and the margin of the pair that led to them. ``pairs`` are the region's own items.
    """

    matches: list[Match] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    inside: list[tuple[Outcome, int, int, float]] = field(default_factory=list)
    pairs: list[tuple[Item, Item]] = field(default_factory=list)

    @cached_property
    def size(self) -> int:
        """Number of targets that are matched; call it when the outcome is complete."""
        return sum(len(m.targets) for m in self.matches) + sum(o.size for o, *_ in self.inside)

    def flat(self) -> tuple[list[Match], list[Doubt]]:
        """All matches and doubts at their own ordinals."""
        matches: list[Match] = []
        doubts: list[Doubt] = []
        stack = [(self, 0, 0, 1.0)]
        while stack:
            outcome, ds, dt, cap = stack.pop()
            for m in outcome.matches:
                sources, targets = tuple(p + ds for p in m.sources), tuple(p + dt for p in m.targets)
                matches.append(Match(sources, targets, m.operations, min(m.margin, cap), m.reason))
            for d in outcome.doubts:
                doubts.append(Doubt(tuple(p + dt for p in d.targets), tuple(p + ds for p in d.sources), d.reason))
            stack += [(o, ds + s, dt + t, min(cap, margin)) for o, s, t, margin in outcome.inside]
        return matches, doubts

    def distinct(self) -> Iterator[tuple[Outcome, float]]:
        """This outcome and all inside it, each once, with the best margin of the pairs that lead to it."""
        best: dict[int, float] = {id(self): 1.0}
        outcomes: dict[int, Outcome] = {id(self): self}
        stack = [self]
        while stack:
            outcome = stack.pop()
            for inner, _, _, margin in outcome.inside:
                cap = min(best[id(outcome)], margin)
                if cap > best.get(id(inner), -1.0):
                    best[id(inner)] = cap
                    outcomes[id(inner)] = inner
                    stack.append(inner)
        for key, outcome in outcomes.items():
            yield outcome, best[key]


Profile = tuple[object, ...]


REPEATED_WEIGHT = 1000


NEIGHBOUR_MARGIN = 0.25


class Aligner:
    """Aligns two trees once, with the evidence of an earlier pass.

    Args:
        options: How to match.
        builder: The builder of both trees.
        evidence: What earlier passes learned.
        forbidden: Whether two paths must not match (incompatible pairs).
        ties: How many names each tied source tensor has.
    """

    def __init__(
        self,
        options: MatchingOptions,
        builder: TreeBuilder,
        evidence: Evidence,
        forbidden: Forbidden,
        ties: Mapping[str, int],
    ) -> None:
        self.builder = builder
        self.evidence = evidence
        self.gathered = Evidence()
        self.turned = evidence.turned_matrices > evidence.exact_matrices
        self._costs = PairCosts(forbidden, self.turned)
        self._classes = ClassSolver(options, evidence, self._costs, ties)
        self._memo: dict[tuple[int, int], tuple[int, int, Outcome]] = {}

    def align(self, source: Item, target: Item) -> Outcome:
        """Align two whole trees."""
        shapes = tuple(Counter(shape_key(t.shape) for t in side.tensors) for side in (source, target))
        region = Region(source, target, source.numel == target.numel, (shapes[0], shapes[1]))
        return self._solve([source], [target], region)

    # regions ---------------------------------------------------------------------------------------------------

    def _descend(self, s: Item, t: Item, out: Outcome, margin: float, reason: str) -> None:
        """Match the inside of a pair."""
        if s.level == t.level == 0:
            self._match_tensors(s, t, out, margin, reason)
            return
        if s.virtual or t.virtual:  # stacks stand nowhere in particular
            out.inside.append((self._inside(s, t), 0, 0, margin))
            return
        key = (s.structure, t.structure)
        if key not in self._memo:
            self._memo[key] = (s.start, t.start, self._inside(s, t))
        start_s, start_t, outcome = self._memo[key]
        out.inside.append((outcome, s.start - start_s, t.start - start_t, margin))

    def _inside(self, s: Item, t: Item) -> Outcome:
        if s.level == t.level == 1 and Counter(c.shape for c in s.children) == Counter(c.shape for c in t.children):
            by_role = {role_of(c.path): c for c in s.children}
            out = Outcome()
            if all(role_of(c.path) in by_role for c in t.children):
                for c in t.children:
                    self._match_tensors(by_role[role_of(c.path)], c, out, 1.0, "same role in the same module")
                return out
        inside_s, inside_t = (list(i.children) if i.level == 2 else [i] for i in (s, t))
        if inside_s == [s] and inside_t == [t]:
            inside_s, inside_t = list(s.tensors), list(t.tensors)
        return self._solve(inside_s, inside_t, Region(s, t, complete=s.numel == t.numel))

    def _match_tensors(self, s: Item, t: Item, out: Outcome, margin: float, reason: str) -> None:
        operations = operations_between(s.shape, t.shape, transposed=self.turned)
        if operations is None:
            return
        if len(s.shape) == len(t.shape) == 2 and len(shape_key(s.shape)) == 2 and s.shape[0] != s.shape[1]:
            repeated = any(c.isdigit() for c in s.path)
            weight = REPEATED_WEIGHT if repeated else 1  # tables of a model's ends are never stored transposed
            self.gathered.exact_matrices += weight * (not operations)
            self.gathered.turned_matrices += weight * any(op.name == "transpose" for op in operations)
        out.matches.append(Match(s.positions, t.positions, (*s.operations, *operations, *t.undoing), margin, reason))

    def _solve(self, sources: list[Item], targets: list[Item], region: Region) -> Outcome:
        out = Outcome()
        sure: list[tuple[Item, Item]] = []
        units_s, units_t = self._top_down(sources, targets, region, out, sure)
        for fusion in find_fusions(units_s, units_t, region, self.evidence, self.turned):
            self._take_fusion(fusion, units_s, units_t, out)
        for level in ("unit", "tensor"):
            if level == "tensor":
                units_s, units_t = _tensors(units_s), _tensors(units_t)
            units_s, units_t = self._match_level(units_s, units_t, region, out, sure)
            if not region.complete:
                units_s, units_t = self._neighbours(units_s, units_t, region, out, sure)
        self._vote(sure)
        return out

    def _top_down(
        self, sources: list[Item], targets: list[Item], region: Region, out: Outcome, sure: list[tuple[Item, Item]]
    ) -> tuple[list[Item], list[Item]]:
        """Pair classes of equal size from the largest down; return the units that found none."""
        pools: tuple[dict[int, list[Item]], dict[int, list[Item]]] = (defaultdict(list), defaultdict(list))
        heap: list[int] = []

        def put(side: int, items: Sequence[Item]) -> None:
            for item in items:
                pools[side][item.numel].append(item)
                heapq.heappush(heap, -item.numel)

        put(0, sources)
        put(1, targets)
        units: tuple[list[Item], list[Item]] = ([], [])
        while heap:
            numel = -heapq.heappop(heap)
            both = pools[0].pop(numel, []), pools[1].pop(numel, [])
            if not (both[0] or both[1]):
                continue
            if both[0] and both[1]:
                both = self._pair_class(both[0], both[1], region, out, sure)
            for side in (0, 1):
                rest = both[side]
                waiting = [*units[1 - side], *(i for pool in pools[1 - side].values() for i in pool)] if rest else []
                folded = fold_run(rest, waiting, self.builder) if len(rest) > 1 else None
                if folded is not None:
                    put(side, folded)
                    continue
                for item in rest:
                    if item.level == 2:
                        put(side, item.children)
                    else:
                        units[side].append(item)
        return sorted(units[0], key=lambda i: i.start), sorted(units[1], key=lambda i: i.start)

    def _pair_class(
        self, s: list[Item], t: list[Item], region: Region, out: Outcome, sure: list[tuple[Item, Item]]
    ) -> tuple[list[Item], list[Item]]:
        """Pair what a class decides, and return what it leaves open."""
        s, t = sorted(s, key=lambda i: i.start), sorted(t, key=lambda i: i.start)
        pairing = self._classes.solve(s, t, region)
        return self._take_pairing(pairing, s, t, region, out, sure)

    def _take_pairing(
        self,
        pairing: Pairing,
        s: list[Item],
        t: list[Item],
        region: Region,
        out: Outcome,
        sure: list[tuple[Item, Item]],
    ) -> tuple[list[Item], list[Item]]:
        out.pairs += [(p.source, p.target) for p in pairing.pairs]
        for p in pairing.pairs:
            self._descend(p.source, p.target, out, p.margin, p.reason)
            if p.certain:
                sure.append((p.source, p.target))
            if region.make is not None and (p.certain or p.source.rank >= 2):  # norms may be numbered otherwise
                self.gathered.roles.teach(region.make, region.key, *region.places(p.source, p.target))
        for doubt in pairing.doubts:
            out.doubts.append(
                Doubt(
                    tuple(x for i in doubt.targets for x in i.positions),
                    tuple(x for i in doubt.sources for x in i.positions),
                    doubt.reason,
                )
            )
        gone = {id(p.source) for p in pairing.pairs} | {id(i) for d in pairing.doubts for i in d.sources}
        gone |= {id(p.target) for p in pairing.pairs} | {id(i) for d in pairing.doubts for i in d.targets}
        gone |= {id(i) for i in pairing.closed}
        return [i for i in s if id(i) not in gone], [i for i in t if id(i) not in gone]

    def _take_fusion(self, fusion: Fusion, units_s: list[Item], units_t: list[Item], out: Outcome) -> None:
        for step in fusion.steps:
            out.matches.append(Match(step.sources, step.targets, step.operations, fusion.margin, fusion.reason))
        if fusion.doubt:
            out.doubts.append(Doubt(fusion.target_positions, fusion.source_positions, fusion.reason))
        gone = {id(i) for i in fusion.items}
        # what the steps leave of a unit stays open: the bias of q where k has none
        for units, settled in zip((units_s, units_t), fusion.settled):
            left = [x for i in units if id(i) in gone for x in i.tensors if not settled.issuperset(x.positions)]
            units[:] = sorted([i for i in units if id(i) not in gone] + left, key=lambda i: i.start)

    def _match_level(
        self, sources: list[Item], targets: list[Item], region: Region, out: Outcome, sure: list[tuple[Item, Item]]
    ) -> tuple[list[Item], list[Item]]:
        """Match units (or tensors) that are left, class by class."""
        classes_s, classes_t = _by_profile(sources), _by_profile(targets)
        left_s, left_t = [], []
        for key in sorted(set(classes_s) | set(classes_t)):
            s, t = classes_s.get(key, []), classes_t.get(key, [])
            if s and t:
                s, t = self._pair_class(s, t, region, out, sure)
            left_s += s
            left_t += t
        return sorted(left_s, key=lambda i: i.start), sorted(left_t, key=lambda i: i.start)

    def _neighbours(
        self, sources: list[Item], targets: list[Item], region: Region, out: Outcome, sure: list[tuple[Item, Item]]
    ) -> tuple[list[Item], list[Item]]:
        """Match norms that stand directly behind (or before) tensors that are matched to each other."""
        ends = {m.sources[-1]: m.targets[-1] for m in out.flat()[0]}
        ends |= {s.positions[-1]: t.positions[-1] for s, t in out.pairs}
        starts = {m.sources[0]: m.targets[0] for m in out.flat()[0]} | {s.start: t.start for s, t in out.pairs}
        count_s, count_t = (Counter(_key(i) for i in side) for side in (sources, targets))

        def fits(i: Item) -> bool:
            many = count_s[_key(i)]
            conventional = role_of(i.main.path) in ("weight", "bias")
            return i.rank < 2 and many == count_t[_key(i)] and (many == 1 or conventional)

        by_place = {t.start: t for t in targets if fits(t)}
        by_end = {t.positions[-1]: t for t in targets if fits(t)}
        pairing = Pairing()
        for s in (i for i in sources if fits(i)):
            t = by_place.get(ends.get(s.positions[0] - 1, -2) + 1)
            if t is None:
                t = by_end.get(starts.get(s.positions[-1] + 1, -2) - 1)
            if t is None or t.start not in by_place:
                continue
            alike = _key(s) == _key(t) and role_of(s.main.path) == role_of(t.main.path)
            if (alike or count_s[_key(s)] == 1) and self._costs.of(s, t) is not None:
                pairing.pairs.append(Pair(s, t, NEIGHBOUR_MARGIN, "stands next to tensors that are matched"))
                del by_place[t.start]
        return self._take_pairing(pairing, sources, targets, region, out, sure)

    def _vote(self, sure: list[tuple[Item, Item]]) -> None:
        """Let certain pairs tell how far order can be trusted, and teach the dictionary their words."""
        for vector in (True, False):
            self.gathered.order.add([(s.start, t.start) for s, t in sure if (s.rank < 2) == vector])
        self.gathered.anchors += [(s.start, t.start) for s, t in sure if s.rank >= 2]


def _tensors(units: Sequence[Item]) -> list[Item]:
    return [t for u in units for t in u.tensors]


def _key(item: Item) -> Profile:
    """Items of one key hold tensors of the same shapes."""
    return (item.level, *item.profile_key)


def _by_profile(items: Sequence[Item]) -> dict[Profile, list[Item]]:
    found: dict[Profile, list[Item]] = {}
    for item in items:
        found.setdefault(_key(item), []).append(item)
    return found
