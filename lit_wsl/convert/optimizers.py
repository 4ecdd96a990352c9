"""Optimizer states for the new model: the states of the old parameters through the operations of the plan.

An optimizer is identified by the parameters that it holds, and so is a parameter group: the new run may list
its optimizers in another order, move parameters between them, split groups and join them.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_wsl.checkpoint.document import Leaf
from lit_wsl.convert.saved_optimizer import (
    REMEDY,
    Names,
    NewGroup,
    NewOrder,
    SavedOptimizer,
    Wins,
    assign_names,
    base_rate,
    differing,
    is_other_kind,
    keys_of_state,
    merge_settings,
    rate_keys,
)
from lit_wsl.convert.weights import Keep, NotCarriedError, carry_state
from lit_wsl.errors import CheckpointError, listed
from lit_wsl.plan.entries import PlanEntry
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import Shape

OnLost = Literal["refuse", "initialize"]

Place = tuple[int, int]
"""Number of the optimizer, number of the group."""


@dataclass(frozen=True)
class CarryOptions:
    """What the user decides about optimizers that are resumed."""

    # for each optimizer of the checkpoint the old names in index order, where they can't be inferred
    parameter_names: Sequence[Sequence[str] | None] | None = None
    # what to do where a state can't go through the operation of its parameter: ``"refuse"``, or ``"initialize"`` it as
    # that of a new parameter (it is left out, and the optimizer starts it at its first step)
    on_lost: OnLost = "refuse"
    settings: Wins = "checkpoint"  # whose weight decays, betas, ... hold where both sides differ
    schedule: Wins = "checkpoint"  # whose learning rates and schedulers hold


@dataclass(frozen=True)
class Carried:
    """Optimizers of the new run, with the states of the old one."""

    states: list[dict[str, Any]]  # their state dicts, in the new run's order
    notes: list[str]  # remarks for the report
    # for each of them and each of its groups the old group that its settings come from, if any
    origins: list[list[Place | None]]
    optimizers: list[SavedOptimizer]  # the saved optimizers


def convert_optimizers(
    saved: Sequence[Any],
    plan: TransferPlan,
    old_parameters: Mapping[str, Shape],
    new: NewOrder,
    *,
    options: CarryOptions | None = None,
    doubtful: Collection[str] = (),
    keep: Keep | None = None,
) -> Carried:
    """Convert ``optimizer_states`` of a checkpoint."""
    options = options or CarryOptions()
    optimizers = [SavedOptimizer.read(data, f"optimizer {number}") for number, data in enumerate(saved)]
    names, notes = assign_names(optimizers, old_parameters, options.parameter_names, doubtful)
    groups = new.groups
    if groups is not None and notes:
        _refuse_another_order(groups, new)
    owners = _owners(names)
    if groups is None:
        if len(optimizers) > 1:
            notes.append(
                "the new run's optimizers were taken to stand in the order of the old ones; give them to be sure"
            )
        groups = _layout(optimizers, names, owners, plan, new, old_parameters)
    carrier = _Carrier(optimizers, names, owners, groups, plan, old_parameters, options, notes)
    states = carrier.carry_states(keep)
    carrier.account_for()
    made, origins = [], []
    for number in range(len(groups)):
        origins.append([carrier.origin(number, position) for position in range(len(groups[number]))])
        made.append(carrier.assemble(number, origins[-1], states[number]))
    return Carried(made, notes, origins, optimizers)


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


def _owners(names: Sequence[Names]) -> dict[str, list[Place]]:
    """The optimizers and groups that hold each old parameter."""
    owners: dict[str, list[Place]] = {}
    for number, groups in enumerate(names):
        for group, members in enumerate(groups):
            for name in members:
                owners.setdefault(name, []).append((number, group))
    return owners


def _layout(
    optimizers: Sequence[SavedOptimizer],
    names: Sequence[Names],
    owners: Mapping[str, list[Place]],
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
    found: dict[Place, list[str]] = {}
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


def _entry_owners(entry: PlanEntry, owners: Mapping[str, list[Place]]) -> list[Place]:
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


def _groups(owners: Sequence[Place]) -> str:
    return ", ".join(f"group {group} of optimizer {number}" for number, group in owners) or "in no optimizer"


States = list[dict[str, dict[str, Any]]]
"""For each optimizer of the new run: name -> the state of the parameter."""


@dataclass
class _Carrier:
    """Everything that is known about optimizers on both sides, while the states go over."""

    optimizers: Sequence[SavedOptimizer]
    names: Sequence[Names]
    owners: Mapping[str, list[Place]]
    groups: Sequence[Sequence[NewGroup]]
    plan: TransferPlan
    shapes: Mapping[str, Shape]
    options: CarryOptions
    notes: list[str]
    lost: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = [
            {name: i for group, found in zip(optimizer.groups, names) for i, name in zip(group.indices, found)}
            for optimizer, names in zip(self.optimizers, self.names)
        ]
        self.holders: dict[str, list[int]] = {}
        for number, group_list in enumerate(self.groups):
            for name in _members(group_list):
                self.holders.setdefault(name, []).append(number)
        self._partners: dict[tuple[int, frozenset[int]], int] = {}

    # -- which old optimizer a new one continues ------------------------------------------------------------------

    def partner(self, number: int, source: str) -> int | None:
        """The old optimizer whose state of a parameter the new optimizer takes."""
        candidates = frozenset(owner for owner, _ in self.owners.get(source, ()))
        if len(candidates) < 2:
            return next(iter(candidates), None)
        if (number, candidates) not in self._partners:
            self._partners[number, candidates] = self._choose(number, candidates)
        return self._partners[number, candidates]

    def _choose(self, number: int, candidates: frozenset[int]) -> int:
        """Of old optimizers that share a parameter: that of the same kind which holds the same parameters."""
        mine = set(_members(self.groups[number]))
        ranked: dict[int, tuple[bool, float]] = {}
        for old in sorted(candidates):
            theirs = {t for e in self.plan.entries if any(s in self.index[old] for s in e.sources) for t in e.targets}
            same = not any(
                is_other_kind(a.settings, b.settings)
                for a in self.optimizers[old].groups[:1]
                for b in self.groups[number][:1]
                if b.settings is not None
            )
            ranked[old] = (same, len(mine & theirs) / max(len(mine | theirs), 1))
        best = [old for old in ranked if ranked[old] == max(ranked.values())]
        if len(best) == 1 or number in best:
            return best[0] if len(best) == 1 else number
        raise CheckpointError(
            f"optimizers {', '.join(map(str, best))} of the checkpoint share parameters, and which of them the run's "
            f"optimizer {number} continues is not known. List them in the order of the old run."
        )

    # -- states ------------------------------------------------------------------------------------------------------

    def carry_states(self, keep: Keep | None) -> States:
        """The states of the new parameters; what cannot be carried is noted in ``lost``."""
        made: States = [{} for _ in self.groups]
        for entry in self.plan.entries:
            takers: dict[tuple[int | None, ...], list[int]] = {}
            for number in sorted({n for target in entry.targets for n in self.holders.get(target, ())}):
                takers.setdefault(tuple(self.partner(number, source) for source in entry.sources), []).append(number)
            for partners, numbers in takers.items():
                carried = self._carry(entry, partners, keep)
                for number in numbers:
                    mine = {t: s for t, s in zip(entry.targets, carried) if number in self.holders.get(t, ())}
                    made[number].update(mine)
        return made

    def _carry(self, entry: PlanEntry, partners: Sequence[int | None], keep: Keep | None) -> list[dict[str, Any]]:
        held = [
            self.optimizers[partner].state.get(self.index[partner][source]) if partner is not None else None
            for partner, source in zip(partners, entry.sources)
        ]
        if not any(held):
            return []
        wide = {key: value for p in partners if p is not None for key, value in self.optimizers[p].wide.items()}
        try:
            lacking = next((s for s, state in zip(entry.sources, held) if not state), None)
            if lacking is not None:
                raise NotCarriedError(f"{lacking!r}, which becomes a part of it, has no state (frozen?)")
            shapes = [self.shapes[source] for source in entry.sources]
            return carry_state(entry, [state or {} for state in held], shapes, keep, wide)
        except NotCarriedError as error:
            self.lost.update(dict.fromkeys(entry.targets, str(error)))
            return []

    def account_for(self) -> None:
        """Refuse where a state is lost; note what nothing in the new run trains, and what starts anew."""
        entries: dict[str, list[PlanEntry]] = {}
        for entry in self.plan.entries:
            for source in entry.sources:
                entries.setdefault(source, []).append(entry)
        removed, untrained = [], []
        for old, index in enumerate(self.index):
            for source, position in index.items():
                if not self.optimizers[old].state.get(position):
                    continue
                targets = [target for entry in entries.get(source, ()) for target in entry.targets]
                holders = {number for target in targets for number in self.holders.get(target, ())}
                if not targets:
                    removed.append(source)
                elif not holders:
                    untrained.append(source)
                elif all(self.partner(number, source) != old for number in holders):
                    self.lost.setdefault(
                        targets[0],
                        f"optimizer {old} of the checkpoint has a state of {source!r} that no optimizer of the new run "
                        "takes",
                    )
        if self.lost and self.options.on_lost == "refuse":
            name, why = next(iter(self.lost.items()))
            raise CheckpointError(
                f"the optimizer's state of {name!r} cannot be carried: {why}"
                f"{f' ({len(self.lost) - 1} more parameters likewise)' if len(self.lost) > 1 else ''}. Start these "
                "states anew (on_lost='initialize', --on-lost initialize), or convert the weights only."
            )
        self.notes += [f"optimizer state starts anew for {name}: {why}" for name, why in self.lost.items()]
        trained = list(dict.fromkeys(name for group_list in self.groups for name in _members(group_list)))
        waited = [
            name
            for name in trained
            if name in self.plan.by_target
            and name not in self.lost
            and not any(s in self.owners for s in self.plan.by_target[name].sources)
        ]
        gone, anew = "optimizer states of {} parameters that", "optimizer state starts anew for {} parameters"
        for told, names in (
            (f"{gone} the new model does not have are left out", removed),
            (f"{gone} no optimizer of the new run holds (frozen?) are left out", untrained),
            (f"{anew} without a source", [name for name in trained if name not in self.plan.by_target]),
            (f"{anew} that no optimizer of the checkpoint holds (frozen?)", waited),
        ):
            if names:
                self.notes.append(f"{told.format(len(names))}: {listed(names)}")

    # -- groups ------------------------------------------------------------------------------------------------------

    def _sources(self, number: int, position: int) -> dict[Place, str]:
        """The old groups that the parameters of a new one come from, and the first of these parameters."""
        found: dict[Place, str] = {}
        for name in self.groups[number][position].names:
            entry = self.plan.by_target.get(name)
            for source in entry.sources if entry else ():
                partner = self.partner(number, source)
                for place in self.owners.get(source, ()):
                    if place[0] == partner:
                        found.setdefault(place, name)
        return found

    def origin(self, number: int, position: int) -> Place | None:
        """The old group whose settings hold for a new one."""
        group = self.groups[number][position]
        places = self._sources(number, position)
        if not places:  # nothing in it comes from the checkpoint
            standing = number < len(self.optimizers) and len(self.groups[number]) == len(self.optimizers[number].groups)
            if group.settings is None or (not group.names and standing):
                return (min(number, len(self.optimizers) - 1), position) if self.optimizers else None
            return None
        first = next(iter(places))
        for other in places:
            if group.settings is not None:
                told_apart = is_other_kind(self._settings(other), group.settings)
                if told_apart is not None:
                    raise CheckpointError(
                        f"optimizer {other[0]} of the checkpoint, which has the state of {places[other]!r}, is of "
                        f"another kind than the new run's optimizer {number}: its groups have {told_apart[0]}, the "
                        f"new ones {told_apart[1]}. Use the same optimizer, or transfer the weights only "
                        "(resume='weights')."
                    )
            self._refuse_contradictions(number, position, places, other)
        return first

    def _refuse_contradictions(self, number: int, position: int, places: Mapping[Place, str], other: Place) -> None:
        first = next(iter(places))
        chosen, theirs = self._settings(first), self._settings(other)
        rates = rate_keys(chosen, theirs)
        told = self.groups[number][position].settings is not None
        for side, option, keys in (
            (self.options.settings, "optimizer_settings", (set(chosen) | set(theirs)) - rates),
            (self.options.schedule, "schedule", (set(chosen) | set(theirs)) & rates),
        ):
            odd = differing(chosen, theirs, keys)
            if odd and (side == "checkpoint" or not told):
                key = odd[0]
                raise CheckpointError(
                    f"group {position} of the new run's optimizer {number} joins parameters of the old groups "
                    f"{first[1]} ({places[first]!r}, ...) and {other[1]} ({places[other]!r}, ...), whose settings "
                    f"differ: {key} is {chosen.get(key)} and {theirs.get(key)}. Keep the groups as they were, or take "
                    f"the new run's own ({option}='run')."
                )

    def _settings(self, place: Place) -> Mapping[str, Any]:
        return self.optimizers[place[0]].groups[place[1]].settings

    def assemble(
        self, number: int, origins: Sequence[Place | None], states: Mapping[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Put states and settings together under the new indices, as ``Optimizer.state_dict`` would."""
        partners = list(dict.fromkeys(place[0] for place in origins if place is not None))
        olds = [self.optimizers[partner] for partner in partners]
        by_name = any(isinstance(index, str) for old in olds for index in old.indices)
        named = any(saved.names for old in olds for saved in old.groups)
        state: dict[Hashable, Any] = {}
        made = []
        start = 0
        for position, group in enumerate(self.groups[number]):
            settings = dict(self._merged(number, position, origins[position]))
            self._refuse_other_states(number, group, settings, states)
            keys: list[Hashable] = list(group.names) if by_name else list(range(start, start + len(group.names)))
            start += len(group.names)
            state.update({key: states[name] for key, name in zip(keys, group.names) if name in states})
            settings["params"] = keys
            if named:
                settings["param_names"] = list(group.names)
            made.append(settings)
        rest = olds[0].rest if len(olds) == 1 else {}
        left = sorted({str(key) for old in olds for key in old.rest}) if len(olds) > 1 else []
        if left:
            self.notes.append(f"{', '.join(left)} of the optimizers that optimizer {number} joins are left out")
        return {"state": state, "param_groups": made, **rest}

    def _merged(self, number: int, position: int, origin: Place | None) -> Mapping[str, Any]:
        new = self.groups[number][position].settings
        if origin is None:
            return new or {}
        saved = self._settings(origin)
        self._name_differences(number, position, saved, new)
        merged = merge_settings(saved, new, self.options.settings, self.options.schedule)
        fixed = self.groups[number][position].constants & set(new or {})
        return {**merged, **{key: (new or {})[key] for key in fixed}} if fixed else merged

    def _refuse_other_states(
        self, number: int, group: NewGroup, settings: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Refuse states that lack what the new optimizer keeps, or belong to one that keeps something else."""
        known: dict[int, frozenset[str] | None] = {}
        for name in group.names:
            state = states.get(name)
            if group.optimizer is None or group.settings is None or not state:
                continue
            dimensions = max((len(v.shape) for v in state.values() if isinstance(v, Leaf)), default=0)
            if dimensions not in known:
                whole = {**group.settings, **settings}
                known[dimensions] = keys_of_state(group.optimizer, whole, dimensions)
            wanted = known[dimensions]
            if wanted is None:
                continue
            lacking, foreign = wanted - set(state), set(map(str, state)) - wanted
            partner = self.partner(number, self.plan.by_target[name].sources[0])
            old = self.optimizers[partner].groups[0].settings if partner is not None else {}
            other = set(old) ^ set(group.settings) - rate_keys(old, group.settings) - {"params", "param_names"}
            if lacking or (foreign and other):
                raise CheckpointError(
                    f"{type(group.optimizer).__name__} keeps {sorted(wanted) or 'nothing'} for a parameter such as "
                    f"{name!r}, with the settings of the {self.options.settings}, and the checkpoint has "
                    f"{sorted(state)}: its optimizer is of another kind, or a setting makes it one. Use the same "
                    "optimizer and settings (optimizer_settings='checkpoint'), or transfer the weights only "
                    "(resume='weights')."
                )

    def _name_differences(
        self, number: int, position: int, saved: Mapping[str, Any], new: Mapping[str, Any] | None
    ) -> None:
        """A setting that the new run asks for and the old one had differently is named."""
        names = self.groups[number][position].names
        if new is None or not names:
            return
        where = f"optimizer {number}, group {position} ({names[0]}, ...)"
        fixed = self.groups[number][position].constants
        for key in differing(saved, new, set(saved) & fixed):
            self.notes.append(
                f"{where}: {key} is {saved[key]} in the checkpoint and {new[key]} in the run, as only its code can say"
            )
        foreign = sorted(set(saved) - set(new) - rate_keys(saved, new) - fixed)
        if foreign:
            self.notes.append(
                f"{where}: {', '.join(foreign)} is no setting of the run's optimizer: if the old one was of another "
                "kind, its moments mean something else (then take resume='weights')"
            )
        common = (set(saved) & set(new)) - rate_keys(saved, new) - fixed
        for key in differing(saved, new, common):
            self.notes.append(told(where, key, saved[key], new[key], self.options.settings, "optimizer_settings"))
        if differing({"lr": base_rate(saved)}, {"lr": base_rate(new)}, ("lr",)):
            self.notes.append(told(where, "lr", base_rate(saved), base_rate(new), self.options.schedule, "schedule"))


def told(where: str, key: str, old: Any, new: Any, side: Wins, option: str) -> str:
    """The sentence for a setting that differs: both values, which one counts, and how to have the other."""
    other: Wins = "run" if side == "checkpoint" else "checkpoint"
    whose = {"checkpoint": "the checkpoint's", "run": "the run's"}
    return (
        f"{where}: {key} is {old} in the checkpoint and {new} in the run; {whose[side]} counts ({option}={other!r} "
        f"takes {whose[other]})"
    )


def _members(groups: Iterable[NewGroup]) -> list[str]:
    return [name for group in groups for name in group.names]
