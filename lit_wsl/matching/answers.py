"""Plans before a judge and after: what entries fill and what decided them, and the entries that were found."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lit_wsl.matching.entries import cast_between
from lit_wsl.plan.entries import Ambiguity, Candidate, PlanEntry
from lit_wsl.plan.operations import run_operations
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription

BY_LOSS = "the loss on data decides it"
ORDER_MARGIN = 0.25  # more than what order alone gives
STILL_OPEN = "the loss on data does not decide between the candidates"


def answered(
    plan: TransferPlan,
    answers: Sequence[PlanEntry],
    sides: tuple[ModelDescription, ModelDescription],
    *,
    open_: Collection[str] = (),
    reason: str = BY_LOSS,
    refuted: str = "the loss refutes it",
) -> TransferPlan:
    """The plan with the entries that a judge has found, but for targets that it leaves open."""
    source, target = sides
    before = {e.targets: e for e in plan}
    taken: list[PlanEntry] = []
    notes: list[str] = []
    for entry in answers:
        if set(entry.targets).intersection(open_):
            continue
        known = before.get(entry.targets)
        if known is not None and what_it_does(known) == what_it_does(entry):
            taken.append(known)
            continue
        if known is not None:
            notes.append(f"replaced, since {refuted}: {known.sources[0]} -> {entry.targets[0]}")
        cast = cast_between(source[entry.sources[0]], target[entry.targets[0]])
        taken.append(replace(entry, operations=(*entry.operations, *cast), reason=reason))
    filled = {t for e in taken for t in e.targets}
    asked = {t for e in answers for t in e.targets}
    kept = [e for e in plan if not filled.union(asked).intersection(e.targets)]
    entries = [*kept, *taken]
    filled, used = {t for e in entries for t in e.targets}, {s for e in entries for s in e.sources}
    place = {info.name: info.index for info in target.parameters}
    listed = {t for a in plan.ambiguous for t in a.targets} | filled
    doubts = tuple(
        Ambiguity(e.targets, (Candidate(e.sources, 1.0, e.operations),), e.target_shapes[0], STILL_OPEN)
        for e in answers
        if set(e.targets).intersection(open_) and not listed.intersection(e.targets)
    )
    shown = notes if len(notes) <= 3 else [*notes[:3], f"and {len(notes) - 3} more like these"]
    return replace(
        plan,
        entries=tuple(sorted(entries, key=lambda e: place.get(e.targets[0], 0))),
        ambiguous=(*(a for a in plan.ambiguous if not set(a.targets) <= filled), *doubts),
        unmatched_target=tuple(u for u in plan.unmatched_target if u.name not in filled),
        unmatched_source=tuple(u for u in plan.unmatched_source if u.name not in used),
        notes=(*plan.notes, *shown),
    )


def what_it_does(entry: PlanEntry | None) -> object:
    """What an entry does, without a change of data type."""
    return entry and (entry.sources, entry.targets, tuple(op for op in entry.operations if op.name != "cast"))


def is_only_renamed(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> bool:
    """Whether every parameter stands where it stood and nothing is done to any: the same code under other names."""
    whole = [e for e in plan if e.kind == "parameter"]
    if plan.ambiguous or any(op.name not in ("cast", "fan_out") for e in whole for op in e.operations):
        return False
    sides = [[i for i in side.parameters if i.kind == "parameter"] for side in (source, target)]
    places = [source[e.sources[0]].index for e in whole]
    return len(whole) == len(sides[0]) == len(sides[1]) and places == sorted(places)


def filled(entry: PlanEntry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an entry puts into the model, by name."""
    values = run_operations(entry.operations, [tensors[s] for s in entry.sources])
    return {n: v.reshape(s).contiguous() for n, v, s in zip(entry.targets, values, entry.target_shapes)}


def is_doubtful(entry: PlanEntry) -> bool:
    """Whether nothing but order decided an entry."""
    return entry.margin <= ORDER_MARGIN
