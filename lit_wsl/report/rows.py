"""What a report shows of a plan, before it is drawn: steps grouped by module and folded by families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_wsl.plan.entries import Ambiguity, PlanEntry, Side
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, ParameterInfo, Shape
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


def shape_text(shape: Shape) -> str:
    """A shape as people write it.

    >>> shape_text((64, 3, 7, 7)), shape_text(()), shape_text((5,))
    ('64x3x7x7', 'scalar', '5')
    """
    return "x".join(map(str, shape)) if shape else "scalar"


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
    """The steps of a plan as lines of a table, in the plan's order.

    Args:
        plan: The plan.
        by: One line per pair of modules, or one per step.
        folded: Fold lines that differ only by indices.
    """
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
    """Rebuild one side from what a plan knows of it: names, shapes and kinds; order as good as the plan has it.

    Args:
        plan: The plan.
        side: ``"source"`` or ``"target"``.
    """
    found: dict[str, ParameterInfo] = {}

    def add(name: str, shape: Shape, kind: str) -> None:
        if name not in found:
            found[name] = ParameterInfo(name, tuple(shape), kind=kind, index=len(found))  # type: ignore[arg-type]

    for entry in plan.entries:
        names, shapes = (
            (entry.sources, entry.source_shapes) if side == "source" else (entry.targets, entry.target_shapes)
        )
        for name, shape in zip(names, shapes):
            add(name, shape, entry.kind)
    for left in plan.unmatched_source if side == "source" else plan.unmatched_target:
        add(left.name, left.shape, left.kind)
    if side == "target":
        for ambiguity in plan.ambiguous:
            for name in ambiguity.targets:
                add(name, ambiguity.shape, "parameter")
    label = plan.source.label if side == "source" else plan.target.label
    return ModelDescription(tuple(found.values()), label=label)
