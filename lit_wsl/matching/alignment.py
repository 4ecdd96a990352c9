"""Alignment of two trees: equal subtrees first, from the largest down, then units, then single tensors.

The method, for a region (a pair of subtrees known to correspond; at first the two whole models):

1. **Top-down by size.** Take the largest item of either side. If both sides have items with that number of elements
   they are a *class* and are paired; otherwise the item is dissolved into its children, or folded with its like into
   a stack if the other side holds one (:mod:`lit_wsl.matching.fusion`). The number of elements is invariant under every
   lossless operation, so this finds corresponding subtrees under renaming, regrouping, fusing and splitting.
   (The idea of matching isomorphic subtrees greedily from the top is that of GumTree, Falleri et al. 2014, with an
   invariant instead of a hash.)
2. **A class with several members** is decided by kinds of evidence, the strongest first
   (:mod:`lit_wsl.matching.decision`); what none of them decides is ambiguous.
3. **Left-over units** are joined and cut (:mod:`lit_wsl.matching.fusion`), then matched tensor by tensor.

Every pair found is a region of its own. Regions of the same structure are solved once, so thousands of layers cost
no more than one, and all of them get the same answer.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lit_wsl.matching.decision import TIED, TURNED, ClassSolver, is_named
from lit_wsl.matching.dissent import NAMESAKE
from lit_wsl.matching.fusion import Fusion, find_fusions, fold_run, spell_otherwise
from lit_wsl.matching.learned import Learned
from lit_wsl.matching.likeness import ENDS, LAYERS
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.order import (
    ORDER,
    Kept,
    against_order,
    agreement,
    is_mirrored,
    kept_elsewhere,
    order_cell,
    parting,
)
from lit_wsl.matching.regions import BLOCK, Decision, Pair, Region, Sides, Tie, other_name
from lit_wsl.matching.risks import may_load, weakest
from lit_wsl.matching.shapes import TRANSPOSED, Forbidden, PairCosts, operations_between
from lit_wsl.matching.tree import (
    Family,
    Item,
    TreeBuilder,
    is_strong,
    kind_of,
    owner_path,
    relative,
    role_of,
    same_kind,
    shape_key,
)
from lit_wsl.matching.words import plain_words
from lit_wsl.plan.operations import Operation
from lit_wsl.structure.description import Shape, cached_property

MAX_CANDIDATES = 16
BY_HOME = "beside the same"
RUN_OTHERWISE = "the model registers these in one order and runs them in another"
REPEATED_WEIGHT = 1000
Profile = tuple[int, str, tuple[tuple[Shape, int], ...]]


class Match(NamedTuple):
    """Source tensors become target tensors: ordinals of the two sides, and the weakest cell on the way."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    operations: tuple[Operation, ...]
    cell: str

    def shifted(self, s: int, t: int, cell: str = "") -> Match:
        """The same match in another region of the same structure, reached by a decision of another kind."""
        sources, targets = tuple([p + s for p in self.sources]), tuple([p + t for p in self.targets])
        return Match(sources, targets, self.operations, weakest(self.cell, cell))


@dataclass(frozen=True)
class Doubt:
    """Targets that stay open, with what each of several possible sources would need; the likeliest first."""

    targets: tuple[int, ...]
    candidates: tuple[tuple[tuple[int, ...], tuple[Operation, ...]], ...]
    reason: str


@dataclass
class Outcome:
    """What a region gave: its own matches and doubts, and the outcomes of the regions inside it.

    Regions of one structure share an outcome, which stands at the ordinals of the first of them; ``inside`` holds by
    how much the others are shifted, and the cell of the pair that led to them.
    """

    matches: list[Match] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    inside: list[tuple[Outcome, int, int, str]] = field(default_factory=list)

    def flat(self) -> tuple[list[Match], list[Doubt]]:
        """All matches and doubts at their own ordinals."""
        matches: list[Match] = []
        doubts: list[Doubt] = []
        stack = [(self, 0, 0, "")]
        while stack:
            outcome, ds, dt, cell = stack.pop()
            matches += [m.shifted(ds, dt, cell) for m in outcome.matches]
            for d in outcome.doubts:
                candidates = tuple((tuple(p + ds for p in sources), ops) for sources, ops in d.candidates)
                doubts.append(Doubt(tuple(p + dt for p in d.targets), candidates, d.reason))
            stack += [(o, ds + s, dt + t, weakest(cell, c)) for o, s, t, c in outcome.inside]
        return matches, doubts


