"""What a transfer did, or would have done: the report."""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_wsl.plan.coverage import Count, Coverage, ModuleCoverage
from lit_wsl.plan.entries import Unmatched
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.rows import open_questions, percent
from lit_wsl.structure.description import ModelDescription
from lit_wsl.structure.families import fold_names

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table


HEADER = ("module", "loaded", "missing", "ambiguous", "elements loaded", "share")


MOST_ROWS = 40  # of the table; beyond that, modules that are loaded in full are folded into one line


_REASONS = 3  # told per kind of gap


_SHOWN = 8  # names listed per kind of gap; the report and the JSON file have them all


def shown_modules(coverage: Coverage) -> tuple[tuple[ModuleCoverage, ...], str]:
    """The modules worth a row, in order, and a line about the others; empty if there are none.

    Where there are more than :data:`MOST_ROWS`, those with gaps come first in claim and keep their place in order.
    """
    modules = coverage.modules
    if len(modules) <= MOST_ROWS:
        return modules, ""
    by_claim = sorted(range(len(modules)), key=lambda i: (_is_full(modules[i]), i))
    kept = sorted(by_claim[:MOST_ROWS])
    hidden = [modules[i] for i in by_claim[MOST_ROWS:]]
    gaps = sum(not _is_full(row) for row in hidden)
    state = f"{gaps} of them with gaps" if gaps else "all loaded in full"
    return tuple(modules[i] for i in kept), f"and {len(hidden)} more modules, {state}"


def _is_full(row: ModuleCoverage) -> bool:
    return row.loaded.tensors == row.loaded.of_tensors


def rows(coverage: Coverage) -> list[tuple[str, ...]]:
    """The coverage table as text cells, one row per module under :data:`HEADER`."""
    return [
        (
            row.module,
            f"{row.loaded.tensors} of {row.loaded.of_tensors}",
            str(row.missing),
            str(row.ambiguous),
            f"{row.loaded.elements:,} of {row.loaded.of_elements:,}",
            percent(row.loaded.share),
        )
        for row in shown_modules(coverage)[0]
    ]


def coverage_table(coverage: Coverage) -> Table:
    """The coverage per top-level module as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(HEADER):
        table.add_column(title, justify="left" if index == 0 else "right", overflow="fold")
    for row, cells in zip(shown_modules(coverage)[0], rows(coverage)):
        style = "green" if _is_full(row) else "red" if not row.loaded.tensors else "yellow"
        table.add_row(*(Text(cell) for cell in cells[:-1]), Text(cells[-1], style=style))
    return table


def summary_lines(report: TransferReport) -> list[str]:
    """The report in a few lines, without the table."""
    plan, coverage = report.plan, report.coverage
    verb = "Loaded" if report.applied else "Not loaded"
    lines = [
        f"{verb} {plan.source.label} -> {plan.target.label}",
        f"model:      {_share(coverage.target)}",
        f"checkpoint: {_share(coverage.source)}",
    ]
    if plan.options.get("buffers") != "exclude" and coverage.target_buffers.of_tensors:
        lines.append(f"buffers:    {_share(coverage.target_buffers)}")
    if plan.proof != "not tested":
        lines.append(f"function check: {plan.proof}")
    return lines


def gap_lines(report: TransferReport) -> list[str]:
    """Warnings, notes, and the first names of what was not loaded."""
    _, hidden = shown_modules(report.coverage)
    lines = [hidden] if hidden else []
    lines += [f"warning: {text}" for text in report.warnings]
    lines += _some("missing", report.missing, report.plan.unmatched_target)
    lines += _some("ambiguous, left alone", report.ambiguous)
    lines += _candidates(report)
    lines += _some("unused in the checkpoint", report.unused, report.plan.unmatched_source)
    lines += [f"note: {text}" for text in report.notes]
    return lines


def _share(count: Count) -> str:
    return f"{percent(count.share)} of {count.of_elements:,} elements, {count.tensors} of {count.of_tensors} tensors"


def _some(title: str, names: Sequence[str], unmatched: Sequence[Unmatched] = ()) -> list[str]:
    """The names, those that differ by indices folded, and why, the most frequent reasons first."""
    if not names:
        return []
    folded = fold_names(names)
    more = f" and {len(folded) - _SHOWN} more" if len(folded) > _SHOWN else ""
    known = {item.name: item.reason for item in unmatched}
    reasons = Counter(known[name] for name in names if known.get(name))
    why = [
        f"  why: {reason}" if count == len(names) else f"  why ({count} of {len(names)}): {reason}"
        for reason, count in reasons.most_common(_REASONS)
    ]
    return [f"{title} ({len(names)}): {', '.join(folded[:_SHOWN])}{more}", *why]


def _candidates(report: TransferReport) -> list[str]:
    """What each ambiguous target could have been given, the best first; every reason once."""
    unsure = set(report.ambiguous)
    questions = [q for q in open_questions(report.plan) if unsure & {name for case in q.cases for name in case.targets}]
    lines: list[str] = []
    for number, question in enumerate(questions[:_SHOWN]):
        names = [name for _, name in question.candidates]
        shown = ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")
        targets = ", ".join(question.targets[:4])
        targets += f", ... ({len(question.targets)})" if len(question.targets) > 4 else ""
        lines.append(f"  {targets} <- one of {shown or 'none'}")
        following = questions[number + 1].reason if number + 1 < min(_SHOWN, len(questions)) else None
        if question.reason and question.reason != following:
            lines.append(f"    why: {question.reason}")
    if len(questions) > _SHOWN:
        lines.append(f"  and {len(questions) - _SHOWN} more open questions")
    return lines


def renderables(report: TransferReport) -> Iterator[RenderableType]:
    """The report as rich renderables: summary, table, gaps."""
    from rich.text import Text

    first, *rest = summary_lines(report)
    yield Text(first, style="bold")
    yield Text("\n".join(rest))
    yield coverage_table(report.coverage)
    for line in gap_lines(report):
        style = "yellow" if line.startswith(("warning", "missing", "ambiguous")) else "dim"
        yield Text(line, style=style)


def plain_text(report: TransferReport) -> str:
    """The report as plain text: summary, aligned table, gaps."""
    table = [HEADER, *rows(report.coverage)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADER))]
    lines = [*summary_lines(report), ""]
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", *gap_lines(report)]).rstrip()


def markdown(report: TransferReport) -> str:
    """The report as Markdown, for loggers that show text."""
    head = [f"| {' | '.join(HEADER)} |", "|" + " --- |" * len(HEADER)]
    body = [f"| {' | '.join(cells)} |" for cells in rows(report.coverage)]
    lines = [line + "  " for line in summary_lines(report)]
    return "\n".join([*lines, "", *head, *body, "", *_bullets(gap_lines(report))])


def _bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def print_report(report: TransferReport) -> None:
    """Print through rich on a terminal and as plain text elsewhere."""
    if sys.stdout is not None and sys.stdout.isatty():
        from rich.console import Console

        Console().print(report)
    else:
        print(report, flush=True)


def as_html(report: TransferReport) -> str:
    """The terminal's rendering as HTML, for loggers that show HTML."""
    from rich.console import Console

    console = Console(record=True, width=120, file=io.StringIO())
    console.print(report)
    return console.export_html(inline_styles=True)


