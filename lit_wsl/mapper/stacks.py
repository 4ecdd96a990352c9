"""Repeated siblings on one side that are one stacked tensor on the other: experts ``0`` to ``7``, or ``(8, ...)``.

A run of siblings of one structure is folded into *virtual* tensors, which the alignment then matches as if they stood
there: their operations say what stacks them out of the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_wsl.mapper.families import families_of
from lit_wsl.mapper.tree import Item, TreeBuilder, relative
from lit_wsl.structure.info import Shape
from lit_wsl.transfer.operations import Stack


def fold_run(items: Sequence[Item], waiting: Sequence[Item], builder: TreeBuilder) -> list[Item] | None:
    """Stack repeated siblings into virtual tensors where the other side holds such stacks.

    Args:
        items: Items of one size that found no partner.
        waiting: Items of the other side that are still open.
        builder: Gives the virtual items their structure numbers.

    Returns:
        One module of virtual tensors per run of siblings, or ``None`` if the other side holds no stack of them.
    """
    stacks = {t.shape for i in waiting for t in i.tensors if len(t.shape) >= 2}
    if not stacks or len({i.structure for i in items}) != 1:
        return None
    shapes = {t.shape for t in items[0].tensors}
    out: list[Item] = []
    for family in families_of(items, items[0]):
        axis = next((a for a in reversed(family.axes()) if _is_stacked(len(family.split(a)), shapes, stacks)), None)
        if axis is None:
            return None
        count = len(family.split(axis))
        runs: dict[tuple[int, ...], list[Item]] = {}
        for member, numbers in zip(family.members, family.numbers):
            runs.setdefault((*numbers[:axis], *numbers[axis + 1 :]), []).append(member)
        if any(len(run) != count for run in runs.values()):
            return None
        out += [_stack(run, builder) for run in runs.values()]
    return out


def _is_stacked(count: int, shapes: set[Shape], stacks: set[Shape]) -> bool:
    return any(s[0] == count and any(sorted(s[1:]) == sorted(shape) for shape in shapes) for s in stacks)


def _stack(run: list[Item], builder: TreeBuilder) -> Item:
    count = len(run)
    parent = run[0].path.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    children = []
    for k, tensor in enumerate(run[0].tensors):
        positions = tuple(p for member in run for p in member.tensors[k].positions)
        path = prefix + relative(tensor, run[0])
        children.append(builder.tensor(path, (count, *tensor.shape), positions, (*tensor.operations, Stack(0, count))))
    return children[0] if len(children) == 1 else builder.group(parent, children, 2)
