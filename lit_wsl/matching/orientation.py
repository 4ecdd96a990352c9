"""Which way round a square matrix is stored: a verdict of its own, beside the question whose partner it is.

A linear map may be stored as (out, in) or as (in, out). Matrices that are not square show it; a square one is stored
like those beside it, in the module that it stands in, or like those of its class, where the classes of both sides are
known. Where neither shows it and something says that the make changed (a bare parameter became a module's weight, heads
were stored apart, something else is transposed), it is open.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import replace
from functools import lru_cache

from lit_wsl.matching.turns import is_turn, transposed
from lit_wsl.matching.words import split_numbers
from lit_wsl.plan.operations import Concat, Operation, Reshape, Split
from lit_wsl.structure.description import ParameterInfo, Shape, core

_TABLE = re.compile("embed|pos|token|table")
OPEN = "a square matrix, and nothing shows whether both sides store it the same way round"
LINEAR = ("Linear", "NonDynamicallyQuantizableLinear", "MultiheadAttention")  # of torch, stored (out, in)
BOTH_WAYS = "it would have to be turned, but a matrix beside it is stored the same way round on both sides"
HEADS = "the heads are stored apart on one side, so that nothing shows whether the matrix is stored the same way round"
OTHER_CONVOLUTION = "one is a transposed convolution, the other is not: no copy of the kernel computes the same"

Make = tuple[object, ...]
Matched = tuple[Sequence[ParameterInfo], Sequence[ParameterInfo], tuple[Operation, ...]]
Doubted = tuple[Sequence[ParameterInfo], Sequence[tuple[Sequence[ParameterInfo], tuple[Operation, ...]]]]


class Orientation:
    """Judges the matrices of one pair of models.

    Args:
        matches: Source tensors, target tensors and operations of all matches.
        doubts: Target tensors and their candidates, of what is open: where only a turned matrix would fit, or names
            speak for one, something was stored the other way round, though nobody knows what.
        tensors: All tensors of both sides: where those left over fit only turned, so may the squares beside them.
    """

    def __init__(
        self,
        matches: Sequence[Matched],
        doubts: Sequence[Doubted] = (),
        tensors: tuple[Sequence[ParameterInfo], Sequence[ParameterInfo]] = ((), ()),
    ) -> None:
        self._seen: dict[Make, set[bool | None]] = defaultdict(set)
        self.turned = self.kept = False
        for sources, targets, operations in matches:
            if len(sources) == len(targets) == 1 or _is_stack(sources, targets):
                self._see(*_members(sources, targets), certain=True)
            else:
                self._see_parts(sources, targets, operations)
        for targets, candidates in doubts:
            for sources, _ in candidates:
                if len(sources) == len(targets) == 1:
                    self._see(sources[0], targets[0], certain=False)
        self._see_left(matches, tensors)

    def _see(self, source: ParameterInfo, target: ParameterInfo, *, certain: bool) -> None:
        s, t = core(source.shape), core(target.shape)
        if len(s) < 2:  # a map to one number
            column = len(source.shape) == len(target.shape) == 2 and source.shape != target.shape
            self.turned = self.turned or column
            return
        turned = s != t
        if len(s) != len(t) or len(s) not in (2, 3) or s[-1] == s[-2] or not (certain or turned):
            return
        if s not in (t, (*t[:-2], t[-1], t[-2])) or _is_table(target):
            return
        self.turned = self.turned or turned
        self.kept = self.kept or not (turned or _leaf(source) == "own")
        for make in _makes(source, target):
            self._seen[make].add(turned if certain else None)

    def _see_left(
        self, matches: Sequence[Matched], tensors: tuple[Sequence[ParameterInfo], Sequence[ParameterInfo]]
    ) -> None:
        """What found no partner in two modules shows that squares beside it may be turned, if it would fit turned."""
        matched = [{i.name for match in matches for i in match[side]} for side in (0, 1)]
        left: list[dict[object, set[Shape]]] = [defaultdict(set), defaultdict(set)]
        for side, infos in enumerate(tensors):
            for i in infos:
                if len(core(i.shape)) == 2 and i.name not in matched[side]:
                    left[side][_around(i.module_path)].add(core(i.shape))
        ours, theirs = (set().union(*side.values()) for side in left)
        self.turned = self.turned or _fits_only_turned(ours, theirs)
        if not self.turned:
            return
        for sources, targets, _ in matches:
            if len(sources) == len(targets) == 1 and len(core(sources[0].shape)) == 2:
                ours, theirs = (left[k].get(_around(i.module_path), set()) for k, (i,) in enumerate((sources, targets)))
                if _fits_only_turned(ours, theirs):
                    for make in _makes(sources[0], targets[0]):
                        self._seen[make].add(None)

    def _see_parts(
        self, sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo], operations: Sequence[Operation]
    ) -> None:
        """What parts of a whole show: that they stand beside each other, or that only turned they fit."""
        self.turned = self.turned or _joined_across(sources, targets)
        if all(len(i.shape) == 2 for i in (*sources, *targets)) and not _fits_both_ways(sources, targets):
            turned = any(map(is_turn, operations))
            self.turned = self.turned or turned
            for make in {m for s in sources for t in targets for m in _makes(s, t)}:
                self._seen[make].add(turned)

    def judge(self, match: Matched) -> tuple[tuple[Operation, ...] | None, str]:
        """The operations of a match as they should be; ``None`` and the reason where nothing tells."""
        sources, targets, operations = match
        kinds = {("Transpose" in i.module_type) for i in (*sources, *targets) if "Conv" in i.module_type}
        if len(kinds) == 2:
            return None, OTHER_CONVOLUTION
        if len(sources) == len(targets) == 1:
            return self._judge_pair(sources[0], targets[0], operations)
        if _is_stack(sources, targets):
            s, t = _members(sources, targets)
            square = len(s.shape) == 2 and s.shape[0] == s.shape[1] and not _is_table(t)
            if square and self._shown(_makes(s, t)) is not any(map(is_turn, operations)):
                return None, OPEN
            return operations, ""
        if any(isinstance(op, (Split, Concat)) for op in operations) and _fits_both_ways(sources, targets):
            wanted = self._verdict(sources[0], targets[0])
            as_it_is = not any(map(is_turn, operations)) and not _are_square(_parts_and_whole(sources, targets)[0])
            if wanted is None or (as_it_is if wanted else _joined_across(sources, targets)):
                return None, OPEN
        return operations, ""

    def _judge_pair(
        self, s: ParameterInfo, t: ParameterInfo, operations: tuple[Operation, ...]
    ) -> tuple[tuple[Operation, ...] | None, str]:
        a, b = core(s.shape), core(t.shape)
        if len(a) < 2:
            return operations, ""
        if {len(a), len(b)} == {2, 3} and any(isinstance(op, Reshape) for op in operations):
            rows, columns = min(a, b, key=len)
            if rows == columns and "Conv" not in (t.module_type[:4], s.module_type[:4]):
                return None, HEADS
        if a != b and any(map(is_turn, operations)) and self._is_kept_beside(s, t):
            return None, BOTH_WAYS
        if a != b or len(a) not in (2, 3) or a[-1] != a[-2] or _is_table(t):
            return operations, ""
        wanted = self._verdict(s, t)
        if wanted is None:
            return None, OPEN
        if wanted == any(map(is_turn, operations)):
            return operations, ""
        rest = tuple(op for op in operations if not is_turn(op))
        turn = transposed(s.shape) if len(s.shape) == len(a) else ()
        if not wanted:
            return rest, ""
        return ((*turn, *rest), "") if turn else (None, OPEN)

    def _verdict(self, s: ParameterInfo, t: ParameterInfo) -> bool | None:
        """Whether a square matrix is stored the other way round; ``None`` where nothing tells."""
        makes = _makes(s, t)
        if any(make in self._seen for make in makes):
            return self._shown(makes)
        same_make = _leaf(s) == _leaf(t) and len(core(s.shape)) == len(core(t.shape))
        kernel = len(s.shape) != len(t.shape)  # of one by one, where there was a matrix, or the other way round
        return False if same_make and not self.turned and (self.kept or not kernel) else None

    def _is_kept_beside(self, s: ParameterInfo, t: ParameterInfo) -> bool:
        """Whether a matrix beside one that has to be turned is stored the same way round on both sides."""
        return False in self._seen.get(_makes(s, t)[0], ())

    def _shown(self, makes: Sequence[Make]) -> bool | None:
        """What the nearest make that shows anything shows."""
        seen = next((self._seen[make] for make in makes if make in self._seen), None)
        return next(iter(seen)) if seen and len(seen) == 1 else None


def _fits_only_turned(ours: Set[Shape], theirs: Set[Shape]) -> bool:
    """Whether a matrix of one side has the shape of one on the other turned, and of none as it is."""
    return any(a != b and (b, a) in theirs and (a, b) not in theirs for a, b in ours)


def _is_stack(sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]) -> bool:
    """Whether a tensor of one side is made of those of the other along an axis of its own."""
    fewer, more = sorted((sources, targets), key=len)
    return len(fewer) == 1 < len(more) and len(fewer[0].shape) == len(more[0].shape) + 1


def _members(sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]) -> tuple[ParameterInfo, ParameterInfo]:
    """A pair to compare: of a stack a part, and the whole without its axis of the parts."""
    s, t = sources[0], targets[0]
    if len(sources) == len(targets):
        return s, t
    return (replace(s, shape=s.shape[1:]), t) if len(targets) > 1 else (s, replace(t, shape=t.shape[1:]))


def _parts_and_whole(
    sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]
) -> tuple[Sequence[ParameterInfo], Sequence[ParameterInfo]]:
    return (targets, sources) if len(targets) > 1 else (sources, targets)


def _fits_both_ways(sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]) -> bool:
    """Whether parts make up a whole turned and as they are: where they are squares, or it is."""
    return any(map(_are_square, _parts_and_whole(sources, targets)))


def _joined_across(sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]) -> bool:
    """Whether parts make up a whole along its last axis, as matrices stored (in, out) do."""
    parts, whole = _parts_and_whole(sources, targets)
    if not _fits_both_ways(sources, targets) or any(len(i.shape) != 2 for i in (*parts, *whole)):
        return False
    return all(i.shape[0] == whole[0].shape[0] and i.shape[1] != whole[0].shape[1] for i in parts)


def _are_square(matrices: Sequence[ParameterInfo]) -> bool:
    return all(len(m.shape) == 2 and m.shape[0] == m.shape[1] for m in matrices)


def _leaf(info: ParameterInfo) -> str:
    """What a tensor is called inside its module: weight or kernel; any other name is one of its own."""
    last = info.leaf.rpartition("_")[2]
    return last if last in ("weight", "kernel") else "own"


def _make(info: ParameterInfo) -> Make:
    return info.module_type, _leaf(info), len(core(info.shape))


@lru_cache(maxsize=4096)
def _around(path: str) -> tuple[str, ...]:
    """The pattern of what a module stands in."""
    return split_numbers(path.rpartition(".")[0])[0]


def _makes(s: ParameterInfo, t: ParameterInfo) -> tuple[Make, ...]:
    """What a pair of matrices shares its orientation with, the nearest first.

    The matrices of the module that it stands in, on both sides, or on the source's where it is known how torch stores
    the target's; all of its kind, where the kinds of both are known.
    """
    both = (_make(s), _make(t))
    around = _around(s.module_path), _around(t.module_path)
    makes: list[Make] = [(around, *both)]
    if t.module_type in LINEAR:
        makes.append((around[0], both[0]))
    return (*makes, both) if s.module_type and t.module_type else tuple(makes)


def _is_table(info: ParameterInfo) -> bool:
    """Whether a matrix is looked up, not multiplied: tables are never stored the other way round."""
    return "Embed" in info.module_type or bool(_TABLE.search(info.leaf.lower()))