@dataclass(frozen=True)
class TransferReport:
    """What was loaded, what was not, and why.

    The four lists hold names, each tensor once (tied tensors under their first name); scores, operations, candidates
    and reasons are in :attr:`plan`.

    Attributes:
        plan: The plan that was applied.
        coverage: Shares of both sides, by tensors and by elements.
        loaded: Names in the model that were filled, in registration order.
        missing: Names in the model that kept what they had, although they were asked for.
        ambiguous: Names in the model left alone because nothing decides between the candidates.
        unused: Names in the checkpoint that went nowhere.
        warnings: What the user should look at.
        notes: What is worth a line.
        applied: Whether the model was filled; false where a resumed checkpoint won.
        source: The checkpoint's side, for reports that show whole models.
        target: The model's side, likewise.
    """

    plan: TransferPlan
    coverage: Coverage
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    applied: bool = True
    source: ModelDescription | None = field(default=None, repr=False, compare=False)
    target: ModelDescription | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        plan: TransferPlan,
        coverage: Coverage,
        source: ModelDescription,
        target: ModelDescription,
        *,
        warnings: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> TransferReport:
        """Sort both sides' tensors into loaded, missing, ambiguous and unused.

        Args:
            plan: The plan.
            coverage: Its coverage.
            source: The checkpoint's side.
            target: The model's side.
            warnings: What the user should look at.
            notes: What is worth a line.
        """
        buffers = plan.options.get("buffers") != "exclude"
        filled = {target.tied.get(name, name) for entry in plan.entries for name in entry.targets}
        unsure = {target.tied.get(name, name) for item in plan.ambiguous for name in item.targets} - filled
        used = {source.tied.get(name, name) for entry in plan.entries for name in entry.sources}
        asked = [info.name for info in target.parameters if buffers or info.kind == "parameter"]
        return cls(
            plan=plan,
            coverage=coverage,
            loaded=tuple(info.name for info in target.parameters if info.name in filled),
            missing=tuple(name for name in asked if name not in filled and name not in unsure),
            ambiguous=tuple(info.name for info in target.parameters if info.name in unsure),
            unused=tuple(
                info.name
                for info in source.parameters
                if info.name not in used and (buffers or info.kind == "parameter")
            ),
            warnings=warnings,
            notes=notes,
            source=source,
            target=target,
        )

    def with_remarks(self, *, warnings: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> TransferReport:
        """The same report with more warnings and notes."""
        return replace(self, warnings=self.warnings + warnings, notes=self.notes + notes)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, in the layout of :func:`lit_wsl.report.json_report.report_dict`."""
        from lit_wsl.report.json_report import report_dict

        return report_dict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON; also written to a file, atomically, where a path is given.

        Args:
            path: Where to write it, if anywhere.

        Returns:
            The JSON text; its schema is ``lit_wsl/report/assets/schema.json``.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        from lit_wsl.report.json_report import report_text

        text = report_text(self)
        if path is not None:
            from lit_wsl.files import atomic_write_text

            atomic_write_text(path, text)
        return text

    def save_html(self, path: str | Path) -> None:
        """Write the report as one HTML page that needs nothing else.

        Args:
            path: Where to write it.
        """
        from lit_wsl.report.html import save_html

        save_html(self, path)

    def __str__(self) -> str:

        return plain_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:

        yield from renderables(self)
