"""What people read of a transfer or a mapping: the same lines and tables in a terminal, a log file and a notebook.

Each view is a rich renderable, ``console.print(ReportView(report))``; :func:`markdown` gives the same to loggers.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from lit_wsl.errors import counted, printable
from lit_wsl.plan.coverage import Count, Coverage, excluded_names
from lit_wsl.plan.entries import Side
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.drawing import COLOURS, LEGEND, Hanging, Text, View, Wrapped, plain, score_text, short_columns
from lit_wsl.report.rows import (
    By,
    Gap,
    MappingRow,
    confidence,
    gaps,
    mapping_rows,
    open_questions,
    operation_counts,
    partner_lines,
    percent,
    remedy,
)
from lit_wsl.structure.description import ModelDescription, ParameterGroup
from lit_wsl.structure.families import fold

MOST_ROWS = 20  # of the coverage by module; what is loaded in full is left out first
_SHOWN = 8  # families of tensors listed per kind of gap; the JSON report has them all
_CANDIDATES = 4  # names of targets and candidates listed per open question

NARROW_HEAD = 30  # columns that score, operation and count take
SIDE_BY_SIDE = 120  # columns from which source and target stand beside each other


@dataclass(frozen=True)
class MappingView(View):
    """The mapping as a table, folded by families.

    Attributes:
        plan: The plan.
        by: One line per pair of modules (``"group"``) or per step (``"tensor"``).
        folded: Fold lines that differ only by indices.
        max_rows: At most so many lines; the lowest scores always stay. ``None`` for all.
    """

    plan: TransferPlan
    by: By = "group"
    folded: bool = True
    max_rows: int | None = None

    def _draw(self, width: int) -> Iterator[RenderableType]:
        rows = mapping_rows(self.plan, by=self.by, folded=self.folded)
        if not rows:
            yield Text("no mappings", style="red")
            return
        shown = _worth_showing(rows, self.max_rows)
        wide = width >= SIDE_BY_SIDE
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left")
        short_columns(table, "score")
        table.add_column("operation", overflow="fold")
        short_columns(table, "n", justify="right")
        for title in ("source", "target", "tensors") if wide else ("source → target",):
            table.add_column(title, overflow="fold", ratio=1)
        for row in shown:
            head = (score_text(row.score), _badge(row), f"x{row.groups}")
            moved = Wrapped((row.tensors,), "dim")
            if wide:
                table.add_row(*head, Wrapped(row.sources), Wrapped(row.targets), moved)
            else:
                table.add_row(*head, Group(stacked(row, width - NARROW_HEAD), moved))
        yield table
        hidden = len(rows) - len(shown)
        if hidden:
            least = sorted(row.score for row in rows)[len(shown)]
            yield Text(f"... and {hidden} more lines, with scores of {least:.2f} and above")
        yield Text(LEGEND, style="dim")
        if any(entry.changes_values for row in shown for entry in row.entries):
            yield Text("* changes values, as asked for", style="bold red")


def stacked(row: MappingRow, width: int) -> Wrapped:
    """Source and target on one line where they fit, else below each other."""
    line = f"{' + '.join(row.sources)} → {' + '.join(row.targets)}"
    if len(line) <= width:
        return Wrapped((line,))
    return Wrapped((*row.sources, *(f"→ {target}" for target in row.targets)))


def _worth_showing(rows: Sequence[MappingRow], limit: int | None) -> list[MappingRow]:
    """At most ``limit`` rows in their order, the lowest scores first in line."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    keep = sorted(sorted(range(len(rows)), key=lambda i: rows[i].score)[: max(0, limit)])
    return [rows[i] for i in keep]


def _badge(row: MappingRow) -> Text:
    if any(entry.changes_values for entry in row.entries):
        return Text(f"{row.badge} *", style="bold red")
    return Text(row.badge, style="" if row.badge == "exact" else "cyan")


