"""Entries of a plan: those of the matching, with scores and reasons, and those that a judge puts in their place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lit_wsl.errors import listed
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.scoring import Context, score_pair
from lit_wsl.matching.tree import shape_key
from lit_wsl.matching.words import split_numbers
from lit_wsl.plan.entries import CANDIDATE, Ambiguity, Candidate, PlanEntry, Unmatched
from lit_wsl.plan.operations import Cast, FanOut, Operation, run_operations
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, ParameterInfo, Shape

MAX_CANDIDATES = 8
BY_LOSS = "the loss on data decides it"
ORDER_MARGIN = 0.25  # more than what order alone gives
STILL_OPEN = "the loss on data does not decide between the candidates"
Sources = Sequence[tuple[Sequence[ParameterInfo], tuple[Operation, ...]]]


class EntryWriter:
    """Collects matches and doubts, scores them, applies the threshold and explains the rest."""

    def __init__(
        self, source: ModelDescription, target: ModelDescription, options: MatchingOptions, context: Context
    ) -> None:
        self.source = source
        self.target = target
        self.options = options
        self.context = context
        self.floor = options.floor
        self._entries: dict[str, tuple[PlanEntry, tuple[ParameterInfo, ...], tuple[ParameterInfo, ...]]] = {}
        self._doubts: list[Ambiguity] = []
        self._reasons: dict[tuple[str, str], str] = {}  # the other side and the name: names may be on both
        self._scores: dict[tuple[object, ...], float] = {}
        self._fanned: dict[str, str] = {}

    def add(
        self,
        sources: Sequence[ParameterInfo],
        targets: Sequence[ParameterInfo],
        operations: tuple[Operation, ...],
        margin: float,
        cell: str,
        reason: str = "",
    ) -> None:
        """Take a match as an entry, unless its score is below the threshold."""
        score = self.score(sources, targets, operations)
        if score < self.floor:
            short = f"scores {score:.2f}, below the threshold {self.floor:.2f}"
            self._reasons |= {("source", t.name): f"the best source, {sources[0].name}, {short}" for t in targets}
            self._reasons |= {("target", s.name): f"the best target, {targets[0].name}, {short}" for s in sources}
            return
        entry = PlanEntry(
            sources=tuple([s.name for s in sources]),
            targets=tuple([t.name for t in targets]),
            operations=(*operations, *cast_between(sources[0], targets[0])),
            source_shapes=tuple([s.shape for s in sources]),
            target_shapes=tuple([t.shape for t in targets]),
            kind=targets[0].kind,
            score=round(score, 4),
            margin=margin,
            reason=reason or cell,
            evidence=cell,
        )
        twin = self._fanned.get(sources[0].name) if len(sources) == len(targets) == 1 else None
        if twin is not None:  # one tied source fills several targets: one step, so that it can be reversed
            known, _, filled = self._entries[twin]
            both = (*filled, *targets)
            entry = replace(
                known,
                targets=tuple(t.name for t in both),
                target_shapes=tuple(t.shape for t in both),
                operations=(*(op for op in known.operations if op.name != "fan_out"), FanOut(len(both))),
            )
            self._entries[twin] = (entry, tuple(sources), both)
            return
        self._entries[targets[0].name] = (entry, tuple(sources), tuple(targets))
        if len(sources) == len(targets) == 1:
            self._fanned[sources[0].name] = targets[0].name

    def score(
        self, sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo], operations: tuple[Operation, ...]
    ) -> float:
        """Score of a match: mean over its pairs; members of one family share a score."""
        if len(sources) == len(targets) == 1:
            return self._score(sources[0], targets[0], bool(operations))
        count = max(len(sources), len(targets))
        pairs = [(sources[min(k, len(sources) - 1)], targets[min(k, len(targets) - 1)]) for k in range(count)]
        pairs = pairs[:MAX_CANDIDATES]
        return sum(self._score(s, t, bool(operations)) for s, t in pairs) / len(pairs)

    def _score(self, s: ParameterInfo, t: ParameterInfo, operation: bool) -> float:
        families = split_numbers(s.name)[0], split_numbers(t.name)[0]
        key = (*families, s.shape == t.shape, operation, self.context.parents(s.name, t.name))
        if key not in self._scores:
            self._scores[key] = score_pair(s, t, self.options, operation=operation, context=self.context).total
        return self._scores[key]

    def doubt(self, targets: Sequence[ParameterInfo], candidates: Sources, reason: str) -> None:
        """List targets as ambiguous, with what each candidate would need."""
        shown = tuple(
            Candidate(tuple(s.name for s in sources), round(self.score(sources, targets, operations), 4), operations)
            for sources, operations in candidates
        )
        self._doubts.append(Ambiguity(tuple(t.name for t in targets), shown, targets[0].shape, reason))

    def pairs(self) -> Iterator[tuple[ParameterInfo, ParameterInfo]]:
        """Pairs of source and target tensors of the entries so far."""
        for entry, sources, targets in list(self._entries.values()):
            if len(sources) == len(targets) == 1:
                yield sources[0], targets[0]
            else:
                yield from ((s, t) for s in sources for t in targets if entry.kind == "parameter")

    def evidence_by_module(self) -> dict[str, str]:
        """The evidence for what fills each module's own weights; its buffers take it over."""
        weights = (e for e in self._entries.values() if e[0].kind == "parameter")
        return {targets[0].module_path: entry.evidence for entry, _, targets in weights}

    def filled(self) -> set[str]:
        """Names of the targets that get something."""
        return {t.name for _, _, targets in self._entries.values() for t in targets}

    def used(self) -> set[str]:
        """Names of the sources that go somewhere."""
        return {s.name for _, sources, _ in self._entries.values() for s in sources}

    def refuse(self, module_path: str, reason: str) -> None:
        """Drop all entries into a module."""
        for name, (_, sources, targets) in list(self._entries.items()):
            if any(t.module_path == module_path for t in targets):
                del self._entries[name]
                self._reasons |= {("source", t.name): reason for t in targets}
                self._reasons |= {("target", s.name): reason for s in sources}

    def finish(
        self,
    ) -> tuple[tuple[PlanEntry, ...], tuple[Ambiguity, ...], tuple[Unmatched, ...], tuple[Unmatched, ...]]:
        """Entries in the target's order, ambiguities, and what is unmatched on either side, with reasons."""
        place = {info.name: info.index for info in self.target.parameters}
        entries = sorted((e for e, _, _ in self._entries.values()), key=lambda e: place[e.targets[0]])
        filled, used = self.filled(), self.used()
        doubts = sorted(
            (d for d in self._doubts if not filled.intersection(d.targets)), key=lambda d: place[d.targets[0]]
        )
        unsure = {t for d in doubts for t in d.targets}
        candidates = {s for d in doubts for c in d.candidates for s in c.sources}
        rest_s = [i for i in self.source.parameters if i.name not in used]
        rest_t = [i for i in self.target.parameters if i.name not in filled]
        why_s = self._reasons_of(rest_s, self.target, rest_t, "target") | dict.fromkeys(candidates, CANDIDATE)
        why_t = self._reasons_of([i for i in rest_t if i.name not in unsure], self.source, rest_s, "source")
        unmatched_s, unmatched_t = (
            tuple(Unmatched(i.name, i.shape, i.kind, why[i.name]) for i in rest if i.name in why)
            for rest, why in ((rest_s, why_s), (rest_t, why_t))
        )
        return tuple(entries), tuple(doubts), unmatched_s, unmatched_t

    def _reasons_of(
        self, infos: Sequence[ParameterInfo], side: ModelDescription, rest: Sequence[ParameterInfo], other: str
    ) -> dict[str, str]:
        """Why each of some tensors found no partner on the other side, of which some have none either."""
        shapes = {shape_key(i.shape) for i in side.parameters} if infos else set()
        free: dict[Shape, list[ParameterInfo]] = {}
        for info in rest if infos else ():
            free.setdefault(shape_key(info.shape), []).append(info)
        return {i.name: self._why(i, shapes, free, other) for i in infos}

    def _why(self, info: ParameterInfo, shapes: set[Shape], free: dict[Shape, list[ParameterInfo]], other: str) -> str:
        if (other, info.name) in self._reasons:
            return self._reasons[other, info.name]
        if info.kind == "buffer" and self.options.excludes_buffers:
            return "buffers='exclude' leaves buffers alone"
        key = shape_key(info.shape)
        if key not in shapes:
            return f"no tensor of the {other} has this shape"
        if key not in free:
            return f"all tensors of the {other} with this shape belong elsewhere"
        if info.kind == "buffer" and info.counts:
            return "a counter is loaded only together with the statistics that it counts for"
        rivals = [i.name for i in free[key] if i.kind == info.kind]
        if not rivals:
            return f"no free {info.kind} of the {other} has this shape"
        which = f"which of the {len(rivals)} free tensors" if len(rivals) > 1 else "whether the free tensor"
        return (
            f"nothing shows {which} of this shape ({listed(rivals, 3)}) "
            "belongs here: an edited plan, source_prefix, source_module or a proof on data decides"
        )


