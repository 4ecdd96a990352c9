"""What a plan leaves alone: targets that nothing decides, and what found no partner on either side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_wsl.report.console import View, Wrapped
from lit_wsl.report.rows import OpenQuestion, open_questions, shape_text
from lit_wsl.structure.families import fold
from lit_wsl.transfer.plan import TransferPlan, Unmatched


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
