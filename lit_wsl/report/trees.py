"""Both module trees side by side, repeated modules folded, for the terminal, a log file or a notebook."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table

from lit_wsl.errors import counted
from lit_wsl.plan.entries import Side
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.drawing import Text, View, broken
from lit_wsl.report.rows import count_text
from lit_wsl.structure.description import ModelDescription, ModuleNode, ParameterGroup, shape_text
from lit_wsl.structure.families import fold_names, ranges


@dataclass(frozen=True)
class TreeLine:
    """One line of a tree."""

    label: str  # name of the module; ``{0..11}`` where modules are folded
    depth: int  # number of levels above it
    paths: tuple[str, ...]  # paths of the modules that the line stands for
    group: ParameterGroup  # the own tensors of the first of them
    numel: int  # number of elements below all of them
    status: str  # whether ``all``, ``part`` or ``none`` of the tensors below are matched; ``""`` if nobody asked
    hidden: int  # number of modules below that the depth limit hides
    guide: str  # the lines to the left of the name
    hang: str  # the lines to the left of what doesn't fit beside the name


@dataclass(frozen=True)
class _Facts:
    """What is counted bottom-up for a subtree: what makes it equal to a sibling, size, matched tensors, modules."""

    signature: int
    numel: int
    tensors: int
    matched: int
    modules: int


def tree_lines(
    side: ModelDescription,
    *,
    max_depth: int = 5,
    folded: bool = True,
    matched: frozenset[str] | None = None,
) -> list[TreeLine]:
    """The lines of one tree, parents first.

    Neighbours whose names differ by a number fold when everything below them is alike: names, shapes, and whether it
    is matched; but not the parts of one block (``fc1`` and ``fc2``), which have a role each. A module without tensors
    of its own whose only child is one line joins that line:
    ``encoder.layer.{0..11}``. Linear in the number of tensors. Without the names of the matched tensors the status is
    left out.
    """
    facts = _measure(side.root, matched)
    lines: list[TreeLine] = []

    def visit(nodes: Sequence[ModuleNode], depth: int, guide: str, label: str, hang: str) -> None:
        first = nodes[0]
        total = [facts[node.path] for node in nodes]
        hidden = sum(f.modules - 1 for f in total) if depth >= max_depth else 0
        status = ""
        hit, of = sum(f.matched for f in total), sum(f.tensors for f in total)
        if matched is not None and of:
            status = "all" if hit == of else "part" if hit else "none"
        paths = tuple(node.path for node in nodes)
        numel = sum(f.numel for f in total)
        lines.append(TreeLine(label, depth, paths, first.group, numel, status, hidden, guide, hang))
        if depth >= max_depth:
            return
        runs = _children(nodes, facts, folded)
        for place, run in enumerate(runs):
            name = _label(run.first)
            below, first_of_run = run.all, run.first
            while folded and not first_of_run[0].group.members:  # a module with one child says no more than the child
                inner = _children(below, facts, folded)
                if len(inner) != 1:
                    break
                name += f".{_label(inner[0].first)}"
                below, first_of_run = inner[0].all, inner[0].first
            last = place == len(runs) - 1
            visit(below, depth + 1, hang + ("└─ " if last else "├─ "), name, hang + ("   " if last else "│  "))

    visit([side.root], 0, "", side.label, "")
    return lines


@dataclass(frozen=True)
class _Run:
    """Children that one line stands for: those of the first folded module, and those of all of them."""

    first: list[ModuleNode]
    all: list[ModuleNode]


def _children(nodes: Sequence[ModuleNode], facts: Mapping[str, _Facts], folded: bool) -> list[_Run]:
    """The lines below modules that are alike; what is said of a child is said of this child of each of them."""
    found, start, own = [], 0, nodes[0].children
    for run in _runs(own, facts, in_block=len(nodes) > 1) if folded else [[child] for child in own]:
        end = start + len(run)
        found.append(_Run(run, [child for node in nodes for child in node.children[start:end]]))
        start = end
    return found


def _label(run: Sequence[ModuleNode]) -> str:
    """``{0..11}``, ``encoder_layer_{0..11}``, or the name of the only one."""
    numbered = [_numbered(node.name) for node in run]
    if len(run) == 1 or numbered[0] is None:
        return run[0].name
    before, _, after = numbered[0]
    return before + "{" + ranges([int(found[1]) for found in numbered if found is not None]) + "}" + after


def _numbered(name: str) -> tuple[str, str, str] | None:
    """What stands before, in and behind the only number of a name; None where there is none, or several."""
    found = re.fullmatch(r"(\D*)(\d+)(\D*)", name, re.ASCII)
    return (found[1], found[2], found[3]) if found else None


def _measure(root: ModuleNode, matched: frozenset[str] | None) -> dict[str, _Facts]:
    """Facts of every subtree, children before parents; equal subtrees get equal signatures."""
    known: dict[tuple[object, ...], int] = {}
    facts: dict[str, _Facts] = {}
    for node in reversed(list(root.walk())):
        below = [facts[child.path] for child in node.children]
        own = node.group.members
        hits = [matched is not None and info.name in matched for info in own]
        key: tuple[object, ...] = (
            tuple((info.leaf, info.shape, info.kind, hit) for info, hit in zip(own, hits)),
            tuple((child.name, f.signature) for child, f in zip(node.children, below)),
        )
        facts[node.path] = _Facts(
            signature=known.setdefault(key, len(known)),
            numel=node.group.numel + sum(f.numel for f in below),
            tensors=len(own) + sum(f.tensors for f in below),
            matched=sum(hits) + sum(f.matched for f in below),
            modules=1 + sum(f.modules for f in below),
        )
    return facts


def _runs(children: Sequence[ModuleNode], facts: Mapping[str, _Facts], *, in_block: bool) -> list[list[ModuleNode]]:
    runs: list[list[ModuleNode]] = []
    for child in children:
        before = runs[-1][-1] if runs else child
        # one of many: with modules of its own, or in a list that is no part of a block; its number alone is another
        layer = bool(child.children) or (not in_block and child.name.isdigit())
        names = [_numbered(node.name) for node in (before, child)]
        alike = None not in names and names[0][::2] == names[1][::2]  # type: ignore[index]
        if runs and layer and alike and facts[before.path].signature == facts[child.path].signature:
            runs[-1].append(child)
        else:
            runs.append([child])
    return runs


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
        trees = self._tree("source", half), self._tree("target", half)
        table = Table(box=None, pad_edge=False, show_edge=False, expand=beside)
        for title in ("source", "target")[: 1 + beside]:
            table.add_column(title, overflow="fold", ratio=1)
        rows = [trees] if beside else [trees[:1], [Text("\ntarget", style="bold")], trees[1:]]
        for row in rows:
            table.add_row(*row)
        yield table
        legend = "[W] weight, [B] bias, xN folded modules"
        if self.plan is not None:
            legend += "; ● all matched, ~ in part, ○ nothing"
        yield Text(legend, style="dim")

    def _tree(self, which: Side, width: int) -> Text:
        side = self.source if which == "source" else self.target
        matched, partners = None, {}
        if self.plan is not None:
            moved = (name for entry in self.plan.entries for name in entry.names(which))
            matched = frozenset(side.tied.get(name, name) for name in moved)
            partners = _partners(self.plan) if which == "source" else {}
        text = Text()
        for line in tree_lines(side, max_depth=self.max_depth, folded=self.folded, matched=matched):
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
    details = _badges(line.group)
    if line.numel and not (details and line.depth):
        details = f"{count_text(line.numel)} {details}".rstrip()
    if line.hidden:
        details += f" (+{line.hidden} modules)"
    _append(text, f" {details}", "dim", line.hang, width)
    named = dict.fromkeys(target for path in line.paths for target in partners.get(path, ()))
    if named:
        folded = fold_names([target or "(root)" for target in named])
        _append(text, f" → {counted(folded, 2)}", "green", line.hang, width)
    return text


def _append(text: Text, words: str, style: str, hang: str, width: int) -> None:
    """Put words behind the last line, or on lines of their own that keep the lines of the tree."""
    if len(text.plain.rpartition("\n")[2]) + len(words) <= width:
        text.append(words.rstrip(), style=style)
        return
    for line in broken(words, max(8, width - len(hang) - 2)):
        text.append("\n" + hang + "  ", style="dim").append(line, style=style)


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
