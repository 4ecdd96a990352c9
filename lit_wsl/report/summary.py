"""The first thing to look at: coverage of both sides, counts and options, in a panel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_wsl.report.console import COLOURS, Bar, View
from lit_wsl.report.rows import confidence, count_text, describe_from_plan, operation_counts, percent
from lit_wsl.transfer.coverage import Count, Coverage, measure_coverage
from lit_wsl.transfer.plan import TransferPlan


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