class Reported(Protocol):
    """What is shown of a :class:`~lit_wsl.TransferReport`."""

    @property
    def plan(self) -> TransferPlan: ...  # noqa: D102

    @property
    def coverage(self) -> Coverage: ...  # noqa: D102

    @property
    def warnings(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def applied(self) -> bool: ...  # noqa: D102

    @property
    def sides(self) -> tuple[ModelDescription, ModelDescription]: ...  # noqa: D102


# ---- lines: what every rendering says, in a terminal, in a log file and in Markdown --------------------------------


MOST_DECISIONS = 8  # of a proof on data


def measured_lines(plan: TransferPlan) -> list[str]:
    """What a proof on data measured: the loss before and after, and what each decision was worth."""
    if plan.measured is None:
        return []
    measured = plan.measured
    lines = [f"loss: {measured.fresh:.4g} fresh, {measured.transferred:.4g} transferred"]
    lines[0] += f" ({measured.passes:.0f} passes, {measured.seconds:.1f} s)"
    for d in measured.decisions[:MOST_DECISIONS]:
        pairs = d.answer.split("; ") if d.taken and " -> " in d.answer else []  # these name what was asked
        more = f"; {len(pairs) - 2} more" if len(pairs) > 2 else ""
        what = "; ".join(pairs[:2]) + more if pairs else f"{d.question}: {d.answer if d.taken else 'open'}"
        lines.append(f"  {what} ({d.loss:.4g}; next best {d.rival_loss:.4g}, risk {d.risk:.1g})")
    if len(measured.decisions) > MOST_DECISIONS:
        lines.append(f"  and {len(measured.decisions) - MOST_DECISIONS} more decisions")
    return lines


def summary_lines(report: Reported, verb: str | None = None) -> list[str]:
    """The report in a few lines: whether the weights were loaded (or ``verb``), both sides, buffers, proof."""
    plan, coverage = report.plan, report.coverage
    verb = verb or ("Loaded" if report.applied else "Not loaded")
    lines = [
        f"{verb} {plan.source.label} -> {plan.target.label}",
        f"model:   {amount(coverage.target)}",
        f"source:  {amount(coverage.source)}",
        *_buffer_lines(report),
        *_aside_lines(report),
    ]
    if plan.proof != "not tested":
        lines.append(f"{plan.proof_by or 'function'} check: {plan.proof}")
    lines += measured_lines(plan)
    return lines


def _aside_lines(report: Reported) -> list[str]:
    """How many parameters ``only``, ``skip`` and ``source_prefix`` leave out."""
    told = []
    sides: tuple[Side, ...] = ("source", "target")
    for side, described, owner in zip(sides, report.sides, ("source", "model")):
        names = excluded_names(report.plan, side, described)
        count = sum(info.kind == "parameter" and info.name in names for info in described.parameters)
        told += [f"{count} tensors of the {owner}"] if count else []
    return [f"excluded: {' and '.join(told)}, as asked"] if told else []


def _buffer_lines(report: Reported) -> list[str]:
    """How many buffers were loaded; and where they are excluded, what that means."""
    of, target = report.coverage.target_buffers, report.sides[1]
    lines = excluded_lines(report.plan, target)
    if not lines and of.of_tensors:
        filled = {name for entry in report.plan for name in entry.targets}
        norms = [group for group in target.groups if any(info.name in filled for info in group.parameters)]
        lines = [amount(of), *_without_statistics(norms, {u.name for u in report.plan.unmatched_target})]
    return [f"{'buffers:' if number == 0 else '':8} {line}" for number, line in enumerate(lines)]


def excluded_lines(plan: TransferPlan, target: ModelDescription) -> list[str]:
    """What it means that a model's buffers are excluded; empty where they are not."""
    every = [info for info in target.parameters if info.kind == "buffer"]
    left = excluded_names(plan, "target", target) & {info.name for info in every}
    if not left:
        return []
    return [f"{len(left)} of {len(every)} excluded: the model keeps its own", *_without_statistics(target.groups, left)]


def _without_statistics(groups: Sequence[ParameterGroup], left: Set[str]) -> list[str]:
    """What it means that some modules have none of their running statistics from the checkpoint."""
    norms = [group for group in groups if _keeps_statistics(group, left)]
    if not norms:
        return []
    modules = "1 module lacks its" if len(norms) == 1 else f"{len(norms)} modules lack their"
    return [
        f"{modules} running statistics: in eval mode the model",
        "predicts like an untrained one until it has trained",
    ]


def _keeps_statistics(group: ParameterGroup, excluded: Set[str]) -> bool:
    """Whether a module's running statistics, vectors beside a counter, are excluded."""
    own = [info for info in group.buffers if info.name in excluded]
    return any(info.counts for info in own) and any(i.shape for i in own)


def plan_lines(plan: TransferPlan) -> list[str]:
    """Steps by operation, scores and options of a plan, one line each."""
    operations = ", ".join(f"{n} {badge}" for badge, n in operation_counts(plan).items())
    lines = [f"steps:   {len(plan.entries)} ({operations})" if operations else "steps:   none"]
    rounded = Counter(f"{cast.source} to {cast.target}" for entry in plan.entries if (cast := entry.rounding))
    lines += [f"rounded: {count} from {types}" for types, count in rounded.items()]
    if plan.entries:
        lines[0] += f", lowest score {min(entry.score for entry in plan.entries):.2f}"
    if plan.options:
        said = (f"threshold {plan.options.get('threshold')}", str(plan.options.get("strategy")))
        lines.append(f"options: {', '.join(said)}, buffers {plan.options.get('buffers')}")
    return lines


def gap_lines(report: Reported, limit: int | None = _SHOWN) -> list[str]:
    """What has no partner and what is ambiguous, with reasons, nearest partners and remedies; ``None`` for all."""
    source, target = report.sides
    lines = _listed("missing", gaps(report.plan, "target", source, target), limit)
    lines += _ambiguous(report.plan, limit)
    return lines + _listed("unused in the source", gaps(report.plan, "source", source, target), limit)


def remark_lines(report: Reported) -> list[str]:
    """Warnings and notes."""
    return [*(f"warning: {text}" for text in report.warnings), *(f"note: {text}" for text in report.notes)]


def amount(count: Count) -> str:
    """What was moved of a side, in percent and in numbers."""
    return f"{percent(count.share)} of {count.of_elements:,} elements, {count.tensors} of {count.of_tensors} tensors"


def _listed(title: str, found: Sequence[Gap], limit: int | None) -> list[str]:
    """One list of gaps: names by reason, the most frequent reason first."""
    if not found:
        return []
    by_reason: dict[str, list[Gap]] = {}
    for gap in found:
        by_reason.setdefault(gap.reason, []).append(gap)
    ordered = sorted(by_reason.items(), key=lambda item: -sum(len(gap.members) for gap in item[1]))
    count, hidden = sum(len(gap.members) for gap in found), 0
    lines = [f"{title} ({count}):"]
    for reason, alike in ordered if limit is None else ordered[:limit]:
        shown = alike if limit is None else alike[:limit]
        hidden += len(alike) - len(shown)
        names = counted([gap.text for gap in alike], len(shown))
        if len(ordered) == 1:
            lines[0] += f" {names}"
        else:
            lines.append(f"  {names}")
        lines += [f"    why: {reason}"] if reason else []
        lines += [f"    {line}" for line in partner_lines(shown)]
    more = len(ordered) - limit if limit is not None else 0
    return lines + ([f"  and for {more} more reasons"] if more > 0 else [])


def _ambiguous(plan: TransferPlan, limit: int | None) -> list[str]:
    """The ambiguous targets with their candidates, by reason; what decides them, once."""
    questions = open_questions(plan)
    if not questions:
        return []
    lines = [f"ambiguous, not loaded ({sum(question.tensors for question in questions)}):"]
    shown = questions if limit is None else questions[:limit]
    for number, question in enumerate(shown):
        lines.append(f"  {_some(question.targets)} <- one of {_some([f'{n} {s:.2f}' for s, n in question.candidates])}")
        following = shown[number + 1].reason if number + 1 < len(shown) else None
        if question.reason and question.reason != following:
            lines.append(f"    why: {question.reason}")
    if len(questions) > len(shown):
        lines.append(f"  and {len(questions) - len(shown)} more open questions")
    return [*lines, f"  {remedy(plan)}"]


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:_CANDIDATES]) + (f", ... ({len(words)})" if len(words) > _CANDIDATES else "")


