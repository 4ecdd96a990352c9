"""The way back: a plan that takes the model's tensors to the checkpoint's."""

from __future__ import annotations

from dataclasses import replace

from lit_wsl.errors import PlanError
from lit_wsl.transfer.plan import PlanEntry, TransferPlan


def reverse_entry(entry: PlanEntry) -> PlanEntry:
    """The entry that undoes an entry.

    Raises:
        PlanError: If one of its operations changes values or rounds.
    """
    lost = [op.name for op in entry.operations if not op.lossless]
    if lost:
        raise PlanError(
            f"the entry for {entry.targets[0]!r} cannot be reversed, since {lost[0]} changes values; "
            "remove the entry, or match the other way round."
        )
    try:
        operations = tuple(operation.reverse() for operation in reversed(entry.operations))
    except PlanError as error:
        raise PlanError(f"the entry for {entry.targets[0]!r} cannot be reversed: {error}") from error
    return replace(
        entry,
        sources=entry.targets,
        targets=entry.sources,
        operations=operations,
        source_shapes=entry.target_shapes,
        target_shapes=entry.source_shapes,
    )


def reverse_plan(plan: TransferPlan) -> TransferPlan:
    """Reverse every entry of a plan, in the same order.

    What was ambiguous is not decided by turning around: its targets become sources that go nowhere.

    Raises:
        PlanError: If an entry has no inverse, or two entries use one source (each tensor can be filled only once).
    """
    for source, users in plan.by_source.items():
        if len(users) > 1:
            raise PlanError(
                f"{source!r} is used by {len(users)} entries (for {users[0].targets[0]!r} and "
                f"{users[1].targets[0]!r}), so the way back would fill it twice; join them with fan_out, or remove one."
            )
    return replace(
        plan,
        entries=tuple(map(reverse_entry, plan.entries)),
        source=plan.target,
        target=plan.source,
        ambiguous=(),
        unmatched_source=plan.unmatched_target,
        unmatched_target=plan.unmatched_source,
        notes=(*plan.notes, *(f"left out as ambiguous: {', '.join(a.targets)}" for a in plan.ambiguous)),
    )
