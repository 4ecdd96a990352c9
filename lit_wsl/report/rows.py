"""What a report shows of a plan, before it is drawn: steps by module, folded by families, and what has no partner."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import Levenshtein

from lit_wsl.plan.coverage import excluded_names
from lit_wsl.plan.entries import CANDIDATE, Ambiguity, PlanEntry, Side, Unmatched
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, ParameterInfo, Shape, shape_text
from lit_wsl.structure.families import fold

Confidence = Literal["high", "medium", "low"]
By = Literal["group", "tensor"]

HIGH, MEDIUM = 0.8, 0.6


def confidence(score: float) -> Confidence:
    """How far a person may trust a score: ``high`` above 0.8, ``medium`` from 0.6, ``low`` below.

    >>> confidence(0.81), confidence(0.8), confidence(0.59)
    ('high', 'medium', 'low')
    """
    return "high" if score > HIGH else "medium" if score >= MEDIUM else "low"


@dataclass(frozen=True)
class MappingRow:
    """One line of a mapping table: a family of steps of a plan.

    Attributes:
        sources: Names of the sources, indices folded; module paths where ``by`` is ``"group"``.
        targets: The same for the targets.
        badge: The operation in one word.
        tensors: What the line moves, in words: ``weight (64, 64), bias (64)``.
        score: The lowest score in the family, since that is the one to look at.
        margin: The lowest margin in the family.
        entries: The steps of the plan.
        groups: How many modules (or tensors) of the target are folded into the line.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    badge: str
    tensors: str
    score: float
    margin: float
    entries: tuple[PlanEntry, ...]
    groups: int


def count_text(number: int) -> str:
    """A number of elements, short.

    >>> count_text(532), count_text(11_689_512), count_text(1_000_000_000)
    ('532', '11.7 M', '1.0 G')
    """
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def percent(share: float) -> str:
    """A share in percent that says 100 % only of everything and 0 % only of nothing.

    >>> percent(0.99999), percent(1.0), percent(0.00001), percent(0.5)
    ('99.9%', '100.0%', '0.1%', '50.0%')
    """
    if share >= 1.0 or share <= 0.0:
        return f"{100 * share:.1f}%"
    return f"{min(99.9, max(0.1, 100 * share)):.1f}%"


def mapping_rows(plan: TransferPlan, *, by: By = "group", folded: bool = True) -> list[MappingRow]:
    """The steps of a plan as lines of a table, in the plan's order; folded where they differ only by indices."""
    groups: dict[tuple[object, ...], list[PlanEntry]] = {}
    for number, entry in enumerate(plan.entries):
        key: tuple[object, ...] = (number,)
        if by == "group":
            key = (_paths(entry.sources), _paths(entry.targets), entry.badge)
        groups.setdefault(key, []).append(entry)
    lines = [_Line(tuple(entries), by) for entries in groups.values()]
    if not folded:
        return [_row([line], line.sources, line.targets) for line in lines]
    families = fold([(*line.sources, *line.targets) for line in lines], [line.key for line in lines])
    rows = []
    for family in families:
        members = [lines[m] for m in family.members]
        cut = len(members[0].sources)
        rows.append(_row(members, family.patterns[:cut], family.patterns[cut:]))
    return rows


@dataclass(frozen=True)
class _Line:
    entries: tuple[PlanEntry, ...]
    by: By

    @property
    def sources(self) -> tuple[str, ...]:
        first = self.entries[0].sources
        return _paths(first) if self.by == "group" else first

    @property
    def targets(self) -> tuple[str, ...]:
        first = self.entries[0].targets
        return _paths(first) if self.by == "group" else first

    @property
    def tensors(self) -> str:
        return ", ".join(_moved(entry, leaves=self.by == "group") for entry in self.entries)

    @property
    def key(self) -> tuple[object, ...]:
        return (len(self.sources), self.entries[0].badge, self.tensors)


