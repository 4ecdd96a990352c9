"""The weights of a conversion: a state dict through the operations of a plan, each tensor with memory of its own."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lit_wsl.checkpoint.reader import Checkpoint
from lit_wsl.checkpoint.records import as_mapping
from lit_wsl.convert.optimizer_state import own_memory
from lit_wsl.convert.saved_optimizer import NewOrder
from lit_wsl.errors import CheckpointError, PlanError
from lit_wsl.plan.file import registration_order
from lit_wsl.plan.operations import run_operations
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure import describe
from lit_wsl.structure.description import Shape


def old_parameters(checkpoint: Mapping[str, Tensor], plan: TransferPlan) -> dict[str, Shape]:
    """Names and shapes of the old model's parameters, in registration order, tied ones once.

    What the plan knows to be a buffer, from the model that it was matched with, goes before what is inferred.
    """
    kinds = {u.name: u.kind for u in plan.unmatched_source}
    kinds.update((source, entry.kind) for entry in plan.entries for source in entry.sources)
    inferred = describe(checkpoint).parameters
    return {info.name: info.shape for info in inferred if kinds.get(info.name, info.kind) != "buffer"}


def doubtful_parameters(checkpoint: Mapping[str, Tensor], plan: TransferPlan) -> frozenset[str]:
    """Those of the old parameters that may be buffers: the tensors of modules of which the new model has nothing.

    Class weights of a loss look like a bias; that it is no parameter only the old code could tell.
    """
    used = {source for entry in plan.entries for source in entry.sources}
    used.update(source for a in plan.ambiguous for candidate in a.candidates for source in candidate.sources)
    alive = {name.rpartition(".")[0] for name in used}
    return frozenset(name for name in old_parameters(checkpoint, plan) if name.rpartition(".")[0] not in alive)


def new_order(plan: TransferPlan, target: nn.Module | None = None) -> NewOrder:
    """The order in which the new model registers its parameters.

    Without the model it is worked out from the plan, and accepted only if the fingerprint of the target, a hash over
    all names and shapes in order, proves it.

    Raises:
        CheckpointError: If the plan alone does not tell.
    """
    if target is not None:
        gradients = {name: p.requires_grad for name, p in target.named_parameters(remove_duplicate=False)}
        names = [info.name for info in describe(target).parameters if info.kind == "parameter"]
        return NewOrder(tuple(names), frozenset(n for n in names if not gradients.get(n, True)), known=True)
    proven = proven_order(plan)
    if proven is not None:
        return NewOrder(tuple(name for name, kind in proven if kind == "parameter"))
    raise CheckpointError(
        "the order in which the new model registers its parameters, which is that of the optimizer's states, does not "
        "follow from the plan alone (it was edited, or some parameters have no source). Give the new model: "
        "target=..., or --model on the command line; or convert the weights only (weights_only=True, --weights-only)."
    )


def proven_order(plan: TransferPlan) -> list[tuple[str, str]] | None:
    """Names and kinds of the target's tensors in registration order, if the plan's fingerprint proves them."""
    known: list[tuple[str, Shape, str]] = [
        (name, shape, entry.kind) for entry in plan.entries for name, shape in zip(entry.targets, entry.target_shapes)
    ]
    loose = [(u.name, u.shape, str(u.kind)) for u in plan.unmatched_target]
    loose += [(name, a.shape, "parameter") for a in plan.ambiguous for name in a.targets]
    for listed in (known + loose, loose + known):
        by_module = [listed[i] for i in registration_order([name for name, _, _ in listed])]
        for candidate in (by_module, listed):
            digest = hashlib.sha256()
            for name, shape, _ in candidate:
                digest.update(f"{name}\0{shape}\0".encode())
            if digest.hexdigest() == plan.target.fingerprint:
                return [(name, kind) for name, _, kind in candidate]
    return None


Progress = Callable[[int, int], None]


"""Called with the number of entries done and their total."""


def convert_weights(
    checkpoint: Checkpoint, plan: TransferPlan, *, target: nn.Module | None = None, progress: Progress | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The new model's state dict, in its order, and remarks.

    Raises:
        PlanError: If the plan does not fit.
    """
    notes: list[str] = []
    ordered, fresh, missing = whole_state(convert_tensors(checkpoint, plan, target, progress), plan, target)
    if fresh:
        notes.append(f"{len(fresh)} tensors of the new model have no source and its own fresh values: {_some(fresh)}")
    if missing:
        notes.append(
            f"{len(missing)} tensors of the new model are not in the new checkpoint, so it loads with strict=False "
            f"(Lightning: strict_loading=False): {_some(missing)}"
        )
    notes += _left_over(checkpoint, plan)
    state: dict[str, Any] = OrderedDict(ordered)
    moved = {e.sources[0].rpartition(".")[0]: e.targets[0].rpartition(".")[0] for e in plan.entries}
    for name, value in checkpoint.extra.items():  # the extra state of a module moves with it
        module, dot, leaf = str(name).rpartition(".")
        state[f"{moved[module]}{dot}{leaf}" if dot and module in moved else name] = value
    state._metadata = _metadata(checkpoint, moved, target)  # type: ignore[attr-defined]
    return state, notes


