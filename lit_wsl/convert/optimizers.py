"""Optimizer states for the new model: the states of the old parameters through the operations of the plan."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

from lit_wsl.convert.optimizer_names import REMEDY, Names, assign_names
from lit_wsl.convert.optimizer_state import Keep, NotCarriedError, carry_state
from lit_wsl.convert.saved_optimizer import (
    NewGroup,
    NewOrder,
    SavedOptimizer,
    refuse_other_optimizer,
    same_settings,
)
from lit_wsl.errors import CheckpointError
from lit_wsl.plan.entries import PlanEntry
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import Shape

OnLost = Literal["refuse", "initialize"]


def convert_optimizers(
    saved: Sequence[Any],
    plan: TransferPlan,
    old_parameters: Mapping[str, Shape],
    new: NewOrder,
    *,
    groups: Sequence[Sequence[NewGroup]] | None = None,
    parameter_names: Sequence[Sequence[str]] | None = None,
    on_lost: OnLost = "refuse",
    keep: Keep | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Convert ``optimizer_states`` of a checkpoint.

    Args:
        saved: The state dict of each optimizer.
        plan: From the old model's tensors to the new model's.
        old_parameters: Names and shapes of the old model's parameters, in registration order, tied ones once.
        new: The new model's parameters.
        groups: The groups of the new run's optimizers; without them each new parameter goes to the group of its source,
            in registration order.
        parameter_names: For each saved optimizer the old names in index order, where they can't be inferred.
        on_lost: What to do where a state can't go through the operation of its parameter: ``"refuse"``, or
            ``"initialize"`` it as that of a new parameter (it is left out, and the optimizer starts it at its first
            step).
        keep: What to hold of each value of a state, see :func:`~lit_wsl.convert.optimizer_state.carry_state`.

    Returns:
        The new state dicts, and remarks for the report.

    Raises:
        CheckpointError: If the states cannot be carried; the message says which, why, and what to do.
    """
    optimizers = [SavedOptimizer.read(data, f"optimizer {number}") for number, data in enumerate(saved)]
    names, notes = assign_names(optimizers, old_parameters, parameter_names)
    if groups is not None and notes:
        _refuse_another_order(groups, new)
    owners = _owners(names)
    layout = groups if groups is not None else _layout(optimizers, names, owners, plan, new, old_parameters)
    if len(layout) != len(optimizers):
        raise CheckpointError(
            f"the checkpoint has {len(optimizers)} optimizers and the new run {len(layout)}; their states belong to "
            "each other by position, so both must have as many."
        )
    lost: dict[str, str] = {}
    made = []
    for number, (optimizer, group_list) in enumerate(zip(optimizers, layout)):
        states = _states(optimizer, names[number], plan, old_parameters, lost, keep)
        made.append(_assemble(optimizer, number, names[number], owners, group_list, states, plan))
    if lost and on_lost == "refuse":
        name, why = next(iter(lost.items()))
        raise CheckpointError(
            f"the optimizer's state of {name!r} cannot be carried: {why}"
            f"{f' ({len(lost) - 1} more parameters likewise)' if len(lost) > 1 else ''}. Start these states anew "
            "(on_lost='initialize', --on-lost initialize), or convert the weights only."
        )
    notes += [f"optimizer state starts anew for {name}: {why}" for name, why in lost.items()]
    fresh = [n for g in layout for group in g for n in group.names if n not in plan.by_target]
    if fresh:
        notes.append(f"optimizer state starts anew for {len(fresh)} parameters without a source: {_some(fresh)}")
    return made, notes


def _refuse_another_order(groups: Sequence[Sequence[NewGroup]], new: NewOrder) -> None:
    """Where the new run gives parameters in an order of its own, the old one did so too, and order tells nothing."""
    place = {name: number for number, name in enumerate(new.names)}
    for number, group_list in enumerate(groups):
        for position, group in enumerate(group_list):
            places = [place[name] for name in group.names if name in place]
            if places != sorted(places):
                raise CheckpointError(
                    f"the parameters in group {position} of the run's optimizer {number} are not in the order of the "
                    "model. If those of the old run were not either, its states cannot be told apart by their order. "
                    + REMEDY
                )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


Owner = tuple[int, int]  # number of the optimizer, number of the group


def _owners(names: Sequence[Names]) -> dict[str, list[Owner]]:
    """The optimizers and groups that hold each old parameter."""
    owners: dict[str, list[Owner]] = {}
    for number, groups in enumerate(names):
        for group, members in enumerate(groups):
            for name in members:
                owners.setdefault(name, []).append((number, group))
    return owners