# ---- coverage by module ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleRow:
    """A line of the coverage table: a module, or layers that are loaded alike."""

    module: str  # path of the module, numbers folded
    cells: tuple[str, ...]  # the line as text
    share: float  # share of its elements that is loaded
    state: str  # ``"all"``, ``"part"`` or ``"none"`` of its tensors are loaded


def module_rows(coverage: Coverage) -> tuple[list[str], list[ModuleRow], str]:
    """The coverage by module: titles of the columns, rows, and a line about what is not shown.

    Layers that are loaded alike share a row. Where there are still more than :data:`MOST_ROWS`, those with gaps come
    first in claim.
    """
    titles = ["module", "loaded", "missing", "ambiguous", "excluded", "elements", "share"]
    if not any(row.excluded for row in coverage.modules):
        titles.remove("excluded")
    rows = []
    families = fold([(row.module,) for row in coverage.modules], [replace(row, module="") for row in coverage.modules])
    for family in families:
        row, times = coverage.modules[family.members[0]], len(family)
        loaded = row.loaded
        cells = {
            "module": family.patterns[0],
            "loaded": f"{times * loaded.tensors} of {times * loaded.of_tensors}",
            "missing": str(times * row.missing),
            "ambiguous": str(times * row.ambiguous),
            "excluded": str(times * row.excluded),
            "elements": f"{times * loaded.elements:,} of {times * loaded.of_elements:,}",
            "share": percent(loaded.share),
        }
        state = "all" if loaded.tensors == loaded.of_tensors else "part" if loaded.tensors else "none"
        rows.append(ModuleRow(cells["module"], tuple(cells[title] for title in titles), loaded.share, state))
    if len(rows) <= MOST_ROWS:
        return titles, rows, ""
    claim = sorted(range(len(rows)), key=lambda i: (rows[i].state == "all", i))
    hidden = [rows[i] for i in claim[MOST_ROWS:]]
    gapped = sum(row.state != "all" for row in hidden)
    line = f"and {len(hidden)} more modules, {f'{gapped} of them with gaps' if gapped else 'all loaded in full'}"
    return titles, [rows[i] for i in sorted(claim[:MOST_ROWS])], line