def whole_state(
    filled: Mapping[str, Tensor], plan: TransferPlan, target: nn.Module | None
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Put converted tensors in the new model's order, under tied names too, and what has no source beside them.

    Args:
        filled: What the plan made, from the weights or from a copy of some of them.
        plan: The plan.
        target: The new model, where it is known.

    Returns:
        The tensors; the names of those whose values are the target's own; those that have no value, since there is no
        target or it is on the meta device.

    Raises:
        PlanError: If the target lacks a name.
    """
    if target is None:
        proven = proven_order(plan)
        names = [name for name, _ in proven] if proven is not None else list(filled)
        missing = [u.name for u in plan.unmatched_target] + [n for a in plan.ambiguous for n in a.targets]
        return {name: filled[name] for name in names if name in filled}, [], missing
    described = describe(target)
    strange = next((name for name in filled if name not in described), None)
    if strange is not None:
        raise PlanError(f"the plan fills {strange!r}, which {described.label} does not have; make a new plan.")
    state: dict[str, Tensor] = {}
    fresh, lacking = [], []
    for name, tensor in target.state_dict(keep_vars=True).items():
        first = described.tied.get(name, name)
        if first in filled:
            state[name] = filled[first]
        elif not isinstance(tensor, Tensor) or nn.parameter.is_lazy(tensor) or tensor.is_meta:
            lacking.append(name)
        else:
            state[name] = state[first] if first in state else tensor.detach().clone()
            fresh.append(name)
    return state, fresh, lacking


def _left_over(checkpoint: Checkpoint, plan: TransferPlan) -> list[str]:
    """Say which tensors of the checkpoint are unused; what the plan does not know came since it was made."""
    used = {source for entry in plan.entries for source in entry.sources}
    known = {u.name for u in plan.unmatched_source}
    known.update(source for a in plan.ambiguous for candidate in a.candidates for source in candidate.sources)
    tied = describe(checkpoint).tied
    left = [name for name in checkpoint if tied.get(name, name) not in used and name not in used]
    strange = [name for name in left if name not in known]
    notes = [f"{len(left)} tensors of the checkpoint are not used: {_some(left)}"] if left else []
    if strange and (plan.unmatched_source or plan.source.fingerprint):
        notes.append(f"the plan was made for another checkpoint: it does not know {_some(strange)}")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _metadata(checkpoint: Checkpoint, moved: Mapping[str, str], target: nn.Module | None) -> Any:
    """The versions of the modules, which ``load_state_dict`` asks for, under the new names."""
    if target is not None:
        return getattr(target.state_dict(keep_vars=True), "_metadata", OrderedDict())
    nest: Any = checkpoint.document()
    for key in checkpoint.prefix:
        nest = (as_mapping(nest) or {}).get(key)
    old = getattr(nest, "_metadata", None) or {}
    return OrderedDict((moved.get(module, module), version) for module, version in old.items())


def convert_tensors(
    tensors: Mapping[str, Tensor],
    plan: TransferPlan,
    target: nn.Module | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Run the plan's operations on a state dict; each result has memory of its own.

    Raises:
        PlanError: If a source is missing or has another shape than planned.
    """
    live = dict(target.state_dict(keep_vars=True)) if target is not None else {}
    made: dict[str, Tensor] = {}
    for number, entry in enumerate(plan.entries, 1):
        label = f"entry {number} ({', '.join(entry.sources[:3])} -> {', '.join(entry.targets[:3])})"
        values = []
        for position, name in enumerate(entry.sources):
            if name not in tensors:
                raise PlanError(f"{label}: the checkpoint has no tensor {name!r}; make a new plan, or edit the entry.")
            value = tensors[name]
            planned = entry.source_shapes[position] if entry.source_shapes else tuple(value.shape)
            if tuple(value.shape) != tuple(planned):
                raise PlanError(
                    f"{label}: {name!r} has shape {tuple(value.shape)} in the checkpoint, but the plan was made for "
                    f"{tuple(planned)}; make a new plan, or edit the entry."
                )
            values.append(value)
        present: list[Tensor] = []
        if any(operation.needs_target for operation in entry.operations):
            if any(not isinstance(live.get(name), Tensor) or live[name].is_meta for name in entry.targets):
                raise PlanError(f"{label}: {entry.badge} needs the target's present values; give the target model.")
            present = [live[name].detach() for name in entry.targets]
        try:
            results = run_operations(entry.operations, values, present)
        except PlanError as error:
            raise PlanError(f"{label}: {error}") from error
        if len(results) != len(entry.targets):
            raise PlanError(f"{label}: its operations give {len(results)} tensors for {len(entry.targets)} targets.")
        for name, result in zip(entry.targets, results):
            if name in made:
                raise PlanError(f"{label}: {name!r} is filled by two entries; remove one.")
            made[name] = own_memory(result, shared=len(results) > 1)
        if progress is not None:
            progress(number, len(plan.entries))
    return made
