"""The mapping as a table, for the terminal, a log file or a notebook, and all of a result on one screen.

Each view is a rich renderable: ``console.print(MappingView(plan))``. Nothing is said by colour alone, and all of it can
be read at 80 columns, where names that don't fit beside each other stand below each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_wsl.report.console import LEGEND, View, Wrapped, score_text
from lit_wsl.report.leftovers import AmbiguousView, UnmatchedView
from lit_wsl.report.rows import By, MappingRow, mapping_rows
from lit_wsl.report.summary import SummaryPanel
from lit_wsl.transfer.coverage import Coverage
from lit_wsl.transfer.plan import TransferPlan

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
        table.add_column("score", no_wrap=True, overflow="crop")
        table.add_column("operation", overflow="fold")
        table.add_column("n", justify="right", no_wrap=True, overflow="crop")
        if wide:
            table.add_column("source", overflow="fold", ratio=1)
            table.add_column("target", overflow="fold", ratio=1)
            table.add_column("tensors", overflow="fold", ratio=1)
        else:
            table.add_column("source → target", overflow="fold", ratio=1)
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
            least = min(row.score for row in _hidden(rows, shown))
            yield Text(f"... and {hidden} more lines, with scores of {least:.2f} and above")
        yield Text(LEGEND, style="dim")
        if not all(entry.lossless for row in shown for entry in row.entries):
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


def _hidden(rows: Iterable[MappingRow], shown: Iterable[MappingRow]) -> list[MappingRow]:
    visible = {id(row) for row in shown}
    return [row for row in rows if id(row) not in visible]


def _badge(row: MappingRow) -> Text:
    if not all(entry.lossless for entry in row.entries):
        return Text(f"{row.badge} *", style="bold red")
    return Text(row.badge, style="" if row.badge == "exact" else "cyan")


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
