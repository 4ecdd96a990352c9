"""The analysis of a mapping in one screen: coverage by module, what to look at first, what is left over and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lit_wsl.report.console import COLOURS, LEGEND, Bar, View, score_text
from lit_wsl.report.rows import confidence, count_text, mapping_rows, open_questions, percent
from lit_wsl.report.summary import SummaryPanel
from lit_wsl.report.tables import stacked
from lit_wsl.transfer.coverage import Coverage
from lit_wsl.transfer.plan import TransferPlan

DOUBTFUL_HEAD = 36  # columns that score, margin and operation take


@dataclass(frozen=True)
class AnalysisView(View):
    """Summary, coverage by module, lowest scores and leftovers by reason.

    Attributes:
        plan: The plan.
        coverage: Its coverage.
        top_n: Number of lines in each list.
        show_unmatched: Also show what found no partner.
    """

    plan: TransferPlan
    coverage: Coverage
    top_n: int = 10
    show_unmatched: bool = True

    def _draw(self, width: int) -> Iterator[RenderableType]:
        yield SummaryPanel(self.plan, self.coverage)
        yield self._modules()
        yield self._distribution()
        yield from self._doubtful(width)
        if self.show_unmatched:
            yield from self._leftovers()

    def _modules(self) -> Table:
        table = Table(title="Target by module", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column("module", overflow="fold")
        table.add_column("loaded", justify="right", no_wrap=True, overflow="crop")
        table.add_column("", no_wrap=True, overflow="crop")
        table.add_column("tensors", justify="right")
        table.add_column("missing", justify="right")
        table.add_column("ambiguous", justify="right")
        shown = sorted(self.coverage.modules, key=lambda m: m.loaded.share)[: self.top_n]
        kept = {row.module for row in shown}
        for row in self.coverage.modules:
            if row.module in kept:
                table.add_row(
                    Text(row.module),
                    percent(row.loaded.share),
                    Bar(row.loaded.share, COLOURS[confidence(row.loaded.share)], 12),
                    f"{row.loaded.tensors} of {row.loaded.of_tensors}",
                    str(row.missing),
                    str(row.ambiguous),
                )
        hidden = len(self.coverage.modules) - len(shown)
        if hidden:
            table.add_row(Text(f"... and {hidden} more modules, covered as well or better", style="dim"))
        return table

    def _distribution(self) -> Text:
        counts = Counter(confidence(entry.score) for entry in self.plan.entries)
        text = Text("\nscores: ")
        text.append(f"{counts['high']} above 0.8", style=COLOURS["high"]).append(", ")
        text.append(f"{counts['medium']} from 0.6 to 0.8", style=COLOURS["medium"]).append(", ")
        return text.append(f"{counts['low']} below 0.6", style=COLOURS["low"])

    def _doubtful(self, width: int) -> Iterator[RenderableType]:
        rows = sorted(mapping_rows(self.plan), key=lambda row: (row.score, row.margin))[: self.top_n]
        if not rows:
            return
        table = Table(title="Lowest scores", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column("score", no_wrap=True, overflow="crop")
        table.add_column("margin", no_wrap=True, overflow="crop")
        table.add_column("operation", overflow="fold")
        table.add_column("source → target", overflow="fold", ratio=1)
        for row in rows:
            table.add_row(score_text(row.score), f"{row.margin:.2f}", row.badge, stacked(row, width - DOUBTFUL_HEAD))
        yield Text("")
        yield table
        yield Text(LEGEND, style="dim")

    def _leftovers(self) -> Iterator[RenderableType]:
        for side, left in (("source", self.plan.unmatched_source), ("target", self.plan.unmatched_target)):
            reasons: dict[str, list[int]] = {}
            for item in left:
                if item.kind == "buffer" and self.plan.options.get("buffers") == "exclude":
                    continue
                size = 1
                for length in item.shape:
                    size *= length
                reasons.setdefault(item.reason, []).append(size)
            count = sum(map(len, reasons.values()))
            yield Text(f"\nunmatched in {side}: {count}", style="bold" if count else "dim")
            for reason, sizes in sorted(reasons.items(), key=lambda kv: -sum(kv[1]))[: self.top_n]:
                yield Text(f"  {len(sizes)} tensors, {count_text(sum(sizes))} elements: {reason}")
        for question in open_questions(self.plan)[: self.top_n]:
            best = ", ".join(f"{name} {score:.2f}" for score, name in question.candidates[:3])
            names = ", ".join(question.targets[:3]) + (", ..." if len(question.targets) > 3 else "")
            yield Text(f"  ambiguous (x{question.tensors}): {names}: {question.reason} ({best})", style="yellow")
