"""A module tree as lines, repeated modules folded, before it is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_wsl.structure.families import ranges
from lit_wsl.structure.info import ModelDescription, ModuleNode, ParameterGroup


@dataclass(frozen=True)
class TreeLine:
    """One line of a tree.

    Attributes:
        label: Name of the module; ``{0..11}`` where modules are folded.
        depth: Number of levels above it.
        paths: Paths of the modules that the line stands for.
        group: The own tensors of the first of them.
        numel: Number of elements below all of them.
        status: Whether ``all``, ``part`` or ``none`` of the tensors below are matched; ``""`` if nobody asked.
        hidden: Number of modules below that the depth limit hides.
        guide: The lines to the left of the name.
        hang: The lines to the left of what doesn't fit beside the name.
    """

    label: str
    depth: int
    paths: tuple[str, ...]
    group: ParameterGroup
    numel: int
    status: str
    hidden: int
    guide: str
    hang: str


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
    with_buffers: bool = True,
) -> list[TreeLine]:
    """The lines of one tree, parents first.

    Neighbours whose names differ by a number fold when everything below them is alike: names, shapes, and whether it
    is matched; and a module without tensors of its own whose only child is one line joins that line:
    ``encoder.layer.{0..11}``. Linear in the number of tensors.

    Args:
        side: The model.
        max_depth: Number of levels below the root.
        folded: Fold repeated modules and chains.
        matched: Names of the matched tensors; ``None`` leaves the status out.
        with_buffers: Whether the status counts buffers.
    """
    facts = _measure(side.root, matched, with_buffers)
    lines: list[TreeLine] = []

    def visit(nodes: Sequence[ModuleNode], depth: int, guide: str, label: str, hang: str) -> None:
        first = nodes[0]
        total = [facts[node.path] for node in nodes]
        hidden = sum(f.modules - 1 for f in total) if depth >= max_depth else 0
        status = ""
        if matched is not None:
            hit, of = sum(f.matched for f in total), sum(f.tensors for f in total)
            status = "all" if hit == of and of else "part" if hit else "none"
            status = status if of else ""
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
    found, start = [], 0
    for run in _runs(nodes[0].children, facts) if folded else [[child] for child in nodes[0].children]:
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


def _next_of_kind(before: str, name: str) -> bool:
    """Whether two names differ by their only number."""
    one, other = _numbered(before), _numbered(name)
    return one is not None and other is not None and (one[0], one[2]) == (other[0], other[2])


def _measure(root: ModuleNode, matched: frozenset[str] | None, with_buffers: bool) -> dict[str, _Facts]:
    """Facts of every subtree, children before parents; equal subtrees get equal signatures."""
    known: dict[tuple[object, ...], int] = {}
    facts: dict[str, _Facts] = {}
    for node in reversed(list(root.walk())):
        below = [facts[child.path] for child in node.children]
        own = node.group.members
        asked = [with_buffers or info.kind == "parameter" for info in own]
        hits = [matched is not None and ask and info.name in matched for info, ask in zip(own, asked)]
        key: tuple[object, ...] = (
            tuple((info.leaf, info.shape, info.kind, hit) for info, hit in zip(own, hits)),
            tuple((child.name, f.signature) for child, f in zip(node.children, below)),
        )
        facts[node.path] = _Facts(
            signature=known.setdefault(key, len(known)),
            numel=node.group.numel + sum(f.numel for f in below),
            tensors=sum(asked) + sum(f.tensors for f in below),
            matched=sum(hits) + sum(f.matched for f in below),
            modules=1 + sum(f.modules for f in below),
        )
    return facts


def _runs(children: Sequence[ModuleNode], facts: Mapping[str, _Facts]) -> list[list[ModuleNode]]:
    runs: list[list[ModuleNode]] = []
    for child in children:
        before = runs[-1][-1] if runs else None
        if (
            before is not None
            and _next_of_kind(before.name, child.name)
            and facts[before.path].signature == facts[child.path].signature
        ):
            runs[-1].append(child)
        else:
            runs.append([child])
    return runs
