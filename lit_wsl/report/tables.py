"""Tables for the terminal, a log file or a notebook: the summary, the mapping, and what is left over.

Each view is a rich renderable: ``console.print(MappingView(plan))``. Nothing is said by colour alone, and all of it can
be read at 80 columns, where names that don't fit beside each other stand below each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_wsl.report.console import COLOURS, LEGEND, Bar, View, score_text
from lit_wsl.report.rows import (
    By,
    MappingRow,
    confidence,
    count_text,
    describe_from_plan,
    mapping_rows,
    operation_counts,
    shape_text,
)
from lit_wsl.structure.families import fold
from lit_wsl.transfer.coverage import Count, Coverage, measure_coverage
from lit_wsl.transfer.plan import Ambiguity, TransferPlan, Unmatched

NARROW_HEAD = 30  # columns that score, operation and count take
SIDE_BY_SIDE = 120  # columns from which source and target stand beside each other


@dataclass(frozen=True)
class SummaryPanel(View):
    """Coverage of both sides, counts and options of a plan, in a panel.

    Attributes:
        plan: The plan.
        coverage: Its coverage; counted from the plan alone where it is not given.
        title: Heading; the two labels where it is not given.
    """

    plan: TransferPlan
    coverage: Coverage | None = None
    title: str = ""

    def _draw(self, width: int) -> Iterator[RenderableType]:
        plan = self.plan
        coverage = self.coverage or coverage_of(plan)
        bars = Table.grid(padding=(0, 1))
        bars.add_column(no_wrap=True, overflow="crop")
        bars.add_column(no_wrap=True, overflow="crop")
        bars.add_column(justify="right", no_wrap=True, overflow="crop")
        bars.add_column(overflow="fold")
        length = 24 if width >= 100 else 12
        excluded = plan.options.get("buffers") == "exclude"
        for label, count in (
            ("source", coverage.source),
            ("target", coverage.target),
            ("source buffers", coverage.source_buffers),
            ("target buffers", coverage.target_buffers),
        ):
            if "buffers" in label and (excluded or not count.of_tensors):
                continue
            style = COLOURS[confidence(count.share)]
            bars.add_row(label, Bar(count.share, style, length), percent(count.share), _amount(count))
        title = self.title or f"{plan.source.label} → {plan.target.label}"
        head: RenderableType = bars
        if len(title) > width - 6:  # a panel cuts its title: tell the names inside
            head = Group(Text(title, overflow="fold"), bars)
            title = ""
        lines = [Text(line) for line in summary_lines(plan)]
        body = Group(head, Text(""), *lines)
        yield Panel(body, title=title or None, title_align="left", box=box.ROUNDED, expand=False)


def percent(share: float) -> str:
    """A share in percent that says 100 % only of everything and 0 % only of nothing.

    >>> percent(0.99999), percent(1.0), percent(0.00001), percent(0.5)
    ('99.9%', '100.0%', '0.1%', '50.0%')
    """
    if share >= 1.0 or share <= 0.0:
        return f"{100 * share:.1f}%"
    return f"{min(99.9, max(0.1, 100 * share)):.1f}%"


def coverage_of(plan: TransferPlan) -> Coverage:
    """Coverage counted from a plan alone."""
    return measure_coverage(plan, describe_from_plan(plan, "source"), describe_from_plan(plan, "target"))


def summary_lines(plan: TransferPlan) -> list[str]:
    """The counts and options of a plan, one line each."""
    operations = ", ".join(f"{n} {badge}" for badge, n in operation_counts(plan).items()) or "none"
    unsure = sum(len(a.targets) for a in plan.ambiguous)
    options = plan.options
    excluded = options.get("buffers") == "exclude"
    source, target = (
        sum(not (excluded and item.kind == "buffer") for item in left)
        for left in (plan.unmatched_source, plan.unmatched_target)
    )
    lines = [
        f"mappings: {len(plan.entries)} ({operations})",
        f"unmatched: {source} source, {target} target; ambiguous: {unsure}",
    ]
    if options:
        said = [
            f"threshold {options.get('threshold')}",
            str(options.get("strategy")),
            f"buffers {options.get('buffers')}",
        ]
        lines.append(", ".join(said))
    if plan.entries:
        worst = min(entry.score for entry in plan.entries)
        lines.append(f"lowest score {worst:.2f}, function check: {plan.proof}")
    return lines


def _amount(count: Count) -> str:
    return (
        f"{count_text(count.elements)} of {count_text(count.of_elements)} elements, "
        f"{count.tensors} of {count.of_tensors} tensors"
    )


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
        table.add_column("score", no_wrap=True, overflow="crop")
        table.add_column("operation", overflow="fold")
        table.add_column("n", justify="right", no_wrap=True, overflow="crop")
        if wide:
            table.add_column("source", overflow="fold", ratio=1)
            table.add_column("target", overflow="fold", ratio=1)
            table.add_column("tensors", overflow="fold", ratio=1)
        else:
            table.add_column("source → target", overflow="fold", ratio=1)
        arrow = "→ "
        for row in shown:
            head = (score_text(row.score), _badge(row), f"x{row.groups}")
            moved = Text(row.tensors, style="dim")
            if wide:
                table.add_row(*head, Text("\n".join(row.sources)), Text("\n".join(row.targets)), moved)
            else:
                table.add_row(*head, Group(*_stacked(row, arrow, width - NARROW_HEAD), moved))
        yield table
        hidden = len(rows) - len(shown)
        if hidden:
            least = min(row.score for row in _hidden(rows, shown))
            yield Text(f"... and {hidden} more lines, with scores of {least:.2f} and above")
        yield Text(LEGEND, style="dim")
        if not all(entry.lossless for row in shown for entry in row.entries):
            yield Text("* changes values, as asked for", style="bold red")


def _stacked(row: MappingRow, arrow: str, width: int) -> list[Text]:
    """Source and target on one line where they fit, else below each other."""
    line = f"{' + '.join(row.sources)} {arrow}{' + '.join(row.targets)}"
    if len(line) <= width:
        return [Text(line)]
    return [Text("\n".join(row.sources)), Text("\n".join(f"{arrow}{target}" for target in row.targets))]


def _worth_showing(rows: Sequence[MappingRow], limit: int | None) -> list[MappingRow]:
    """At most ``limit`` rows in their order, the lowest scores first in line."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    keep = sorted(sorted(range(len(rows)), key=lambda i: rows[i].score)[: max(0, limit)])
    return [rows[i] for i in keep]