_STATES = {"all": "green", "part": "yellow", "none": "red"}


def modules_table(coverage: Coverage) -> Table:
    """The coverage by module as a rich table."""
    titles, rows, hidden = module_rows(coverage)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.cells[:-1]), Text(row.cells[-1], style=_STATES[row.state]))
    if hidden:
        table.add_row(Text(hidden, style="dim"))
    return table


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportView(View):
    """A transfer or a mapping on one screen.

    Attributes:
        report: What is shown.
        verb: The first word of the summary; by default whether the weights were loaded.
        modules: Show the coverage by module.
        mapping: Show the mapping, as this view.
        limit: At most so many families of tensors in each list of gaps; ``None`` for all.
        show_gaps: Show what has no partner.
    """

    report: Reported
    verb: str | None = None
    modules: bool = True
    mapping: MappingView | None = None
    limit: int | None = _SHOWN
    show_gaps: bool = True

    def _draw(self, width: int) -> Iterator[RenderableType]:
        yield from _summary(self.report, self.verb, detailed=self.mapping is not None)
        if self.modules and self.report.coverage.modules:
            yield Text("")
            yield modules_table(self.report.coverage)
        if self.mapping is not None:
            yield Text("")
            yield self.mapping
        lines = gap_lines(self.report, self.limit) if self.show_gaps else _ambiguous(self.report.plan, self.limit)
        yield from _lines([*lines, *remark_lines(self.report)])


def _summary(report: Reported, verb: str | None, *, detailed: bool) -> Iterator[RenderableType]:
    first, *rest = summary_lines(report, verb)
    yield Text(first, style="bold")
    yield Text("\n".join([*rest, *(plan_lines(report.plan) if detailed else ())]))


def _lines(lines: Sequence[str]) -> Iterator[RenderableType]:
    if lines:
        yield Text("")
    for line in lines:
        doubtful = line.startswith(("warning", "missing", "ambiguous"))
        yield Hanging(line, "yellow" if doubtful else "dim" if line.startswith((" ", "note")) else "")


@dataclass(frozen=True)
class AnalysisView(View):
    """Summary, coverage by module, scores, the steps to look at first, and the gaps.

    Attributes:
        report: What is shown.
        top_n: Number of lines in each list.
        show_unmatched: Also show what found no partner.
    """

    report: Reported
    top_n: int = 10
    show_unmatched: bool = True

    def _draw(self, width: int) -> Iterator[RenderableType]:
        yield from _summary(self.report, "Mapping", detailed=True)
        yield Text("")
        yield modules_table(self.report.coverage)
        yield Text("")
        counts = Counter(confidence(entry.score) for entry in self.report.plan.entries)
        text = Text("scores: ").append(f"{counts['high']} above 0.8", style=COLOURS["high"]).append(", ")
        text.append(f"{counts['medium']} from 0.6 to 0.8", style=COLOURS["medium"]).append(", ")
        yield text.append(f"{counts['low']} below 0.6", style=COLOURS["low"])
        yield from self._doubtful(width)
        yield from _lines(gap_lines(self.report, self.top_n) if self.show_unmatched else [])

    def _doubtful(self, width: int) -> Iterator[RenderableType]:
        rows = sorted(mapping_rows(self.report.plan), key=lambda row: (row.score, row.margin))[: self.top_n]
        if not rows:
            return
        table = Table(title="lowest scores", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        short_columns(table, "score", "margin")
        table.add_column("operation", overflow="fold")
        table.add_column("source → target", overflow="fold", ratio=1)
        for row in rows:
            table.add_row(score_text(row.score), f"{row.margin:.2f}", row.badge, stacked(row, width - DOUBTFUL_HEAD))
        yield table
        yield Text(LEGEND, style="dim")


# ---- other forms of the same -----------------------------------------------------------------------------------------


def markdown(report: Reported) -> str:
    """A report as Markdown, for loggers that show text."""
    titles, rows, hidden = module_rows(report.coverage)
    head = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    body = [f"| {' | '.join(row.cells)} |" for row in rows]
    lines = [*([hidden] if hidden else []), *gap_lines(report), *remark_lines(report)]
    summary = [f"{line}  " for line in summary_lines(report)]
    return printable("\n".join([*summary, "", *head, *body, "", *(f"- {line}" for line in lines)]))


def print_report(report: Reported) -> None:
    """Print through rich on a terminal and as plain text elsewhere."""
    if sys.stdout is not None and sys.stdout.isatty():
        Console().print(ReportView(report))
    else:
        print(plain(ReportView(report)), flush=True)


DOUBTFUL_HEAD = 36  # columns that score, margin and operation take
