"""From two descriptions to a plan."""

from __future__ import annotations

from lit_wsl.mapper.options import MatchingOptions
from lit_wsl.structure.info import ModelDescription
from lit_wsl.transfer.plan import PlanEntry, SideSummary, TransferPlan, Unmatched


def build_plan(
    source: ModelDescription, target: ModelDescription, options: MatchingOptions | None = None
) -> TransferPlan:
    """Match two models by structure, order, shape and names, and write down what would be loaded.

    Args:
        source: The checkpoint's side.
        target: The model's side.
        options: How to match.

    Returns:
        The plan; deterministic, and made without tensor data.
    """
    options = options or MatchingOptions()
    entries = tuple(
        PlanEntry((t.name,), (t.name,), (), (t.shape,), (t.shape,), t.kind, reason="same name and shape")
        for t in target.parameters
        if t.name in source.by_name
        and source.by_name[t.name].shape == t.shape
        and not (options.buffers == "exclude" and t.kind == "buffer")
    )
    used = {name for entry in entries for name in entry.sources}
    return TransferPlan(
        entries=entries,
        source=SideSummary.of(source),
        target=SideSummary.of(target),
        unmatched_source=tuple(
            Unmatched(i.name, i.shape, i.kind, "no target of this shape is free")
            for i in source.parameters
            if i.name not in used
        ),
        unmatched_target=tuple(
            Unmatched(i.name, i.shape, i.kind, "no source of this shape is free")
            for i in target.parameters
            if i.name not in used
        ),
        options=options.to_dict(),
    )