def _hidden(rows: Iterable[MappingRow], shown: Iterable[MappingRow]) -> list[MappingRow]:
    visible = {id(row) for row in shown}
    return [row for row in rows if id(row) not in visible]


def _badge(row: MappingRow) -> Text:
    if not all(entry.lossless for entry in row.entries):
        return Text(f"{row.badge} *", style="bold red")
    return Text(row.badge, style="" if row.badge == "exact" else "cyan")


@dataclass(frozen=True)
class UnmatchedView(View):
    """What found no partner, folded, with shapes and reasons.

    Attributes:
        plan: The plan.
        max_rows: At most so many lines per side; ``None`` for all.
    """

    plan: TransferPlan
    max_rows: int | None = None

    def _draw(self, width: int) -> Iterator[RenderableType]:
        excluded = self.plan.options.get("buffers") == "exclude"
        for side, every in (("source", self.plan.unmatched_source), ("target", self.plan.unmatched_target)):
            left = [item for item in every if not (excluded and item.kind == "buffer")]
            aside = f" (and {len(every) - len(left)} buffers, which are excluded)" if len(left) < len(every) else ""
            yield Text(f"unmatched in {side}: {len(left)}{aside}", style="bold" if left else "dim")
            if left:
                yield self._table(left)

    def _table(self, left: Sequence[Unmatched]) -> Group:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("n", justify="right", no_wrap=True, overflow="crop")
        table.add_column("name", overflow="fold", ratio=3)
        table.add_column("shape", overflow="fold", ratio=1)
        table.add_column("why", overflow="fold", ratio=2)
        families = fold([(u.name,) for u in left], [(u.shape, u.kind, u.reason) for u in left])
        shown = families if self.max_rows is None else families[: max(0, self.max_rows)]
        for family in shown:
            first = left[family.members[0]]
            kind = " (buffer)" if first.kind == "buffer" else ""
            table.add_row(
                f"x{len(family)}", Text(family.patterns[0] + kind), shape_text(first.shape), Text(first.reason)
            )
        more = len(families) - len(shown)
        return Group(table, *([Text(f"... and {more} more lines")] if more else []))