def cast_between(source: ParameterInfo, target: ParameterInfo) -> tuple[Operation, ...]:
    """The cast from one tensor's data type to another's, if they differ."""
    if source.dtype == target.dtype:
        return ()
    return (Cast(str(source.dtype).removeprefix("torch."), str(target.dtype).removeprefix("torch.")),)


def answered(
    plan: TransferPlan,
    answers: Sequence[PlanEntry],
    sides: tuple[ModelDescription, ModelDescription],
    *,
    open_: Collection[str] = (),
    reason: str = BY_LOSS,
    refuted: str = "the loss refutes it",
) -> TransferPlan:
    """The plan with the entries that a judge has found, but for targets that it leaves open."""
    source, target = sides
    before = {e.targets: e for e in plan}
    taken: list[PlanEntry] = []
    notes: list[str] = []
    for entry in answers:
        if set(entry.targets).intersection(open_):
            continue
        known = before.get(entry.targets)
        if known is not None and what_it_does(known) == what_it_does(entry):
            taken.append(known)
            continue
        if known is not None:
            notes.append(f"replaced, since {refuted}: {known.sources[0]} -> {entry.targets[0]}")
        cast = cast_between(source[entry.sources[0]], target[entry.targets[0]])
        taken.append(replace(entry, operations=(*entry.operations, *cast), reason=reason))
    filled = {t for e in taken for t in e.targets}
    asked = {t for e in answers for t in e.targets}
    kept = [e for e in plan if not filled.union(asked).intersection(e.targets)]
    entries = [*kept, *taken]
    filled, used = {t for e in entries for t in e.targets}, {s for e in entries for s in e.sources}
    place = {info.name: info.index for info in target.parameters}
    listed = {t for a in plan.ambiguous for t in a.targets} | filled
    doubts = tuple(
        Ambiguity(e.targets, (Candidate(e.sources, 1.0, e.operations),), e.target_shapes[0], STILL_OPEN)
        for e in answers
        if set(e.targets).intersection(open_) and not listed.intersection(e.targets)
    )
    shown = notes if len(notes) <= 3 else [*notes[:3], f"and {len(notes) - 3} more like these"]
    return replace(
        plan,
        entries=tuple(sorted(entries, key=lambda e: place.get(e.targets[0], 0))),
        ambiguous=(*(a for a in plan.ambiguous if not set(a.targets) <= filled), *doubts),
        unmatched_target=tuple(u for u in plan.unmatched_target if u.name not in filled),
        unmatched_source=tuple(u for u in plan.unmatched_source if u.name not in used),
        notes=(*plan.notes, *shown),
    )