@dataclass
class Evidence:
    """What a first pass over the models tells the second: orientation, order, and the parts of other blocks."""

    exact_matrices: int = 0  # matched non-square matrices of the same shape
    turned_matrices: int = 0  # matched matrices that only fit transposed
    # by region, how well the order of its decided siblings agrees
    agreement: dict[tuple[int, int], Kept] = field(default_factory=dict)
    learned: Learned = field(default_factory=Learned)  # what pairs tell of others
    # the regions so far, by the identity of their items: what is known of one holds in every pass
    regions: dict[tuple[int, int, bool], Region] = field(default_factory=dict)


class Aligner:
    """Aligns two trees once, with the evidence of an earlier pass."""

    def __init__(
        self, options: MatchingOptions, builder: TreeBuilder, evidence: Evidence, forbidden: Forbidden, sides: Sides
    ) -> None:
        self.builder = builder
        self.evidence = evidence
        self.ordered = sides.ordered
        self.execution = sides.execution
        self.twins = sides.twins
        self.wraps = sides.wraps
        self.sources_of = sides.sources_of
        self.gathered = Evidence(regions=evidence.regions)
        self.turned = evidence.turned_matrices > evidence.exact_matrices
        self.costs = PairCosts(forbidden, self.turned)
        self.classes = ClassSolver(options, self.costs, sides, evidence.learned)
        self.by_core = False
        self._memo: dict[tuple[int, int], tuple[int, int, Outcome]] = {}

    def align(self, source: Item, target: Item) -> Outcome:
        """Align two whole trees."""
        self.by_core = source.numel != target.numel and source.core_numel == target.core_numel
        return RegionMatch(self, self.region(source, target, whole=True)).solve([source], [target])

    def size(self, item: Item) -> int:
        """What items are compared by; what holds several matrices and what holds none never have one size."""
        if not self.by_core:
            return item.numel
        single = item.level == 2 and item.core.total() == 1  # a matrix and its norm may stand apart on the other side
        return 2 * item.numel + 1 if single or not item.core else 2 * item.core_numel

    def region(self, s: Item, t: Item, *, whole: bool = False) -> Region:
        """Two items that correspond, as a place where others are compared."""
        key = (id(s), id(t), whole)
        if key not in self.evidence.regions:
            complete = self.size(s) == self.size(t)
            self.evidence.regions[key] = Region(s, t, complete, whole=whole, by_core=self.by_core, wraps=self.wraps)
        return self.evidence.regions[key]

    def elsewhere(self, region: Region) -> str:
        """Whether other regions kept their order, as the pass before saw it."""
        others = [kept for key, kept in self.evidence.agreement.items() if key != region.key]
        return kept_elsewhere(region.level, others)

    def inside(self, s: Item, t: Item) -> tuple[Outcome, int, int]:
        """What two corresponding items hold, and by how much it is shifted."""
        if s.virtual or t.virtual:  # stacks stand nowhere in particular
            return self._inside(s, t), 0, 0
        key = (s.structure, t.structure)
        if key not in self._memo:
            self._memo[key] = (s.start, t.start, self._inside(s, t))
        start_s, start_t, outcome = self._memo[key]
        return outcome, s.start - start_s, t.start - start_t

    def _inside(self, s: Item, t: Item) -> Outcome:
        if s.level == t.level == 0:
            out = Outcome()
            match = self.match(s, t)
            out.matches += [match] if match is not None else []
            return out
        if s.level == t.level == 1 and Counter(c.shape for c in s.children) == Counter(c.shape for c in t.children):
            by_role = {role_of(c.path): c for c in s.children}
            if all(role_of(c.path) in by_role for c in t.children):
                found = [self.match(by_role[role_of(c.path)], c) for c in t.children]
                return Outcome([m for m in found if m is not None])
        inside_s, inside_t = (list(i.children) if i.level == 2 else [i] for i in (s, t))
        if inside_s == [s] and inside_t == [t]:
            inside_s, inside_t = list(s.tensors), list(t.tensors)
        return RegionMatch(self, self.region(s, t)).solve(inside_s, inside_t)

    def match(self, s: Item, t: Item) -> Match | None:
        """What takes one tensor into another; ``None`` if nothing does."""
        operations = operations_between(s.shape, t.shape, transposed=self.turned)
        if operations is None or not same_kind(s, t):
            return None
        if len(s.shape) == len(t.shape) == 2 and len(shape_key(s.shape)) == 2 and s.shape[0] != s.shape[1]:
            repeated = any(c.isdigit() for c in s.path)
            weight = REPEATED_WEIGHT if repeated else 1  # tables of a model's ends are never stored transposed
            self.gathered.exact_matrices += weight * (not operations)
            self.gathered.turned_matrices += weight * any(op.name == "transpose" for op in operations)
        return Match(s.positions, t.positions, (*s.operations, *operations, *t.undoing), "")


