"""What a report is made from, gathered from whatever a caller has, and how the score of one match comes about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rapidfuzz import process
from rapidfuzz.distance import Levenshtein
from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from lit_wsl.errors import MappingError
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.scoring import Context, ScoreBreakdown, score_pair
from lit_wsl.plan.coverage import Coverage, measure_coverage
from lit_wsl.plan.entries import PlanEntry, Side
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.drawing import COLOURS, LEGEND, Bar, Text, View, Wrapped, score_text, short_columns
from lit_wsl.report.rows import confidence, describe_from_plan, gaps, partner_lines
from lit_wsl.structure.description import ModelDescription, ParameterInfo, Shape, shape_text

MOST_EXPLAINED = 600  # steps of a report with a runner-up each; of more, the least certain ones


@dataclass(frozen=True)
class Material:
    """Everything that a report shows.

    Attributes:
        plan: The plan.
        source: The checkpoint's side.
        target: The model's side.
        coverage: The plan's coverage.
        options: The options of the matching.
        warnings: What the reader should look at.
        notes: What is worth a line.
    """

    plan: TransferPlan
    source: ModelDescription
    target: ModelDescription
    coverage: Coverage
    options: MatchingOptions
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def last_places(self) -> tuple[int, int]:
        """Last place in the execution order of each side, at least 1."""
        return _last_place(self.source), _last_place(self.target)

    @cached_property
    def context(self) -> Context:
        """What the plan's steps tell of one another."""
        return Context((entry.sources, entry.targets) for entry in self.plan.entries if entry.kind == "parameter")

    @cached_property
    def module_pairs(self) -> frozenset[tuple[str, str]]:
        """Paths of the modules whose tensors the plan matches."""
        return frozenset(
            (source.rpartition(".")[0], target.rpartition(".")[0])
            for entry in self.plan.entries
            for source, target in pairs(entry)
        )

    @cached_property
    def alike(self) -> dict[Side, dict[tuple[str, Shape], list[ParameterInfo]]]:
        """The tensors of each side by kind and by shape, whose axes may stand in any order."""
        found: dict[Side, dict[tuple[str, Shape], list[ParameterInfo]]] = {"source": {}, "target": {}}
        for groups, described in zip(found.values(), (self.source, self.target)):
            for info in described.parameters:
                groups.setdefault((info.kind, tuple(sorted(info.shape))), []).append(info)
        return found

    @cached_property
    def partner_modules(self) -> dict[Side, dict[str, set[str]]]:
        """For modules of the other side: the modules of this side that share a step with them."""
        found: dict[Side, dict[str, set[str]]] = {"source": {}, "target": {}}
        for source, target in self.module_pairs:
            found["source"].setdefault(target, set()).add(source)
            found["target"].setdefault(source, set()).add(target)
        return found

    @cached_property
    def questioned(self) -> frozenset[int]:
        """Numbers of the steps whose runner-up a report names: all, or the least certain ones of very many."""
        entries = self.plan.entries
        if len(entries) <= MOST_EXPLAINED:
            return frozenset(range(len(entries)))
        doubt = sorted(range(len(entries)), key=lambda i: (entries[i].margin, entries[i].score, i))
        return frozenset(doubt[:MOST_EXPLAINED])

    def score(self, source: ParameterInfo, target: ParameterInfo, *, operation: bool = False) -> ScoreBreakdown:
        """Score any pair of tensors as the plan's steps are scored: with learned words, and with the parents' match.

        The agreement in execution order, where both sides have one, is shown among the parts of the hierarchy; it is
        evidence for the alignment and no part of the sum.
        """
        found = score_pair(source, target, self.options, operation=operation, context=self.context)
        if source.execution_order is None or target.execution_order is None:
            return found
        first, last = (
            place / most for place, most in zip((source.execution_order, target.execution_order), self.last_places)
        )
        return replace(found, hierarchy_parts={**found.hierarchy_parts, "order": 1.0 - abs(first - last)})

    @classmethod
    def gather(
        cls,
        result: Any,
        *,
        source: ModelDescription | None = None,
        target: ModelDescription | None = None,
        coverage: Coverage | None = None,
        options: MatchingOptions | None = None,
        warnings: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> Material:
        """Gather from a :class:`~lit_wsl.TransferReport`, a :class:`~lit_wsl.MappingResult` or a plan.

        Args:
            result: A plan, or an object that has one as ``plan``.
            source: The checkpoint's side; rebuilt from the plan where it is not given.
            target: The model's side; likewise.
            coverage: The coverage; taken from ``result`` or counted where it is not given.
            options: The options of the matching; read from the plan where they are not given.
            warnings: Further warnings.
            notes: Further notes.
        """
        plan: TransferPlan = result if isinstance(result, TransferPlan) else result.plan
        source = source or _description(result, "source") or describe_from_plan(plan, "source")
        target = target or _description(result, "target") or describe_from_plan(plan, "target")
        counted = coverage or getattr(result, "coverage", None) or measure_coverage(plan, source, target)
        remarks = plan.notes if result is plan else getattr(result, "notes", plan.notes)
        return cls(
            plan=plan,
            source=source,
            target=target,
            coverage=counted,
            options=options or MatchingOptions.of(plan.options),
            warnings=(*getattr(result, "warnings", ()), *warnings),
            notes=tuple(dict.fromkeys((*remarks, *notes))),
        )


def _last_place(side: ModelDescription) -> int:
    return max((i.execution_order for i in side.parameters if i.execution_order is not None), default=0) or 1


def _description(result: Any, side: str) -> ModelDescription | None:
    found = getattr(result, side, None)
    return found if isinstance(found, ModelDescription) else None


def pairs(entry: PlanEntry) -> Iterator[tuple[str, str]]:
    """The pairs of tensors of one step that belong together, for scores: ``q -> qkv``, ``k -> qkv``, ``v -> qkv``."""
    if len(entry.sources) == len(entry.targets):
        yield from zip(entry.sources, entry.targets)
    else:
        yield from ((source, target) for source in entry.sources for target in entry.targets)


def breakdown(material: Material, entry: PlanEntry, source: str, target: str) -> ScoreBreakdown:
    """Score one pair of a step, with the evidence that both descriptions give."""
    one, other = _info(material.source, source), _info(material.target, target)
    return material.score(one, other, operation=entry.badge not in ("exact", "cast"))


def _info(side: ModelDescription, name: str) -> ParameterInfo:
    return side[name] if name in side else ParameterInfo(name, ())


QUICK = 4  # rivals scored per step of a report
THOROUGH = 64  # rivals scored where one tensor is asked for


def candidates(
    material: Material,
    fixed: ParameterInfo,
    side: Side,
    shape: Shape,
    *,
    partners: Sequence[str] = (),
    operation: bool = False,
    shortlist: int = THOROUGH,
) -> list[ScoreBreakdown]:
    """Score the tensors of a side that could stand beside ``fixed``, the best first, ties in order of names.

    They have ``shape``, with the axes in any order, and are none of the ``partners`` that it has: rivals of a renamed
    tensor are named like the first of these. Of very many those are scored that stand in the partner's own module or
    whose names are most alike to the first partner or, half as many, to ``fixed``.
    """
    rivals = [i for i in material.alike[side].get((fixed.kind, tuple(sorted(shape))), ()) if i.name not in partners]
    if len(rivals) > shortlist:
        rivals = _shortlist(material, rivals, fixed, next(iter(partners), ""), side, shortlist)
    found = []
    for rival in rivals:
        source, target = (rival, fixed) if side == "source" else (fixed, rival)
        found.append(material.score(source, target, operation=operation or source.shape != target.shape))
    return sorted(found, key=lambda parts: (-parts.total, parts.source, parts.target))


def _shortlist(
    material: Material, rivals: list[ParameterInfo], fixed: ParameterInfo, like: str, side: Side, size: int
) -> list[ParameterInfo]:
    names = [rival.name for rival in rivals]
    near: set[int] = set()
    for name, count in ((like, size), (fixed.name, size // 2)):
        if name:
            best = process.extract(name, names, scorer=Levenshtein.normalized_similarity, limit=count)
            near.update(index for _, _, index in best)
    together = material.partner_modules[side].get(fixed.module_path, set())
    return [rival for i, rival in enumerate(rivals) if i in near or rival.module_path in together]


def runner_up(material: Material, entry: PlanEntry, source: str, target: str) -> ScoreBreakdown | None:
    """The next best source for the target of one pair of a step; None where no other source has a shape that fits."""
    if target not in material.target or source not in material.source:
        return None
    found = candidates(
        material,
        material.target[target],
        "source",
        material.source[source].shape,
        partners=(source, *entry.sources),
        operation=entry.badge not in ("exact", "cast"),
        shortlist=QUICK,
    )
    return found[0] if found else None


_BAR = 16


@dataclass(frozen=True)
class BreakdownView(View):
    """The score of a tensor's match, part by part, with bars, weights, reason and runner-up.

    Attributes:
        name: Name of a source or a target tensor.
        plan: The plan.
        source: The checkpoint's side.
        target: The model's side.
        options: The options of the matching.
        runners_up: How many of the next best candidates to list.
    """

    name: str
    plan: TransferPlan
    source: ModelDescription
    target: ModelDescription
    options: MatchingOptions
    runners_up: int = 3

    def _draw(self, width: int) -> Iterator[RenderableType]:
        material = Material.gather(self.plan, source=self.source, target=self.target, options=self.options)
        entries = self.entries()
        if not entries:
            yield self._unmatched(material)
            return
        for entry in entries:
            body = Group(*self._entry(material, entry))
            yield Panel(body, title="score", title_align="left", box=box.ROUNDED, expand=False)
        yield Text(LEGEND, style="dim")

    def entries(self) -> tuple[PlanEntry, ...]:
        """The steps that move the tensor: the one that fills it, or those that use it.

        Raises:
            MappingError: If neither side has a tensor of this name.
        """
        if self.name not in self.source and self.name not in self.target:
            raise MappingError(f"neither model has a tensor named {self.name!r}.")
        found = self.plan.by_source.get(self.name, ())
        filled = self.plan.by_target.get(self.name)
        return (filled,) if filled is not None and filled not in found else found

    def _entry(self, material: Material, entry: PlanEntry) -> Iterator[RenderableType]:
        shapes = " + ".join(map(shape_text, entry.source_shapes))
        after = " + ".join(map(shape_text, entry.target_shapes))
        names = Table.grid(padding=(0, 1))
        names.add_row("source", Wrapped(entry.sources))
        names.add_row("target", Wrapped(entry.targets))
        yield names
        line = Text("score ").append_text(score_text(entry.score)).append(f"   margin {entry.margin:.2f}")
        yield line.append(f"   operation {entry.badge}")
        yield Text(f"shape {shapes} → {after}")
        if entry.reason:
            yield Text(f"why: {entry.reason}")
        shown = list(pairs(entry))
        wanted = [pair for pair in shown if self.name in pair] or shown
        for source, target in wanted[:4]:
            parts = breakdown(material, entry, source, target)
            yield Text("")
            if len(shown) > 1:
                yield Text(f"{source} → {target}", style="bold")
            yield score_table(parts)
            if abs(parts.total - entry.score) > 0.005:
                yield Text(f"(the step scores {entry.score:.2f}: the mean of its pairs and its family)", style="dim")
            if "order" in parts.hierarchy_parts:
                yield Text("(order is evidence for the alignment, not part of the sum)", style="dim")
        yield Text("")
        yield from self._runners_up(material, entry)

    def _runners_up(self, material: Material, entry: PlanEntry) -> Iterator[RenderableType]:
        from_source = self.name in entry.sources
        best = self._candidates(material, entry)
        title = "next best target" if from_source else "next best source"
        if not best:
            yield Text(f"runner-up: none, no other {'target' if from_source else 'source'} has a shape that fits")
            return
        table = Table(box=None, pad_edge=False, show_header=True)
        short_columns(table, "score")
        short_columns(table, "shape", "name", "hier.", justify="right")
        table.add_column(f"runner-up ({title})", overflow="fold")
        for other in best:
            name = other.target if from_source else other.source
            parts = (f"{value:.2f}" for value in (other.shape, other.name, other.hierarchy))
            table.add_row(score_text(other.total), *parts, Wrapped((f"{name}{self._taken(name, from_source)}",)))
        yield table

    def _taken(self, name: str, is_target: bool) -> str:
        if is_target:
            entry = self.plan.by_target.get(name)
            return f" (filled from {' + '.join(entry.sources)})" if entry else " (free)"
        entries = self.plan.by_source.get(name, ())
        return f" (goes to {' + '.join(entries[0].targets)})" if entries else " (free)"

    def _candidates(self, material: Material, entry: PlanEntry | None) -> list[ScoreBreakdown]:
        """The best other tensors of the shape of the partner, or of its own shape where it has none."""
        from_source = self.name in (self.source if entry is None else entry.sources)
        own = (self.source if from_source else self.target)[self.name]
        others: Side = "target" if from_source else "source"
        if entry is None:
            return candidates(material, own, others, own.shape)[: self.runners_up]
        partners = entry.targets if from_source else entry.sources
        side = self.target if from_source else self.source
        shape = side[partners[0]].shape if partners[0] in side else own.shape
        moved = entry.badge not in ("exact", "cast")
        found = candidates(material, own, others, shape, partners=partners, operation=moved)
        return found[: self.runners_up]

    def _unmatched(self, material: Material) -> Panel:
        from_source = self.name in self.source
        side = self.source if from_source else self.target
        left = self.plan.unmatched("source" if from_source else "target")
        lines: list[RenderableType] = [
            Text(self.name, overflow="fold"),
            Text(f"not matched   shape {shape_text(side[self.name].shape)}", style="bold"),
        ]
        lines += [Text(f"why: {u.reason}") for u in left if u.name == self.name]
        for case in self.plan.ambiguous:
            if self.name in case.targets:
                lines.append(Text(f"ambiguous: {case.reason}"))
                lines += [Text(f"  {c.score:.2f} {' + '.join(c.sources)}") for c in case.candidates]
        best = self._candidates(material, None)
        if best:
            name = best[0].target if from_source else best[0].source
            lines += [Text(""), Text(f"best candidate: {name}{self._taken(name, from_source)}"), score_table(best[0])]
        else:
            own: Side = "source" if from_source else "target"
            found = gaps(self.plan, own, self.source, self.target)
            mine = [gap for gap in found if any(member.name == self.name for member in gap.members)]
            lines += [Text(line) for gap in mine for line in partner_lines([gap])]
        return Panel(Group(*lines), title="score", title_align="left", box=box.ROUNDED, expand=False)


def score_table(parts: ScoreBreakdown) -> Table:
    """Shape, name and hierarchy with their parts: value, bar, weight, and what they add to the score."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    short_columns(table, "part")
    short_columns(table, "value", justify="right")
    short_columns(table, "")
    short_columns(table, "weight", "adds", justify="right")
    scale = 1.0 if parts.parents is None else 0.8
    for part, value, details in (
        ("shape", parts.shape, {}),
        ("name", parts.name, parts.name_parts),
        ("hierarchy", parts.hierarchy, parts.hierarchy_parts),
    ):
        weight = parts.weights.get(part, 0.0)
        bar = Bar(value, COLOURS[confidence(value)], _BAR)
        table.add_row(part, f"{value:.2f}", bar, f"{weight:.2f}", f"{scale * weight * value:.2f}")
        for detail, number in details.items():
            label = Text(f"  {detail}", style="dim")
            table.add_row(label, Text(f"{number:.2f}", style="dim"), Bar(number, "dim", _BAR), "", "")
    if parts.parents is not None:
        bar = Bar(parts.parents, COLOURS[confidence(parts.parents)], _BAR)
        table.add_row("parents' match", f"{parts.parents:.2f}", bar, "0.20", f"{0.2 * parts.parents:.2f}")
    table.add_section()
    table.add_row("score", f"{parts.total:.2f}", Bar(parts.total, COLOURS[confidence(parts.total)], _BAR), "", "")
    return table
