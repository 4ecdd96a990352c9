"""Coverage for people: a summary and a table per module, in colour on a terminal and as plain text elsewhere."""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from lit_wsl.report.rows import open_questions, percent
from lit_wsl.structure.families import fold_names
from lit_wsl.transfer.coverage import Count, Coverage, ModuleCoverage
from lit_wsl.transfer.plan import Unmatched

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from lit_wsl.transfer.report import TransferReport

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