class RegionMatch:
    """Matches the inside of a pair."""

    def __init__(self, aligner: Aligner, region: Region) -> None:
        self.aligner = aligner
        self.region = region
        self.out = Outcome()
        self.certain: list[Pair] = []
        self.ties: list[Tie] = []
        self.open_parts: set[tuple[int, ...]] = set()

    def solve(self, sources: list[Item], targets: list[Item]) -> Outcome:
        """Decide everything in the region."""
        aligner = self.aligner
        sources, targets = self._loosen(sources, targets)
        units_s, units_t = self._top_down(sources, targets)
        for fusion in find_fusions(units_s, units_t, self.region, aligner.turned):
            self._take_fusion(fusion, units_s, units_t)
        for level in ("unit", "tensor"):
            if level == "tensor":
                units_s, units_t = _tensors(units_s), _tensors(units_t)
            units_s, units_t = self._match_level(units_s, units_t)
        self.aligner.gathered.agreement[self.region.key] = Kept(self.region.level, agreement(self.certain))
        if is_mirrored(self.certain):
            self.aligner.gathered.learned.mirrored.add(self.region.key)
        self._settle_ties()
        return self.out

    def _loosen(self, sources: list[Item], targets: list[Item]) -> tuple[list[Item], list[Item]]:
        """Take norms and vectors out of the modules if these only correspond without them: code moves them freely."""
        if not self.region.complete or max(len(self.region.source.tensors), len(self.region.target.tensors)) > BLOCK:
            return sources, targets
        builder = self.aligner.builder
        cut = [
            [builder.without_vectors(i) for i in side] for side in _without_partner(sources, targets, self.aligner.size)
        ]
        cores = [[core for core, _ in side if core is not None and core.level == 2] for side in cut]
        odd = {id(core) for side in _without_partner(cores[0], cores[1], self.aligner.size) for core in side}
        met = {id(core) for side in cores for core in side} - odd
        moved = {v.profile_key for side in cut for core, vectors in side if id(core) in met for v in vectors}
        if not moved:
            return sources, targets
        self.region = replace(self.region, loose=True)
        loose: tuple[list[Item], list[Item]] = ([], [])
        for side, items in zip(loose, (sources, targets)):
            for core, vectors in (builder.without_vectors(i, moved) for i in items):
                side += [*([core] if core is not None else []), *vectors]
        return loose

    def _top_down(self, sources: list[Item], targets: list[Item]) -> tuple[list[Item], list[Item]]:
        """Pair classes of equal size from the largest down; return the units that found none."""
        pools: tuple[dict[int, list[Item]], dict[int, list[Item]]] = (defaultdict(list), defaultdict(list))
        heap: list[int] = []
        size = self.aligner.size

        def put(side: int, items: Sequence[Item]) -> None:
            for item in items:
                pools[side][size(item)].append(item)
                heapq.heappush(heap, -size(item))

        put(0, sources)
        put(1, targets)
        units: tuple[list[Item], list[Item]] = ([], [])
        while heap:
            numel = -heapq.heappop(heap)
            both = pools[0].pop(numel, []), pools[1].pop(numel, [])
            if not (both[0] or both[1]):
                continue
            if both[0] and both[1]:
                both = self._pair_class(both[0], both[1])
            for side in (0, 1):
                rest = both[side]
                waiting = [*units[1 - side], *(i for pool in pools[1 - side].values() for i in pool)] if rest else []
                folded = fold_run(rest, waiting, self.aligner.builder) if self._may_fold(rest, side) else None
                if folded is not None:
                    put(side, folded)
                    continue
                for item in rest:
                    if item.level == 2:
                        put(side, item.children)
                    else:
                        units[side].append(item)
        return sorted(units[0], key=lambda i: i.start), sorted(units[1], key=lambda i: i.start)

    def _may_fold(self, items: Sequence[Item], side: int) -> bool:
        """Whether items may be a stack on the other side: not if their tensors stand there under their own paths."""
        return len(items) > 1 and not any(t.start in self._twins[side] for i in items for t in i.tensors)

    def _pair_class(self, s: list[Item], t: list[Item]) -> tuple[list[Item], list[Item]]:
        """Pair what a class decides, and return what it leaves open."""
        s, t = sorted(s, key=lambda i: i.start), sorted(t, key=lambda i: i.start)
        decision = self.aligner.classes.solve(s, t, self.region)
        decision.pairs = [
            p
            for p in decision.pairs
            if (is_named(p.cell) or not (self._unsettled(p) or self._changed_size(p)))
            and not self._parts_twins(p)
            and not self._coincides(p)
        ]
        return self._take(decision, s, t)

    def _parts_twins(self, p: Pair) -> bool:
        """Whether a tensor of either has its very path and shape on the other side, but outside of the pair."""
        if p.source.virtual or p.target.virtual or p.cell == TIED or not self.aligner.classes.names:
            return False
        if not any(self._twins):
            return False
        within = [{t.start for t in item.tensors} for item in (p.source, p.target)]
        return any(
            other not in within[1 - side]
            for side in (0, 1)
            for start in within[side]
            for other in self._twins[side].get(start, ())
        )

    def _changed_size(self, p: Pair) -> bool:
        """Whether either has its very path on the other side with another size: it changed, and is not what fits."""
        if max(p.source.level, p.target.level) == 2 or p.cell == TIED or not self.aligner.classes.names:
            return False
        roots = self.region.source, self.region.target
        for item, root, other in zip((p.source, p.target), roots, roots[::-1]):
            path = owner_path(relative(item.main, root))
            twin = other.largest.get(path)
            words = set(plain_words(path.rpartition(".")[2]))
            changed = twin is not None and twin.numel != item.main.numel
            if changed and words - LAYERS - ENDS and self.region.like_numbers(path):
                return True
        return False

    def _coincides(self, p: Pair) -> bool:
        """Whether two small modules of other names may be of one size by chance: others could fill the largest part."""
        if not p.source.level == p.target.level == 2 or is_named(p.cell) or is_strong(p.source):
            return False
        if not other_name(p.source, p.target, self.region):
            return False
        key = shape_key(p.source.main.shape)
        return all(
            sum(shape_key(t.shape) == key for t in root.tensors) > sum(shape_key(t.shape) == key for t in item.tensors)
            for item, root in ((p.source, self.region.source), (p.target, self.region.target))
        )

    @cached_property
    def _twins(self) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
        """Of either side's tensors those of the same shape and path on the other, as a whole or seen from here."""
        found: tuple[dict[int, set[int]], dict[int, set[int]]] = (defaultdict(set), defaultdict(set))
        for ours, theirs in self.region.twins:
            found[0][ours].add(theirs)
            found[1][theirs].add(ours)
        for side, known in enumerate((self.aligner.twins, self.aligner.sources_of)):
            for t in (self.region.source, self.region.target)[side].tensors if known else ():
                if (start := t.start) in known:
                    found[side][start].add(known[start])
        return found

    def _unsettled(self, p: Pair) -> bool:
        """Whether both names spell parts, in two orders, or one may be a part of what was left open."""
        if max(p.source.level, p.target.level) == 2:
            return False
        open_parts = shape_key(p.target.main.shape) in self.open_parts
        return open_parts or (p.source.rank >= 2 and spell_otherwise(p.source, p.target))

    def _take(self, decision: Decision, s: list[Item], t: list[Item]) -> tuple[list[Item], list[Item]]:
        gone: set[int] = set()
        for p in decision.pairs:
            self._take_pair(p)
            gone |= {id(p.source), id(p.target)}
        renumbered = self.aligner.gathered.learned.renumbered
        for tie in decision.ties:
            if tie.reason == NAMESAKE:
                renumbered.teach(tie.sources[0].members[0], tie.targets[0].members[0])
            gone |= {id(m) for f in (*tie.sources, *tie.targets) for m in f.members}
        self.ties += decision.ties
        return [i for i in s if id(i) not in gone], [i for i in t if id(i) not in gone]

    def _take_pair(self, p: Pair) -> None:
        outcome, ds, dt = self.aligner.inside(p.source, p.target)
        self.out.inside.append((outcome, ds, dt, p.cell))
        learned = self.aligner.gathered.learned
        if min(self.region.source.level, self.region.target.level) >= 2:
            learned.renames.teach(self.region, p.source, p.target)
            if not (p.by_number or p.cell.startswith(ORDER)):
                learned.renumbered.teach(p.source, p.target)
            if p.first and may_load(p.cell):
                learned.rows.teach(self.region, p.source, p.target, named=is_named(p.cell))
        if p.first and may_load(p.cell):
            self.certain.append(p)
            self.aligner.gathered.learned.roles.teach(self.region, p.source, p.target)

    def _take_fusion(self, fusion: Fusion, units_s: list[Item], units_t: list[Item]) -> None:
        self.out.matches += [Match(step.sources, step.targets, step.operations, fusion.cell) for step in fusion.steps]
        for row in fusion.open:
            by_targets: dict[tuple[int, ...], list[tuple[tuple[int, ...], tuple[Operation, ...]]]] = {}
            for step in row:
                by_targets.setdefault(step.targets, []).append((step.sources, step.operations))
            self.out.doubts += [Doubt(t, tuple(c), fusion.reason) for t, c in by_targets.items()]
        if not fusion.steps:
            self.open_parts |= {shape_key(i.main.shape) for i in fusion.items[1:]}
        if fusion.steps:
            whole, first = fusion.items[:2]
            self.certain.append(Pair(*((first, whole) if fusion.whole_is_target else (whole, first)), fusion.cell))
        gone = {id(i) for i in fusion.items}
        # what the steps leave of a unit stays open: the bias of q where k has none
        for units, settled in zip((units_s, units_t), fusion.settled):
            left = [x for i in units if id(i) in gone for x in i.tensors if not settled.issuperset(x.positions)]
            units[:] = sorted([i for i in units if id(i) not in gone] + left, key=lambda i: i.start)

    def _match_level(self, sources: list[Item], targets: list[Item]) -> tuple[list[Item], list[Item]]:
        """Match units (or tensors) that are left, class by class."""
        classes_s, classes_t = (_by_profile(side, kinds=self.region.by_core) for side in (sources, targets))
        left_s, left_t = [], []
        for key in sorted(set(classes_s) | set(classes_t)):
            s, t = classes_s.get(key, []), classes_t.get(key, [])
            if s and t:
                s, t = self._pair_class(s, t)
            left_s += s
            left_t += t
        return sorted(left_s, key=lambda i: i.start), sorted(left_t, key=lambda i: i.start)

    # ties -------------------------------------------------------------------------------------------------------

    def _settle_ties(self) -> None:
        """Let order decide what nothing else did, where it may; the rest is in doubt."""
        for tie in self.ties:
            if len(tie.sources) != len(tie.targets) or len(tie.sources) == 1 or tie.reason == TURNED:
                self._doubt(tie)
                continue
            if homes := self._by_home(tie):
                self._follow_order(replace(tie, targets=homes), BY_HOME)
                continue
            elsewhere = self.aligner.elsewhere(self.region)
            cell = order_cell(self.certain, tie, self.ties, elsewhere) if self.aligner.ordered else None
            if cell is None or not may_load(cell):
                self._doubt(tie)
            elif self._runs_otherwise(tie):
                self._doubt(replace(tie, reason=RUN_OTHERWISE))
            elif why := against_order(tie, self.region, cell, self.aligner.classes.learned.renames):
                self._doubt(replace(tie, reason=why))
            else:
                self._follow_order(tie, cell)

    def _by_home(self, tie: Tie) -> tuple[Family, ...]:
        """The targets of a tie in the order of its sources, if each but one stands in the module of its siblings."""
        if not self.aligner.classes.names:
            return ()
        roots = self.region.source, self.region.target
        tied = [[f.members[0] for f in side] for side in (tie.sources, tie.targets)]
        depths = [parting([relative(i, root) for i in side]) for side, root in zip(tied, roots)]
        homes = [[_home(relative(i, root), d) for i in side] for side, root, d in zip(tied, roots, depths)]
        if any(len(set(side)) < len(side) for side in homes):
            return ()
        known: tuple[dict[str, set[str]], dict[str, set[str]]] = (defaultdict(set), defaultdict(set))
        count: Counter[tuple[str, str]] = Counter()
        for p in self.certain:
            ours, theirs = (_home(relative(i, r), d) for i, r, d in zip((p.source, p.target), roots, depths))
            if ours in homes[0] and theirs in homes[1]:
                known[0][ours].add(theirs)
                known[1][theirs].add(ours)
                count[ours, theirs] += 1
        partners = {
            ours: theirs
            for ours, theirs in count
            if known[0][ours] == {theirs} and known[1][theirs] == {ours} and count[ours, theirs] >= 2
        }
        left = [[h for h in side if h not in ends] for side, ends in zip(homes, (partners, partners.values()))]
        if len(left[0]) > 1:
            return ()
        partners.update(zip(*left))
        return tuple(tie.targets[homes[1].index(partners[h])] for h in homes[0])

    def _follow_order(self, tie: Tie, cell: str) -> None:
        """Take the pairs of a tie in their order, all of them or none: what speaks against one speaks against it."""
        costs = {self.aligner.costs.of(f.members[0], g.members[0]) for f, g in zip(tie.sources, tie.targets)}
        if len(costs) > 1 and TRANSPOSED in costs:  # it would take one as it is and turn another
            self._doubt(replace(tie, reason=TURNED))
            return
        if any(len(f.members) != len(g.members) for f, g in zip(tie.sources, tie.targets)):
            self._doubt(tie)
            return
        decision = Decision()
        for f, g in zip(tie.sources, tie.targets):
            self.aligner.classes._zip(f, g, cell, decision, self.region)
        judged = [self.aligner.classes.judge(p, self.region) for p in decision.pairs]
        if why := next((why for _, why in judged if why), ""):
            self._doubt(replace(tie, reason=why))
            return
        for p, _ in judged:
            self._take_pair(replace(p, first=False))
            self.aligner.gathered.learned.roles.teach(self.region, p.source, p.target)
        for inner in decision.ties:
            self._doubt(inner)

    def _runs_otherwise(self, tie: Tie) -> bool:
        """Whether the target runs the tie's items in another order than it registers them.

        An attention may be registered in any order if it runs as its formula then: queries, keys, values, output.
        """
        pairs = [(f.members[0], g.members[0]) for f, g in zip(tie.sources, tie.targets)]
        return self._is_out_of_run(pairs) and all(self._is_out_of_run(self._by_formula(pairs, k)) for k in (0, 1))

    def _is_out_of_run(self, pairs: Sequence[tuple[Item, Item]]) -> bool:
        when = [self.aligner.execution[t.start] for _, t in pairs] if self.aligner.execution else []
        known = [w for w in when if w is not None]
        return known != sorted(known)

    def _by_formula(self, pairs: Sequence[tuple[Item, Item]], side: int) -> Sequence[tuple[Item, Item]]:
        """Pairs in the order of the formula, module by module, if one side's names say what all of them are in it."""
        letters = ["".join(self.region.letters_of(pair[side], side)) for pair in pairs]
        if not all(len(letter) == 1 for letter in letters):
            return pairs
        homes = [owner_path(pair[side].main.path).rpartition(".")[0] for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda k: (homes.index(homes[k]), "qkvo".index(letters[k])))
        return [pairs[k] for k in order]

    def _doubt(self, tie: Tie) -> None:
        """List every tensor of a tie with its counterparts in all rivals."""
        rows: dict[tuple[int, ...], list[tuple[tuple[int, ...], tuple[Operation, ...]]]] = {}
        for j, g in enumerate(tie.targets):
            order = sorted(range(len(tie.sources)), key=lambda i: (abs(i - j), i))[:MAX_CANDIDATES]
            for k, t in enumerate(g.members):
                for i in order:
                    members = tie.sources[i].members
                    s = members[min(k, len(members) - 1)]
                    if self.aligner.costs.of(s, t) is None:
                        continue
                    outcome, ds, dt = self.aligner.inside(s, t)
                    matches, doubts = outcome.flat()
                    for m in matches:
                        m = m.shifted(ds, dt)
                        rows.setdefault(m.targets, []).append((m.sources, m.operations))
                    for d in doubts:
                        row = rows.setdefault(tuple(p + dt for p in d.targets), [])
                        row += [(tuple(p + ds for p in sources), ops) for sources, ops in d.candidates]
        for targets, candidates in rows.items():
            unique = tuple(dict.fromkeys(candidates))[:MAX_CANDIDATES]
            self.out.doubts.append(Doubt(targets, unique, tie.reason))


