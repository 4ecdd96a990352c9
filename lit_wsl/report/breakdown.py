"""How the score of one match comes about, and who the runner-up was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_wsl.errors import MappingError
from lit_wsl.mapper.options import MatchingOptions
from lit_wsl.mapper.scoring import ScoreBreakdown
from lit_wsl.report.console import COLOURS, LEGEND, Bar, View, Wrapped, score_text
from lit_wsl.report.material import Material, breakdown, pairs
from lit_wsl.report.rows import confidence, shape_text
from lit_wsl.report.runners_up import candidates
from lit_wsl.structure.info import ModelDescription
from lit_wsl.transfer.plan import PlanEntry, Side, TransferPlan

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
        table.add_column("score", no_wrap=True, overflow="crop")
        for part in ("shape", "name", "hier."):
            table.add_column(part, no_wrap=True, overflow="crop", justify="right")
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
        return candidates(material, own, others, shape, like=partners[0], without=partners, operation=moved)[
            : self.runners_up
        ]

    def _unmatched(self, material: Material) -> Panel:
        from_source = self.name in self.source
        side = self.source if from_source else self.target
        left = self.plan.unmatched_source if from_source else self.plan.unmatched_target
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
        for other in best:
            name = other.target if from_source else other.source
            lines += [Text(""), Text(f"best candidate: {name}{self._taken(name, from_source)}"), score_table(other)]
            break
        return Panel(Group(*lines), title="score", title_align="left", box=box.ROUNDED, expand=False)


def score_table(parts: ScoreBreakdown) -> Table:
    """Shape, name and hierarchy with their parts: value, bar, weight, and what they add to the score."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("part", no_wrap=True, overflow="crop")
    table.add_column("value", justify="right", no_wrap=True, overflow="crop")
    table.add_column("", no_wrap=True, overflow="crop")
    table.add_column("weight", justify="right", no_wrap=True, overflow="crop")
    table.add_column("adds", justify="right", no_wrap=True, overflow="crop")
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
