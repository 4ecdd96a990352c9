"""Both module trees side by side, repeated modules folded, for the terminal, a log file or a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lit_wsl.report.console import View, pieces
from lit_wsl.report.folding import TreeLine, tree_lines
from lit_wsl.report.rows import count_text, shape_text
from lit_wsl.structure.families import fold_names
from lit_wsl.structure.info import ModelDescription, ParameterGroup
from lit_wsl.transfer.plan import TransferPlan

SIDE_BY_SIDE = 76  # columns from which the trees stand beside each other
_MATCHED = {"all": ("●", "green"), "part": ("~", "yellow"), "none": ("○", "red")}


@dataclass(frozen=True)
class HierarchyView(View):
    """Source and target tree side by side; below each other where there are fewer than 76 columns.

    ``[W]`` and ``[B]`` mark modules with a weight and a bias, followed by the weight's shape.

    Attributes:
        source: The checkpoint's side.
        target: The model's side.
        plan: Where given, matched modules are marked, and the source's name their partners.
        max_depth: Number of levels to show.
        folded: Fold repeated modules.
    """

    source: ModelDescription
    target: ModelDescription
    plan: TransferPlan | None = None
    max_depth: int = 5
    folded: bool = True

    def _draw(self, width: int) -> Iterator[RenderableType]:
        beside = width >= SIDE_BY_SIDE
        half = (width - 1) // 2 if beside else width
        trees = [self._tree("source", half), self._tree("target", half)]
        table = Table(box=None, pad_edge=False, show_edge=False, expand=beside)
        table.add_column("source", overflow="fold", ratio=1)
        if beside:
            table.add_column("target", overflow="fold", ratio=1)
            table.add_row(*trees)
        else:
            table.add_row(trees[0])
            table.add_row(Text("\ntarget", style="bold"))
            table.add_row(trees[1])
        yield table
        legend = "[W] weight, [B] bias, xN folded modules"
        if self.plan is not None:
            legend += "; ● all matched, ~ in part, ○ nothing"
        yield Text(legend, style="dim")

    def _tree(self, which: str, width: int) -> Text:
        side = self.source if which == "source" else self.target
        matched, partners = None, {}
        if self.plan is not None:
            moved = [entry.sources if which == "source" else entry.targets for entry in self.plan.entries]
            matched = frozenset(side.tied.get(name, name) for names in moved for name in names)
            partners = _partners(self.plan) if which == "source" else {}
        text = Text()
        with_buffers = self.plan is None or self.plan.options.get("buffers") != "exclude"
        for line in tree_lines(
            side, max_depth=self.max_depth, folded=self.folded, matched=matched, with_buffers=with_buffers
        ):
            text.append_text(_line(line, partners, width)).append("\n")
        text.right_crop(1)
        return text


def _partners(plan: TransferPlan) -> dict[str, tuple[str, ...]]:
    """Source module path -> paths of the target modules that its own tensors go to."""
    found: dict[str, dict[str, None]] = {}
    for entry in plan.entries:
        targets = dict.fromkeys(target.rpartition(".")[0] for target in entry.targets)
        for source in entry.sources:
            found.setdefault(source.rpartition(".")[0], {}).update(targets)
    return {path: tuple(targets) for path, targets in found.items()}


def _line(line: TreeLine, partners: Mapping[str, tuple[str, ...]], width: int) -> Text:
    text = Text(line.guide, style="dim")
    if line.status:
        mark, colour = _MATCHED[line.status]
        text.append(mark + " ", style=colour)
    text.append(line.label, style="bold" if line.depth == 0 else "")
    if len(line.paths) > 1:
        _append(text, f" x{len(line.paths)}", "cyan", line.hang, width)
    hang = line.hang
    details = _badges(line.group)
    if line.numel and not (details and line.depth):
        details = f"{count_text(line.numel)} {details}".rstrip()
    if line.hidden:
        details += f" (+{line.hidden} modules)"
    _append(text, f" {details}", "dim", hang, width)
    named = dict.fromkeys(target for path in line.paths for target in partners.get(path, ()))
    if named:
        folded = fold_names([target or "(root)" for target in named])
        more = f" and {len(folded) - 2} more" if len(folded) > 2 else ""
        _append(text, " → " + ", ".join(folded[:2]) + more, "green", hang, width)
    return text


def _append(text: Text, words: str, style: str, hang: str, width: int) -> None:
    """Put words behind the last line, or on lines of their own that keep the lines of the tree."""
    if len(text.plain.rpartition("\n")[2]) + len(words) <= width:
        text.append(words.rstrip(), style=style)
        return
    room = max(8, width - len(hang) - 2)
    lines = [""]
    for piece in pieces(words):
        if lines[-1].strip() and len((lines[-1] + piece).rstrip()) > room:
            lines.append("  ")
        lines[-1] += piece
    for line in lines:
        text.append("\n" + hang + "  ", style="dim").append(line.rstrip(), style=style)


def _badges(group: ParameterGroup) -> str:
    """Badges and shapes of a module's own tensors: ``[W][B] 64x3x7x7 +3 buffers``."""
    leaves = {info.leaf: info for info in group.parameters}
    known = [leaf for leaf in ("weight", "bias") if leaf in leaves]
    words = "".join(f"[{leaf[0].upper()}]" for leaf in known)
    if known:
        words += f" {shape_text(leaves[known[0]].shape)}"
    others = [f"{leaf} {shape_text(info.shape)}" for leaf, info in leaves.items() if leaf not in known]
    if others:
        words += " " + ", ".join(others[:2]) + (f" +{len(others) - 2}" if len(others) > 2 else "")
    if group.buffers:
        words += f" +{len(group.buffers)} buffer" + ("s" if len(group.buffers) > 1 else "")
    return words.strip()
