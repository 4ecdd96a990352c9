"""The mapping as a table, for the terminal, a log file or a notebook, and all of a result on one screen.

Each view is a rich renderable: ``console.print(MappingView(plan))``. Nothing is said by colour alone, and all of it can
be read at 80 columns, where names that don't fit beside each other stand below each other.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.jupyter import JupyterMixin
from rich.measure import Measurement
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lit_wsl.plan.coverage import Count, Coverage, measure_coverage
from lit_wsl.plan.entries import Unmatched
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.rows import (
    By,
    Confidence,
    MappingRow,
    OpenQuestion,
    confidence,
    count_text,
    describe_from_plan,
    mapping_rows,
    open_questions,
    operation_counts,
    percent,
    shape_text,
)
from lit_wsl.structure.families import fold

COLOURS: dict[Confidence, str] = {"high": "green", "medium": "yellow", "low": "red"}


MARKS: dict[Confidence, str] = {"high": "", "medium": "?", "low": "!"}


LEGEND = "score: no mark above 0.8, ? from 0.6 to 0.8, ! below 0.6"


# what stands in, column for column, where the encoding of a log file lacks the character
_STAND_INS = str.maketrans("→█░├└│─×●○", ">#.|`|-x*o")


class View(JupyterMixin, ABC):
    """A rich renderable for a terminal, a log file of any encoding, or a notebook."""

    @abstractmethod
    def _draw(self, width: int) -> Iterator[RenderableType]:
        """Yield what is shown in so many columns, in any characters."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        encoding = console.encoding
        for segment in console.render(Group(*self._draw(options.max_width)), options):
            yield Segment(_encodable(segment.text, encoding), segment.style, segment.control)


def _encodable(text: str, encoding: str) -> str:
    """The text itself, or with stand-ins for what the encoding lacks: ``?`` where nothing is alike."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_STAND_INS).encode(encoding, "replace").decode(encoding)
    except LookupError:
        pass
    return text


def score_text(score: float) -> Text:
    """A score, coloured by confidence, with a mark that says the same without colour."""
    level = confidence(score)
    return Text(f"{score:.2f} {MARKS[level]}".rstrip(), style=COLOURS[level])


@dataclass(frozen=True)
class Wrapped:
    """Names that are broken behind dots and blanks only, what follows indented, so that words stay whole.

    Attributes:
        lines: The lines, each with names.
        style: Their style.
    """

    lines: tuple[str, ...]
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [piece for line in self.lines for piece in broken(line, options.max_width)]
        yield Text("\n".join(lines), style=self.style, overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(len, self.lines), default=0)
        word = max((len(piece) for line in self.lines for piece in broken(line, 1)), default=0)
        return Measurement(min(word, options.max_width), min(longest, options.max_width))


def pieces(line: str) -> list[str]:
    """What a line of names may be broken into: behind blanks, and behind dots that are not those of ``{0..11}``.

    >>> pieces("layers.{0..11}.0.attn + b")
    ['layers.', '{0..11}.', '0.', 'attn ', '+ ', 'b']
    """
    return re.split(r"(?<=[. ])(?!\.)(?!\d+[},])", line)


def broken(line: str, width: int) -> list[str]:
    """A line of names as lines of at most ``width`` columns, as far as its words allow.

    >>> broken("encoder.layers.0.self_attention → blocks.0.attn", 22)
    ['encoder.layers.0.', '  self_attention →', '  blocks.0.attn']
    """
    lines = [""]
    for piece in pieces(line):
        if lines[-1].strip() and len((lines[-1] + piece).rstrip()) > width:
            lines.append("  ")
        lines[-1] += piece
    return [text.rstrip() for text in lines]


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of shares, as wide as its cell.

    Attributes:
        share: Filled share, 0 to 1.
        style: Colour of the filled part.
        width: Width in characters.
    """

    share: float
    style: str = "green"
    width: int = 20

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, min(self.width, options.max_width))
        filled = round(max(0.0, min(1.0, self.share)) * width)
        if filled == width and self.share < 1.0:
            filled -= 1  # a full bar means all
        if filled == 0 and self.share > 0.0:
            filled = 1
        yield Text("█" * filled, style=self.style, no_wrap=True).append("░" * (width - filled), style="dim")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = max(1, min(self.width, options.max_width))
        return Measurement(width, width)


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
                f"x{len(family)}", Wrapped((family.patterns[0] + kind,)), shape_text(first.shape), Text(first.reason)
            )
        more = len(families) - len(shown)
        return Group(table, *([Text(f"... and {more} more lines")] if more else []))


@dataclass(frozen=True)
class AmbiguousView(View):
    """Targets left alone because nothing decides, by reason, with their candidates.

    Attributes:
        plan: The plan.
        max_rows: At most so many questions; ``None`` for all.
        max_candidates: At most so many candidates per question.
    """

    plan: TransferPlan
    max_rows: int | None = None
    max_candidates: int = 4

    def _draw(self, width: int) -> Iterator[RenderableType]:
        questions = open_questions(self.plan)
        count = sum(question.tensors for question in questions)
        yield Text(f"ambiguous, left as they were: {count}", style="bold yellow" if count else "dim")
        shown = questions if self.max_rows is None else questions[: max(0, self.max_rows)]
        reasons: dict[str, list[OpenQuestion]] = {}
        for question in shown:
            reasons.setdefault(question.reason, []).append(question)
        for reason, alike in reasons.items():
            if reason:
                yield Text(f"why: {reason}")
            yield self._table(alike)
        if len(questions) > len(shown):
            yield Text(f"... and {len(questions) - len(shown)} more")

    def _table(self, questions: Sequence[OpenQuestion]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("n", justify="right", no_wrap=True, overflow="crop")
        table.add_column("target", overflow="fold", ratio=1)
        table.add_column("candidates", overflow="fold", ratio=1)
        for question in questions:
            lines = [f"{score:.2f} {name}" for score, name in question.candidates[: self.max_candidates]]
            more = len(question.candidates) - len(lines)
            lines += [f"and {more} more"] if more > 0 else []
            table.add_row(f"x{question.tensors}", Wrapped(question.targets), Wrapped(tuple(lines)))
        return table


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