def _row(members: Sequence[_Line], sources: tuple[str, ...], targets: tuple[str, ...]) -> MappingRow:
    entries = tuple(entry for line in members for entry in line.entries)
    return MappingRow(
        sources=sources,
        targets=targets,
        badge=entries[0].badge,
        tensors=members[0].tensors,
        score=min(entry.score for entry in entries),
        margin=min(entry.margin for entry in entries),
        entries=entries,
        groups=len(members),
    )


def _paths(names: tuple[str, ...]) -> tuple[str, ...]:
    """The module paths of names, each once; ``(root)`` for the model itself."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] or "(root)" for name in names))


def _moved(entry: PlanEntry, *, leaves: bool) -> str:
    """What one step moves: ``weight 64x64``, ``gamma -> weight 64``, ``3 x 64x64 -> 192x64``."""
    before, after = _shapes(entry.source_shapes), _shapes(entry.target_shapes)
    shapes = after if before == after else f"{before} -> {after}"
    if not leaves:
        return shapes
    old, new = _leaves(entry.sources), _leaves(entry.targets)
    return f"{new if old == new else f'{old} -> {new}'} {shapes}".strip()


def _leaves(names: tuple[str, ...]) -> str:
    return "/".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _shapes(shapes: tuple[Shape, ...]) -> str:
    """Shapes in words, equal neighbours counted: ``3 x 64x64``."""
    runs: list[tuple[Shape, int]] = []
    for shape in shapes:
        if runs and runs[-1][0] == shape:
            runs[-1] = (shape, runs[-1][1] + 1)
        else:
            runs.append((shape, 1))
    return " + ".join(shape_text(s) if n == 1 else f"{n} of {shape_text(s)}" for s, n in runs)


@dataclass(frozen=True)
class OpenQuestion:
    """Targets that nothing decides, with the same candidates and for the same reason, folded by families.

    Attributes:
        targets: Names of the targets, indices folded, with their shape.
        candidates: Score and names of each possible source, the best first; the lowest score of the family.
        reason: Why nothing decides.
        cases: The plan's cases that it stands for.
    """

    targets: tuple[str, ...]
    candidates: tuple[tuple[float, str], ...]
    reason: str
    cases: tuple[Ambiguity, ...]

    @property
    def tensors(self) -> int:
        """How many target tensors the question is about."""
        return sum(len(case.targets) for case in self.cases)


def open_questions(plan: TransferPlan) -> list[OpenQuestion]:
    """The ambiguous targets of a plan, each once, in the plan's order."""
    cases = plan.ambiguous
    names = [(*case.targets, *(s for c in case.candidates for s in c.sources)) for case in cases]
    keys = [
        (len(case.targets), tuple(len(c.sources) for c in case.candidates), case.shape, case.reason) for case in cases
    ]
    merged: dict[tuple[tuple[str, ...], str], list[OpenQuestion]] = {}
    for family in fold(names, keys):
        members = [cases[m] for m in family.members]
        first, at = members[0], len(members[0].targets)
        candidates = []
        for number, candidate in enumerate(first.candidates):
            sources = family.patterns[at : at + len(candidate.sources)]
            candidates.append((min(case.candidates[number].score for case in members), " + ".join(sources)))
            at += len(candidate.sources)
        found = OpenQuestion(
            targets=tuple(f"{name} {shape_text(first.shape)}" for name in family.patterns[: len(first.targets)]),
            candidates=tuple(candidates),
            reason=first.reason,
            cases=tuple(members),
        )
        merged.setdefault((tuple(name for _, name in candidates), first.reason), []).append(found)
    return [
        OpenQuestion(
            targets=tuple(dict.fromkeys(target for one in alike for target in one.targets)),
            candidates=alike[0].candidates,
            reason=alike[0].reason,
            cases=tuple(case for one in alike for case in one.cases),
        )
        for alike in merged.values()
    ]