def _layout(
    optimizers: Sequence[SavedOptimizer],
    names: Sequence[Names],
    owners: Mapping[str, list[Owner]],
    plan: TransferPlan,
    new: NewOrder,
    old_parameters: Mapping[str, Shape],
) -> list[list[NewGroup]]:
    """Give each new parameter the groups of its sources, in the new model's order."""
    place = {name: number for number, name in enumerate(old_parameters)}
    for number, groups in enumerate(names):
        for members in groups:
            if [place[name] for name in members] != sorted(place[name] for name in members):
                raise CheckpointError(
                    f"the parameters of optimizer {number} were not given in the order of the model, so the order in "
                    "the new run is not known either. Give the new run's optimizers (inside a run: "
                    'WeightTransferCallback(..., resume="all")).'
                )
    complete = all(name in owners for name in old_parameters)
    single = len(optimizers) == 1 and len(optimizers[0].groups) == 1
    found: dict[Owner, list[str]] = {}
    for name in new.names:
        entry = plan.by_target.get(name)
        if entry is None:
            if name in new.frozen:
                continue
            if not single or not (complete or new.known):
                raise CheckpointError(
                    f"{name!r} has no source, so it is not known which parameter group of the new run's optimizers "
                    "has it, if any. Give the new run's optimizers (inside a run: "
                    'WeightTransferCallback(..., resume="all")).'
                )
            found.setdefault((0, 0), []).append(name)
            continue
        for owner in _entry_owners(entry, owners):
            found.setdefault(owner, []).append(name)
    return [
        [NewGroup(tuple(found.get((number, group), ()))) for group in range(len(optimizer.groups))]
        for number, optimizer in enumerate(optimizers)
    ]


def _entry_owners(entry: PlanEntry, owners: Mapping[str, list[Owner]]) -> list[Owner]:
    """The groups that all sources of an entry are in."""
    of_each = [owners.get(source, []) for source in entry.sources]
    for source, found in zip(entry.sources, of_each):
        if found != of_each[0]:
            raise CheckpointError(
                f"{entry.targets[0]!r} is made from {entry.sources[0]!r} and {source!r}, which are in different "
                f"parameter groups ({_groups(of_each[0])}; {_groups(found)}), so its settings are not known. "
                "Give the new run's optimizers, or convert the weights only."
            )
    return of_each[0]


def _groups(owners: Sequence[Owner]) -> str:
    return ", ".join(f"group {group} of optimizer {number}" for number, group in owners) or "in no optimizer"


def _states(
    optimizer: SavedOptimizer,
    names: Names,
    plan: TransferPlan,
    shapes: Mapping[str, Shape],
    lost: dict[str, str],
    keep: Keep | None,
) -> dict[str, dict[str, Any]]:
    """The states of the new parameters by name; what cannot be carried is noted in ``lost``."""
    index = {n: i for group, found in zip(optimizer.groups, names) for i, n in zip(group.indices, found)}
    made: dict[str, dict[str, Any]] = {}
    for entry in plan.entries:
        held = [optimizer.state.get(index[source]) if source in index else None for source in entry.sources]
        if not any(held):
            continue
        try:
            lacking = next((s for s, state in zip(entry.sources, held) if not state), None)
            if lacking is not None:
                raise NotCarriedError(f"{lacking!r}, which becomes a part of it, has no state (frozen?)")
            states = carry_state(entry, [state or {} for state in held], [shapes[s] for s in entry.sources], keep)
        except NotCarriedError as error:
            lost.update(dict.fromkeys(entry.targets, str(error)))
            continue
        made.update(zip(entry.targets, states))
    return made


def _assemble(
    optimizer: SavedOptimizer,
    number: int,
    names: Names,
    owners: Mapping[str, list[Owner]],
    groups: Sequence[NewGroup],
    states: Mapping[str, dict[str, Any]],
    plan: TransferPlan,
) -> dict[str, Any]:
    """Put states and settings together under the new indices, as ``Optimizer.state_dict`` would."""
    by_name = any(isinstance(index, str) for index in optimizer.indices)
    state: dict[Hashable, Any] = {}
    made = []
    start = 0
    for position, group in enumerate(groups):
        settings = dict(_settings(optimizer, number, position, group, owners, plan, len(groups)))
        keys: list[Hashable] = list(group.names) if by_name else list(range(start, start + len(group.names)))
        start += len(group.names)
        state.update({key: states[name] for key, name in zip(keys, group.names) if name in states})
        settings["params"] = keys
        if any(saved.names for saved in optimizer.groups):
            settings["param_names"] = list(group.names)
        made.append(settings)
    return {"state": state, "param_groups": made, **optimizer.rest}


def _settings(
    optimizer: SavedOptimizer,
    number: int,
    position: int,
    group: NewGroup,
    owners: Mapping[str, list[Owner]],
    plan: TransferPlan,
    count: int,
) -> Mapping[str, Any]:
    """The settings of a new group: those of the old group that its parameters come from."""
    origins: dict[int, str] = {}
    for name in group.names:
        entry = plan.by_target.get(name)
        for source in entry.sources if entry else ():
            for owner, found in owners.get(source, []):
                if owner == number:
                    origins.setdefault(found, name)
    if not origins:  # nothing in it comes from the checkpoint
        if group.settings is not None and (group.names or count != len(optimizer.groups)):
            return group.settings
        return optimizer.groups[min(position, len(optimizer.groups) - 1)].settings
    first = next(iter(origins))
    chosen = optimizer.groups[first]
    other = next((o for o in origins if not same_settings(optimizer.groups[o], chosen)), None)
    if other is not None:
        raise CheckpointError(
            f"group {position} of the new run's optimizer {number} joins parameters of the old groups {first} "
            f"({origins[first]!r}, ...) and {other} ({origins[other]!r}, ...), whose settings differ. Keep the groups "
            "as they were, or convert the weights only."
        )
    refuse_other_optimizer(optimizer, chosen, group)
    return chosen.settings
