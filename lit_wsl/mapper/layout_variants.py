"""Layouts that keep every shape and change the meaning, as ways in which a plan could be otherwise.

The alternatives to the conventions of :mod:`lit_wsl.mapper.layouts`, and square matrices the other way round. Names and
shapes can't see them, so they are proposed where the functions of the models were seen to part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from lit_wsl.mapper.names import split_numbers
from lit_wsl.mapper.tree import owner_path
from lit_wsl.mapper.variants import BY_FUNCTION, Variant
from lit_wsl.transfer.operations import Concat, Operation, Permute, Reshape, Split, Transpose
from lit_wsl.transfer.plan import PlanEntry, TransferPlan

MAX_HEADS = 128
MAX_HEAD_WIDTH = 256

Key = tuple[str, str]


def layout_variants(plan: TransferPlan, modules: Sequence[str]) -> Iterator[list[Variant]]:
    """For the entries into modules just before a difference: the other layouts that they could have.

    Interleaved heads of a fused projection, flattened convolutions whose channels vary fastest, square matrices the
    other way round, and rotary halves against rotary pairs.

    Args:
        plan: The plan.
        modules: Paths of target modules, nearest to the difference last.

    Yields:
        The variants that are alternatives to one another.
    """
    suspects = [
        e for e in plan.entries if e.kind == "parameter" and any(owner_path(t) in set(modules) for t in e.targets)
    ]
    first: dict[Key, PlanEntry] = {}
    for entry in suspects:
        first.setdefault(_family(entry), entry)
    families = sorted(first)
    members: dict[Key, list[PlanEntry]] = {family: [] for family in families}
    for entry in plan.entries:
        if _family(entry) in members:
            members[_family(entry)].append(entry)
    for family in families:
        if any(op.name in ("split", "concat") for op in members[family][0].operations):
            both = _with_companions(plan, members[family])
            yield [v for groups in _head_counts(members[family][0]) for v in _interleaved(both, groups)]
        flattened = _channels_last(members[family])
        if flattened is not None:
            yield [flattened]
    matrices = [members[family] for family in families if _is_matrix(first[family])]
    squares = [v for v in map(_turn, matrices) if v is not None]
    if squares:
        yield squares
    yield list(_rotary(plan, matrices))


def _family(entry: PlanEntry) -> Key:
    """What the entries of all blocks for one place have in common: their names without the numbers."""
    return ".".join(split_numbers(entry.targets[0])[0]), ".".join(split_numbers(entry.sources[0])[0])


def _is_matrix(entry: PlanEntry) -> bool:
    return len(entry.sources) == len(entry.targets) == 1 and len(entry.target_shapes[0]) == 2


def _with_companions(plan: TransferPlan, members: Sequence[PlanEntry]) -> list[PlanEntry]:
    """The entries of the same modules, biases included."""
    modules = {owner_path(t) for e in members for t in e.targets}
    return [e for e in plan.entries if modules.intersection(owner_path(t) for t in e.targets)]


def _head_counts(entry: PlanEntry) -> list[int]:
    """Numbers of groups of heads into which all parts can be cut: divisors of the smallest part."""
    parts = next(op for op in entry.operations if isinstance(op, (Split, Concat))).sizes
    least = min(parts)
    if any(size % least for size in parts):
        return []
    return [h for h in range(2, min(least, MAX_HEADS) + 1) if least % h == 0]


def _interleaved(members: Sequence[PlanEntry], groups: int) -> Iterator[Variant]:
    """Parts that alternate head by head instead of following one another: ``(h, 3, d)`` instead of ``(3, h, d)``.

    With grouped queries every group holds several query heads, one of keys and one of values.
    """
    entries = []
    for e in members:
        op = e.operations[0] if len(e.operations) == 1 else None
        if not isinstance(op, (Split, Concat)) or op.dim != 0:
            return
        least = min(op.sizes)
        if least % groups or any(size % least for size in op.sizes):
            return
        heads, width = tuple(size // least for size in op.sizes), least // groups
        whole = e.source_shapes[0] if isinstance(op, Split) else e.target_shapes[0]
        grouped, part, flat = (groups, sum(heads), width), (groups, -1, width), (-1,)
        if isinstance(op, Split):
            chain: tuple[Operation, ...] = (
                Reshape(whole, (*grouped, *whole[1:])),
                Split(1, heads),
                Reshape((*part, *whole[1:]), (*flat, *whole[1:])),
            )
        else:
            chain = (
                Reshape((*flat, *whole[1:]), (*part, *whole[1:])),
                Concat(1, heads),
                Reshape((*grouped, *whole[1:]), whole),
            )
        entries.append(replace(e, operations=chain, reason=BY_FUNCTION))
    yield Variant(tuple(entries), f"the parts alternate head by head, {groups} groups of heads")


def _channels_last(members: Sequence[PlanEntry]) -> Variant | None:
    """A flattened convolution whose channels vary fastest: patches cut as ``(h w c)`` instead of ``(c h w)``."""
    entries = []
    for e in members:
        if len(e.operations) != 1 or not isinstance(e.operations[0], Reshape):
            return None
        source, target = e.source_shapes[0], e.target_shapes[0]
        if source[0] != target[0]:
            return None  # a table, not a convolution
        if len(source) > 2 and len(target) == 2:
            order = (0, *range(2, len(source)), 1)
            moved = tuple(source[d] for d in order)
            chain: tuple[Operation, ...] = (Permute(order), Reshape(moved, target))
        elif len(source) == 2 and len(target) > 2:
            order = (0, len(target) - 1, *range(1, len(target) - 1))
            moved = (target[0], *target[2:], target[1])
            chain = (Reshape(source, moved), Permute(order))
        else:
            return None
        entries.append(replace(e, operations=chain, reason=BY_FUNCTION))
    return Variant(tuple(entries), f"{members[0].targets[0]}: channels vary fastest in the flattened convolution")


def _turn(members: Sequence[PlanEntry]) -> Variant | None:
    """A square matrix the other way round."""
    if any(e.source_shapes[0] != e.source_shapes[0][::-1] or len(e.sources) != 1 for e in members):
        return None
    entries = []
    for e in members:
        turned = any(isinstance(op, Transpose) for op in e.operations)
        rest = tuple(op for op in e.operations if not isinstance(op, Transpose))
        entries.append(replace(e, operations=rest if turned else (Transpose(), *rest)))
    return Variant(tuple(entries), f"{members[0].targets[0]} and its like are transposed")


def _rotary(plan: TransferPlan, matrices: Sequence[Sequence[PlanEntry]]) -> Iterator[Variant]:
    """Two projections whose rows stand as rotary pairs on one side and as rotary halves on the other."""
    plain = [members for members in matrices if not members[0].operations]
    plain.sort(key=lambda members: _by_label(members[0].targets[0]))
    for a, b in combinations(plain, 2):
        rows = min(members[0].target_shapes[0][0] for members in (a, b))
        both = [*_with_companions(plan, a), *_with_companions(plan, b)]
        if any(e.operations for e in both):
            continue
        for width in _head_widths(rows):
            if all(e.source_shapes[0] and e.source_shapes[0][0] % width == 0 for e in both):
                for halves in (True, False):
                    entries = tuple(_rotated(e, width, halves) for e in both)
                    yield Variant(entries, f"rotary {'halves' if halves else 'pairs'} of heads of {width}")


def _by_label(name: str) -> tuple[int, str]:
    """Queries and keys first: only their rows turn with the position."""
    label = owner_path(name).rpartition(".")[2].lower().lstrip("w_")
    return ("qk".find(label[:1]) % 3, name)


def _head_widths(rows: int) -> list[int]:
    return sorted(
        (w for w in range(4, min(rows, MAX_HEAD_WIDTH) + 1, 2) if rows % w == 0), key=lambda w: (w & (w - 1) != 0, -w)
    )


def _rotated(entry: PlanEntry, width: int, halves: bool) -> PlanEntry:
    shape = entry.source_shapes[0]
    heads, rest = shape[0] // width, shape[1:]
    inner = (width // 2, 2) if halves else (2, width // 2)
    split, joined = (heads, *inner, *rest), (heads, *inner[::-1], *rest)
    chain = (Reshape(shape, split), Permute((0, 2, 1, *range(3, len(split)))), Reshape(joined, shape))
    return replace(entry, operations=chain, reason=BY_FUNCTION)