def operation_counts(plan: TransferPlan) -> dict[str, int]:
    """Number of steps by operation, the most frequent first."""
    counts: dict[str, int] = {}
    for entry in plan.entries:
        counts[entry.badge] = counts.get(entry.badge, 0) + 1
    return dict(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])))


def describe_from_plan(plan: TransferPlan, side: Side) -> ModelDescription:
    """Rebuild one side from what a plan knows of it: names, shapes and kinds; order as good as the plan has it."""
    found: dict[str, ParameterInfo] = {}

    def add(name: str, shape: Shape, kind: str) -> None:
        if name not in found:
            found[name] = ParameterInfo(name, tuple(shape), kind=kind, index=len(found))  # type: ignore[arg-type]

    for entry in plan.entries:
        for name, shape in zip(entry.names(side), entry.shapes(side)):
            add(name, shape, entry.kind)
    for left in plan.unmatched(side):
        add(left.name, left.shape, left.kind)
    if side == "target":
        for ambiguity in plan.ambiguous:
            for name in ambiguity.targets:
                add(name, ambiguity.shape, "parameter")
    return ModelDescription(tuple(found.values()), label=getattr(plan, side).label)


_NEAREST = 3  # nearest partners named per reason
MOST_LOOKED_UP = 200  # families of a side whose nearest partner is looked for; a screen shows far fewer


@dataclass(frozen=True)
class Gap:
    """Tensors of one side without a partner, alike but for the numbers in their names.

    Attributes:
        pattern: Their name, numbers folded.
        members: The tensors.
        reason: Why they have no partner.
        nearest: The most alike tensor of the other side, for the first of them.
        advice: What would fill them, where that is known.
    """

    pattern: str
    members: tuple[Unmatched, ...]
    reason: str
    nearest: ParameterInfo | None = None
    advice: str = ""

    @property
    def text(self) -> str:
        """Name and shape: ``blocks.{0..11}.norm.bias 64``."""
        kind = " (buffer)" if self.members[0].kind == "buffer" else ""
        return f"{self.pattern} {shape_text(self.members[0].shape)}{kind}"


def left_over(plan: TransferPlan, side: Side, described: ModelDescription) -> tuple[Unmatched, ...]:
    """The tensors of a side that were asked for and have no partner; ambiguous targets are not among them.

    What a plan does not mention (it was edited, or made for a smaller model) is left over too.
    """
    settled = {described.tied.get(name, name) for entry in plan.entries for name in entry.names(side)}
    if side == "target":
        settled |= {described.tied.get(name, name) for case in plan.ambiguous for name in case.targets}
    settled |= excluded_names(plan, side, described)
    known = {item.name: item for item in plan.unmatched(side)}
    rivals = _candidates(plan) if side == "source" else frozenset()

    def told(info: ParameterInfo) -> Unmatched:
        why = CANDIDATE if info.name in rivals else "not in the plan"
        return known.get(info.name) or Unmatched(info.name, info.shape, info.kind, why)

    return tuple(told(info) for info in described.parameters if info.name not in settled)


def _candidates(plan: TransferPlan) -> frozenset[str]:
    """The sources that an ambiguous target may have."""
    return frozenset(name for case in plan.ambiguous for one in case.candidates for name in one.sources)


def gaps(plan: TransferPlan, side: Side, source: ModelDescription, target: ModelDescription) -> list[Gap]:
    """What is left over of a side, folded, each with its nearest partner on the other."""
    own, other = (source, target) if side == "source" else (target, source)
    left = left_over(plan, side, own)
    across: Side = "target" if side == "source" else "source"
    free = frozenset(item.name for item in left_over(plan, across, other))
    rivals, listed = _Rivals(other, free), _candidates(plan) if side == "source" else frozenset()
    found: list[Gap] = []
    for family in fold([(item.name, item.reason) for item in left], [(item.shape, item.kind) for item in left]):
        members = tuple(left[m] for m in family.members)
        first = members[0]
        looked_up = len(found) < MOST_LOOKED_UP and first.name not in listed  # candidates stand with their targets
        nearest = rivals.nearest(first) if looked_up else None
        advice = ""
        if nearest is not None and nearest.name in free and len(members) == 1:
            new, old = (first, nearest) if side == "target" else (nearest, first)
            advice = _advice(old, new, source, target, plan)
        found.append(Gap(family.patterns[0], members, family.patterns[1], nearest, advice))
    return found