def _home(path: str, depth: int) -> str:
    """The module at a depth that a path leads through, or around what stands there."""
    return ".".join(path.split(".")[:-1][: depth + 1])


def _without_partner(
    s: Sequence[Item], t: Sequence[Item], size: Callable[[Item], int]
) -> tuple[list[Item], list[Item]]:
    """The modules of sizes that the two sides do not have equally often."""
    sizes = [Counter(size(i) for i in side if i.level == 2) for side in (s, t)]
    left: list[list[Item]] = [
        [i for i in side if i.level == 2 and sizes[0][size(i)] != sizes[1][size(i)]] for side in (s, t)
    ]
    return left[0], left[1]


def _tensors(units: Sequence[Item]) -> list[Item]:
    return [t for u in units for t in u.tensors]


def _key(item: Item, kinds: bool) -> Profile:
    """Items of one key hold tensors of the same shapes; of vectors also by kind, where one side has more kinds."""
    kind = kind_of(item.path) if kinds and item.level == 0 and item.rank < 2 else ""
    return item.level, kind, item.profile_key


def _by_profile(items: Sequence[Item], *, kinds: bool) -> dict[Profile, list[Item]]:
    found: dict[Profile, list[Item]] = {}
    for item in items:
        found.setdefault(_key(item, kinds), []).append(item)
    return found
