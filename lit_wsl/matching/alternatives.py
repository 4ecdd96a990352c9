"""Layouts that keep every shape and change the meaning, as ways in which a plan could be otherwise.

The alternatives to the conventions of :mod:`lit_wsl.matching.layouts`, and square matrices the other way round. Names
and shapes can't see them, so they are proposed where the functions of the models were seen to part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

from lit_wsl.matching.shapes import join_axis, operations_between
from lit_wsl.matching.tree import owner_path, role_of
from lit_wsl.matching.words import split_numbers
from lit_wsl.plan.entries import Ambiguity, PlanEntry
from lit_wsl.plan.operations import Concat, Operation, Permute, Reshape, Split, Transpose
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import Shape

MAX_ROLES = 4


BY_FUNCTION = "both models compute the same with it"  # the reason of an entry that a trial decided


@dataclass(frozen=True)
class Variant:
    """Entries to add to a plan, or to put in place of those with the same targets."""

    entries: tuple[PlanEntry, ...]
    reason: str

    def apply(self, plan: TransferPlan) -> TransferPlan:
        """The plan with these entries; their targets are no longer ambiguous or unmatched."""
        targets = {t for e in self.entries for t in e.targets}
        sources = {s for e in self.entries for s in e.sources}
        kept = tuple(e for e in plan.entries if not targets.intersection(e.targets))
        return replace(
            plan,
            entries=(*kept, *self.entries),
            ambiguous=tuple(a for a in plan.ambiguous if not targets.intersection(a.targets)),
            unmatched_target=tuple(u for u in plan.unmatched_target if u.name not in targets),
            unmatched_source=tuple(u for u in plan.unmatched_source if u.name not in sources),
        )


def _pattern(name: str) -> str:
    """The module of a tensor with the numbers of the modules around it left out."""
    above, _, own = owner_path(name).rpartition(".")
    return ".".join((*split_numbers(above)[0], own))


def open_questions(plan: TransferPlan) -> Iterator[list[Variant]]:
    """For each set of ambiguous targets that share candidates, the ways to assign them."""
    shapes = {u.name: u.shape for u in plan.unmatched_source}
    groups: dict[frozenset[str], list[Ambiguity]] = {}
    for a in plan.ambiguous:
        key = frozenset(owner_path(s) for c in a.candidates for s in c.sources)
        groups.setdefault(key, []).append(a)
    questions: dict[tuple[str, ...], list[list[Ambiguity]]] = {}
    for members in groups.values():
        roles = tuple(sorted({_pattern(a.targets[0]) for a in members}))
        questions.setdefault(roles, []).append(members)
    for roles in sorted(questions):
        blocks = questions[roles]
        variants = [*_whole_and_parts(blocks, shapes), *_exchanges(blocks, shapes)]
        if variants:
            yield variants


def _exchanges(blocks: Sequence[list[Ambiguity]], shapes: dict[str, Shape]) -> list[Variant]:
    """Assign the target modules of each block to its candidate modules in every order, the same in all blocks."""
    variants: list[Variant] = []
    first_t, first_s = _sides(blocks[0])
    if not 1 <= len(first_t) <= MAX_ROLES or len(first_s) < len(first_t) or len(first_s) > MAX_ROLES + 1:
        return []
    for order in permutations(range(len(first_s)), len(first_t)):
        entries: list[PlanEntry] | None = []
        for block in blocks:
            targets, sources = _sides(block)
            if len(targets) != len(first_t) or len(sources) != len(first_s):
                entries = None
                break
            for k, target in enumerate(targets):
                found = _pair_modules(block, target, sources[order[k]], shapes)
                entries = None if found is None or entries is None else [*entries, *found]
            if entries is None:
                break
        if entries:
            pairs = ", ".join(f"{first_s[order[k]]} -> {t}" for k, t in enumerate(first_t))
            variants.append(Variant(tuple(entries), pairs))
    return variants


def _sides(block: Sequence[Ambiguity]) -> tuple[list[str], list[str]]:
    targets = list(dict.fromkeys(owner_path(a.targets[0]) for a in block))
    sources = list(dict.fromkeys(sorted(owner_path(s) for a in block for c in a.candidates for s in c.sources)))
    return targets, sources


def _pair_modules(
    block: Sequence[Ambiguity], target: str, source: str, shapes: dict[str, Shape]
) -> list[PlanEntry] | None:
    """Entries from one module to another, tensor by tensor; ``None`` if a tensor finds no partner."""
    entries = []
    for a in (a for a in block if owner_path(a.targets[0]) == target):
        names = [n for n in shapes if owner_path(n) == source]
        same = [n for n in names if role_of(n) == role_of(a.targets[0])] or (names if len(names) == 1 else [])
        operations = operations_between(shapes[same[0]], a.shape) if same else None
        if operations is None:
            return None
        entries.append(_entry((same[0],), a.targets, operations, (shapes[same[0]],), (a.shape,)))
    return entries


def _whole_and_parts(blocks: Sequence[list[Ambiguity]], shapes: dict[str, Shape]) -> list[Variant]:
    """One module on one side, several on the other: every order of the parts."""
    variants: list[Variant] = []
    targets, sources = _sides(blocks[0])
    if len(targets) == 1 and 2 <= len(sources) <= MAX_ROLES:
        count, join = len(sources), True
    elif len(sources) == 1 and 2 <= len(targets) <= MAX_ROLES:
        count, join = len(targets), False
    else:
        return []
    for order in permutations(range(count)):
        entries: list[PlanEntry] = []
        for block in blocks:
            entries += _fused(block, order, join, shapes) or []
        if entries:
            parts = sources if join else targets
            variants.append(Variant(tuple(entries), f"parts in the order {', '.join(parts[i] for i in order)}"))
    return variants


def _fused(block: Sequence[Ambiguity], order: Sequence[int], join: bool, shapes: dict[str, Shape]) -> list[PlanEntry]:
    targets, sources = _sides(block)
    parts, whole = (sources, targets[0]) if join else (targets, sources[0])
    shape_t = {a.targets[0]: a.shape for a in block}
    wholes = [n for n in (shape_t if join else shapes) if owner_path(n) == whole]
    entries = []
    for name in wholes:
        pool = shapes if join else shape_t
        members = [
            next((n for n in pool if owner_path(n) == parts[i] and role_of(n) == role_of(name)), "") for i in order
        ]
        if not all(members):
            continue
        whole_shape = (shape_t if join else shapes)[name]
        found = join_axis(whole_shape, [pool[m] for m in members])
        if found is None or found[1]:
            continue
        sizes = tuple(pool[m][found[0]] for m in members)
        if join:
            op: Operation = Concat(found[0], sizes)
            entries.append(_entry(members, (name,), (op,), [pool[m] for m in members], (whole_shape,)))
        else:
            op = Split(found[0], sizes)
            entries.append(_entry((name,), members, (op,), (whole_shape,), [pool[m] for m in members]))
    return entries


def _entry(
    sources: Sequence[str],
    targets: Sequence[str],
    operations: tuple[Operation, ...],
    source_shapes: Sequence[Shape],
    target_shapes: Sequence[Shape],
) -> PlanEntry:
    return PlanEntry(
        tuple(sources),
        tuple(targets),
        operations,
        tuple(source_shapes),
        tuple(target_shapes),
        reason=BY_FUNCTION,
    )


MAX_HEADS = 128


MAX_HEAD_WIDTH = 256


Key = tuple[str, str]


def layout_variants(plan: TransferPlan, modules: Sequence[str]) -> Iterator[list[Variant]]:
    """For the entries into modules just before a difference: the other layouts that they could have.

    Interleaved heads of a fused projection, flattened convolutions whose channels vary fastest, square matrices the
    other way round, and rotary halves against rotary pairs.
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
