"""Which lossless operations take one shape into another: turned, in parts, head by head; and classes cut by shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

from lit_wsl.matching.layers import Unit, may_turn
from lit_wsl.matching.tree import Family, Item, same_kind
from lit_wsl.plan.entries import PlanEntry
from lit_wsl.plan.operations import Concat, Operation, Permute, Reorder, Reshape, Split, Stack, Transpose, Unstack
from lit_wsl.structure.description import Shape, core

EXACT, RESHAPED, TRANSPOSED = 0.0, 0.2, 0.3


def operations_between(source: Shape, target: Shape, *, transposed: bool = False) -> tuple[Operation, ...] | None:
    """The operations that take a tensor of one shape into another, or ``None`` if no lossless one does.

    Reshapes are taken only where the order of the elements leaves no doubt: axes of size one come and go, and a
    flattened convolution ``(O, I, H, W)`` is a matrix ``(O, I*H*W)``.

    >>> operations_between((3, 8), (8, 3))
    (Transpose(dim0=0, dim1=1),)
    >>> operations_between((8, 3, 2, 2), (8, 12))
    (Reshape(source=(8, 3, 2, 2), target=(8, 12)),)
    >>> operations_between((8, 3), (8, 4)) is None
    True
    """
    s, t = core(source), core(target)
    if transposed and len(source) == len(target) == 2 and len(s) == 2 and source == target[::-1]:
        return (Transpose(),)
    if source == target:
        return ()
    if s == t:
        if len(source) == len(target) >= 4 and len(s) > 2 and source[:2] == target[:2]:
            return None  # a kernel of 1 by 7 is none of 7 by 1
        return (Reshape(source, target),)
    if len(source) == len(target) == 2 and source == target[::-1]:
        return (Transpose(),)
    if len(source) == len(target) == 3 and source[0] == target[0] > 1 and source[1:] == target[1:][::-1]:
        return (Permute((0, 2, 1)),)
    if min(len(s), len(t)) == 2 and max(len(s), len(t)) >= 3 and s[0] == t[0] and math.prod(s) == math.prod(t):
        return (Reshape(source, target),)
    return None


def operation_cost(source: Shape, target: Shape, *, transposed: bool = False) -> float | None:
    """Cost of taking one shape into another for the assignment; ``None`` where it is impossible."""
    operations = operations_between(source, target, transposed=transposed)
    if operations is None:
        return None
    if not operations:
        return EXACT
    turned = any(op.name in ("transpose", "permute") for op in operations)
    return (EXACT if transposed else TRANSPOSED) if turned else RESHAPED


def join_axis(whole: Shape, parts: Sequence[Shape]) -> tuple[int, bool] | None:
    """Axis along which parts make up a whole, and whether the parts must be transposed first.

    >>> join_axis((6, 4), [(2, 4), (4, 4)]), join_axis((4, 6), [(2, 4), (4, 4)])
    ((0, False), (1, True))
    """
    if len({len(p) for p in parts} | {len(whole)}) != 1:
        return None
    for turn in (False, True):
        shapes = [transpose_shape(p) for p in parts] if turn else list(parts)
        if turn and len(whole) not in (2, 3):
            return None
        first = 1 if len(whole) == 3 else 0
        for axis in range(first, len(whole)):
            rest = {(*s[:axis], *s[axis + 1 :]) for s in [whole, *shapes]}
            if len(rest) == 1 and sum(s[axis] for s in shapes) == whole[axis]:
                return axis, turn
    return None


def transpose_shape(shape: Shape) -> Shape:
    """A shape with its last two axes exchanged; a vector's own."""
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) >= 2 else shape


OTHER_INSIDE = 0.2  # modules of one size that hold other shapes


Forbidden = Callable[[str, str], bool]


class PairCosts:
    """Costs of pairs in one pair of models."""

    def __init__(self, forbidden: Forbidden, turned: bool) -> None:
        self.forbidden = forbidden
        self.turned = turned

    def of(self, s: Item, t: Item) -> float | None:
        """Cost of pairing two items by structure and shapes; ``None`` where they can't correspond."""
        if self.forbidden(s.path, t.path):
            return None
        if s.virtual and t.virtual:
            return None  # stacked on both sides, so neither holds a stack
        if s.level == t.level == 0:
            if not same_kind(s, t):
                return None
            return operation_cost(s.shape, t.shape, transposed=self.turned)
        if s.structure == t.structure:
            return 0.0
        if s.profile_key == t.profile_key and max(s.level, t.level) == 2:
            return 0.0 if s.shapes == t.shapes or self.turned else TRANSPOSED
        if max(s.level, t.level) == 2:
            return OTHER_INSIDE
        return self._of_units(s, t)

    def _of_units(self, s: Item, t: Item) -> float | None:
        """Cost of pairing two units tensor by tensor, the largest with the largest."""
        if len(s.tensors) != len(t.tensors) or s.main.averaging != t.main.averaging:
            return None
        by_size = [sorted(i.tensors, key=lambda x: (-x.numel, x.start)) for i in (s, t)]
        costs = [operation_cost(a.shape, b.shape, transposed=self.turned) for a, b in zip(*by_size)]
        known = [c for c in costs if c is not None]
        return max(known) if len(known) == len(costs) else None

    def of_families(self, f: Family, g: Family) -> float | None:
        """Mean cost over the members paired by number; ``None`` if any can't correspond."""
        if len(f.members) != len(g.members) or self.forbidden(f.members[0].path, g.members[0].path):
            return None
        known: dict[tuple[int, int], float | None] = {}
        total = 0.0
        for a, b in zip(f.members, g.members):
            key = (a.structure, b.structure)
            if key not in known:
                known[key] = self.of(a, b)
            cost = known[key]
            if cost is None:
                return None
            total += cost
        return total / len(f.members)


Shapes = tuple[object, ...]


def cut_by_shapes(
    s: list[Item], t: list[Item], *, exact: bool, by_core: bool
) -> list[tuple[list[Item], list[Item], bool]]:
    """Cut a class by shapes where that gives both sides equally many; the rest stays together.

    By exact shapes first, so that nothing is transposed without need.
    """
    if len(s) == len(t) == 1:
        return [(s, t, True)]
    parts = []
    by_core = by_core and all(i.core for i in (*s, *t))
    for key in (_core_shapes,) if by_core else (_exact_shapes, _shapes) if exact else (_shapes,):
        keys_s, keys_t = _by(key, s), _by(key, t)
        s, t = [], []
        for value in sorted({*keys_s, *keys_t}):
            a, b = keys_s.get(value, []), keys_t.get(value, [])
            if len(a) == len(b):
                parts.append((a, b, True))
            else:
                s += a
                t += b
    if s and t:
        s, t = (sorted(side, key=lambda i: i.start) for side in (s, t))
        parts.append((s, t, len(s) == len(t)))
    return parts


def _by(key: Callable[[Item], Shapes], items: Sequence[Item]) -> dict[Shapes, list[Item]]:
    known: dict[int, Shapes] = {}
    found: dict[Shapes, list[Item]] = {}
    for item in items:
        if item.structure not in known:
            known[item.structure] = key(item)
        found.setdefault(known[item.structure], []).append(item)
    return found


def _exact_shapes(item: Item) -> Shapes:
    return tuple(sorted(Counter((core(t.shape), t.averaging) for t in item.tensors).items()))


def _core_shapes(item: Item) -> Shapes:
    return tuple(sorted(item.core.items()))


def _shapes(item: Item) -> Shapes:
    return item.profile_key


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