@dataclass(frozen=True)
class AmbiguousView(View):
    """Targets left alone because nothing decides, with their candidates and the reason.

    Attributes:
        plan: The plan.
        max_rows: At most so many cases; ``None`` for all.
        max_candidates: At most so many candidates per case.
    """

    plan: TransferPlan
    max_rows: int | None = None
    max_candidates: int = 4

    def _draw(self, width: int) -> Iterator[RenderableType]:
        cases = self.plan.ambiguous
        yield Text(f"ambiguous, left as they were: {len(cases)}", style="bold yellow" if cases else "dim")
        if not cases:
            return
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("target", overflow="fold", ratio=1)
        table.add_column("candidates", overflow="fold", ratio=1)
        for case in cases if self.max_rows is None else cases[: self.max_rows]:
            table.add_row(self._targets(case), Text(self._candidates(case)))
        yield table
        if self.max_rows is not None and len(cases) > self.max_rows:
            yield Text(f"... and {len(cases) - self.max_rows} more")

    def _targets(self, case: Ambiguity) -> Group:
        names = Text("\n".join(family.patterns[0] for family in fold([(t,) for t in case.targets])))
        why = f"{shape_text(case.shape)}: {case.reason}" if case.reason else shape_text(case.shape)
        return Group(names, Text(why, style="dim"))

    def _candidates(self, case: Ambiguity) -> str:
        lines = [f"{c.score:.2f} {' + '.join(c.sources)}" for c in case.candidates[: self.max_candidates]]
        more = len(case.candidates) - len(lines)
        return "\n".join([*lines, *([f"and {more} more"] if more > 0 else [])])


@dataclass(frozen=True)
class ResultView(View):
    """All of a mapping or a transfer on one screen: summary, mapping, ambiguous, leftovers, remarks.

    Attributes:
        plan: The plan.
        coverage: Its coverage.
        warnings: What the reader should look at.
        notes: What is worth a line.
        by: See :class:`MappingView`.
        folded: See :class:`MappingView`.
        show_unmatched: Also show what found no partner.
        max_rows: At most so many lines of mappings; ``None`` for all.
        max_unmatched: At most so many lines of leftovers per side; ``None`` for all.
    """

    plan: TransferPlan
    coverage: Coverage | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    by: By = "group"
    folded: bool = True
    show_unmatched: bool = True
    max_rows: int | None = 30
    max_unmatched: int | None = 15

    def _draw(self, width: int) -> Iterator[RenderableType]:
        yield SummaryPanel(self.plan, self.coverage)
        yield MappingView(self.plan, by=self.by, folded=self.folded, max_rows=self.max_rows)
        if self.plan.ambiguous:
            yield AmbiguousView(self.plan, max_rows=self.max_unmatched)
        if self.show_unmatched:
            yield UnmatchedView(self.plan, max_rows=self.max_unmatched)
        yield from (Text(f"warning: {text}", style="yellow") for text in self.warnings)
        yield from (Text(f"note: {text}", style="dim") for text in self.notes)