def partner_lines(found: Sequence[Gap]) -> list[str]:
    """The nearest partners of some gaps, and what would fill them."""
    near = dict.fromkeys(f"{gap.nearest.name} {shape_text(gap.nearest.shape)}" for gap in found if gap.nearest)
    lines = [f"nearest: {', '.join(list(near)[:_NEAREST])}"] if near else []
    return lines + [f"try: {advice}" for advice in dict.fromkeys(gap.advice for gap in found) if advice]


class _Rivals:
    """The tensors of a side by kind and rank, the free ones alone where there are any."""

    def __init__(self, side: ModelDescription, free: frozenset[str]) -> None:
        self._free: dict[tuple[str, int], list[ParameterInfo]] = {}
        self._all: dict[tuple[str, int], list[ParameterInfo]] = {}
        for info in side.parameters:
            for pool in (self._all, self._free) if info.name in free else (self._all,):
                pool.setdefault((info.kind, len(info.shape)), []).append(info)

    def nearest(self, item: Unmatched) -> ParameterInfo | None:
        """The tensor that most likely stands for this one: that of the reason, or free, of its shape, named like it."""
        key, leaf = (item.kind, len(item.shape)), item.name.rpartition(".")[2]
        rivals = self._free.get(key) or self._all.get(key)
        if not rivals:
            return None
        named = set(re.split(r"[\s,()]+", item.reason))
        if told := [rival for rival in rivals if rival.name in named]:
            return told[0]
        points = [sum(a == b for a, b in zip(rival.shape, item.shape)) + (rival.leaf == leaf) for rival in rivals]
        best = [rival for rival, found in zip(rivals, points) if found == max(points)]
        return max(best, key=lambda rival: Levenshtein.normalized_similarity(rival.name, item.name))


def _advice(
    old: Unmatched | ParameterInfo,
    new: Unmatched | ParameterInfo,
    source: ModelDescription,
    target: ModelDescription,
    plan: TransferPlan,
) -> str:
    """The value-changing operation that takes the one into the other, if the user may want it."""
    differing = [axis for axis, (a, b) in enumerate(zip(old.shape, new.shape)) if a != b]
    roles = {name.rpartition(".")[2] for name in (old.name, new.name)}
    if len(differing) != 1 or len(roles) != 1:
        return ""
    places = [(_module(side), item.name.rpartition(".")[0]) for side, item in ((source, old), (target, new))]
    axis, rank = differing[0], len(new.shape)
    if axis == 0 and rank <= 2 and all(order and own == order[-1] for order, own in places):
        wanted, what = "partial_head", "copies the rows that both have"
    elif axis == 1 and rank == 4 and all(order and own == order[0] for order, own in places):
        wanted, what = "new_input_channels", "adapts the first convolution to the other number of channels"
    else:
        return ""
    return "" if wanted in plan.options.get("adapt", ()) else f'adapt=["{wanted}"] {what}'


def _module(side: ModelDescription) -> list[str]:
    """Paths of the modules that hold matrices, in order: no norm is a head."""
    matrices = (info for info in side.parameters if info.kind == "parameter" and len(info.shape) >= 2)
    return list(dict.fromkeys(info.module_path for info in matrices))


def remedy(plan: TransferPlan) -> str:
    """What a user can do about ambiguous targets; empty where there are none."""
    if not plan.ambiguous:
        return ""
    return (
        "to decide: give the old code (source_module=) and a sample, or your loss and data; or move the right "
        "candidate to the entries of a plan file"
    )
