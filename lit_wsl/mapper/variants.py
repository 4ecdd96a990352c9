"""Ways in which a plan could be otherwise: for what it left open, every order of modules and of parts.

What else names and shapes can't see is in :mod:`lit_wsl.mapper.layout_variants`. Every variant concerns a whole family
of tensors at once: if the parts of one block stand in the order k, q, v, they do so in every block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from lit_wsl.mapper.names import split_numbers
from lit_wsl.mapper.shapes import join_axis, operations_between
from lit_wsl.mapper.tree import owner_path, role_of
from lit_wsl.structure.info import Shape
from lit_wsl.transfer.operations import Concat, Operation, Split
from lit_wsl.transfer.plan import Ambiguity, PlanEntry, TransferPlan

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
    """For each set of ambiguous targets that share candidates, the ways to assign them.

    Args:
        plan: The plan with its ambiguities.

    Yields:
        The variants of one question, the most likely first.
    """
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