def what_it_does(entry: PlanEntry | None) -> object:
    """What an entry does, without a change of data type."""
    return entry and (entry.sources, entry.targets, tuple(op for op in entry.operations if op.name != "cast"))


def is_only_renamed(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> bool:
    """Whether every parameter stands where it stood and nothing is done to any: the same code under other names."""
    whole = [e for e in plan if e.kind == "parameter"]
    if plan.ambiguous or any(op.name not in ("cast", "fan_out") for e in whole for op in e.operations):
        return False
    sides = [[i for i in side.parameters if i.kind == "parameter"] for side in (source, target)]
    places = [source[e.sources[0]].index for e in whole]
    return len(whole) == len(sides[0]) == len(sides[1]) and places == sorted(places)


def filled(entry: PlanEntry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an entry puts into the model, by name."""
    values = run_operations(entry.operations, [tensors[s] for s in entry.sources])
    return {n: v.reshape(s).contiguous() for n, v, s in zip(entry.targets, values, entry.target_shapes)}


def leaves_nothing_open(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> bool:
    """Whether it is the same code under other names, and more than order says so."""
    return is_only_renamed(plan, source, target) and not any(map(is_doubtful, plan))


def is_doubtful(entry: PlanEntry) -> bool:
    """Whether nothing but order decided an entry."""
    return entry.margin <= ORDER_MARGIN
