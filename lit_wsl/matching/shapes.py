"""Which lossless operation takes one shape into another, how parts make up a whole, and classes cut by shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from lit_wsl.matching.tree import Family, Item, same_kind
from lit_wsl.plan.operations import Operation, Permute, Reshape, Transpose
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
    """Costs of pairs in one pair of models.

    Args:
        forbidden: Whether two paths must not match.
        turned: Whether the pair stores its matrices the other way round.
    """

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
