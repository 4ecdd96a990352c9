"""The ways in which a matrix can stand for another: turned, its parts in another order, head by head; as operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

from lit_wsl.matching.layers import Unit, may_turn
from lit_wsl.matching.shapes import operations_between, transpose_shape
from lit_wsl.plan.entries import PlanEntry
from lit_wsl.plan.operations import Concat, Operation, Permute, Reorder, Reshape, Split, Stack, Transpose, Unstack
from lit_wsl.structure.description import Shape


def turns(s: Shape, t: Shape, turn: bool) -> bool:
    """Whether a matrix, or each of a stack, is turned to become another; squares as said."""
    if s[-1] == s[-2]:
        return turn
    return s[-2:] != t[-2:]


def turned(s: Shape, t: Shape, turn: bool) -> tuple[Operation, ...]:
    """What takes one tensor to another of the same elements, squares turned or not."""
    if turn and s == t and may_turn(s) and s[-1] == s[-2]:
        return transposed(s)
    return operations_between(s, t) or ()


def transposed(shape: Shape) -> tuple[Operation, ...]:
    """What turns a matrix, or each of a stack, round; nothing for others."""
    if len(shape) < 3:
        return (Transpose(),) * (len(shape) == 2)
    return (Permute((0, 2, 1)),) if len(shape) == 3 else (Transpose(len(shape) - 2, len(shape) - 1),)


def squeezed(shape: Shape, plain: Shape) -> tuple[Operation, ...]:
    """What takes tensors of one shape, but for its first axis, to another with fewer or more axes of one behind."""
    return () if shape[1:] == plain[1:] else (Reshape((-1, *shape[1:]), (-1, *plain[1:])),)


def is_turn(op: Operation) -> bool:
    """Whether an operation turns matrices."""
    return isinstance(op, Transpose) or op == Permute((0, 2, 1))


def by_head(
    whole: Shape, sizes: Sequence[int], groups: int, join: bool, axis: int, lead: int = 0
) -> tuple[Operation, ...] | None:
    """How parts make up rows, or columns, of a whole that take turns head by head; nothing if they can't.

    Args:
        whole: Shape of the whole.
        sizes: Of the parts, along the axis.
        groups: How often they take turns.
        join: Whether the parts become the whole, or the whole its parts.
        axis: Along which they are joined.
        lead: Axes that a stack has in front.
    """
    least = min(sizes)
    if groups == 1 or least % groups or any(size % least for size in sizes):
        return None
    if axis > lead:
        rows = by_head(transpose_shape(whole), sizes, groups, join, lead, lead) or ()
        turn = transposed(whole)
        return (*rows, *turn) if join else (*turn, *rows)
    heads, width = tuple(size // least for size in sizes), least // groups
    first, rest = whole[:lead], whole[lead + 1 :]
    grouped, part, flat = (
        (*first, *inner, *rest) for inner in ((groups, sum(heads), width), (groups, -1, width), (-1,))
    )
    if join:
        return (Reshape(flat, part), Concat(lead + 1, heads), Reshape(grouped, whole))
    return (Reshape(whole, grouped), Split(lead + 1, heads), Reshape(part, flat))


def groupings(rows: int, parts: int) -> list[int]:
    """How often parts of so many rows may take turns in a whole: not at all, by head, or two of them row by row."""
    if parts > 3:
        return [1]
    heads = [g for g in range(2, min(rows - 1, 128) + 1) if rows % g == 0]
    return [1, *heads, rows] if parts == 2 and rows > 1 else [1, *heads]


def layouts_of(width: int) -> tuple[list[Any], list[str]]:
    """Ways in which the rows of a whole can stand for another's: other orders of its parts, by part or by head."""
    orders = list(permutations(range(3)))[1:]
    heads = [(g, by) for g in range(2, min(width // 2, 128) + 1) if width % g == 0 for by in (True, False)]
    labels = [f"parts {listed(o)}" for o in orders]
    labels += [f"from parts to {g} groups of heads" if by else f"from {g} groups of heads to parts" for g, by in heads]
    return [None, *orders, *heads], ["as it is", *labels]


def laid_out(shape: Shape, layout: Any) -> tuple[Operation, ...]:
    """The operations of one of these ways."""
    if layout is None:
        return ()
    if len(shape) == 2 and shape[1] > shape[0]:
        return (Transpose(), *laid_out(shape[::-1], layout), Transpose())
    if len(layout) == 3:
        return (Reorder(layout),)
    groups, to_heads = layout
    rest, width = shape[1:], shape[0] // 3 // groups
    before, after = (3, groups, width, *rest), (groups, 3, width, *rest)
    before, after = (before, after) if to_heads else (after, before)
    return (Reshape(shape, before), Permute((1, 0, *range(2, len(before)))), Reshape(after, shape))


def listed(order: Sequence[int]) -> str:
    """An order in words."""
    return ", ".join(map(str, order))


def first_of_parts(entry: PlanEntry) -> tuple[str, ...]:
    """The parts of a fusion in their order, of a stack of fusions those of the first; nothing if heads alternate."""
    steps = {op.name: op for op in entry.operations}
    names = max(entry.sources, entry.targets, key=len)
    if entry.kind != "parameter" or len(names) < 2 or "reshape" in steps or not steps.keys() & {"concat", "split"}:
        return ()
    stack = steps.get("stack") or steps.get("unstack")
    return names[:: stack.count] if isinstance(stack, (Stack, Unstack)) else names


def in_one_copy(entries: Sequence[PlanEntry], one: Unit, other: Unit, copy: int) -> list[PlanEntry]:
    """Entries with what goes to two like layers exchanged in one of the copies."""
    swapped = {
        a: b
        for left, right in zip(one.names, other.names)
        for x, y in zip(left[copy], right[copy])
        for a, b in ((x, y), (y, x))
    }
    return [replace(e, targets=tuple(swapped.get(name, name) for name in e.targets)) for e in entries]
