"""A saved optimizer taken apart: what the values of its states are, and which parameter has which index.

An optimizer's file numbers its parameters and names none. The numbers run through the groups in the order in which the
user gave the parameters, normally that of ``model.parameters()``, within each group. Where the file has ``param_names``
these decide; otherwise an assignment is accepted only if it is the one and only that keeps the order within every group
and agrees with the states' shapes.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_wsl.checkpoint.document import Leaf, materialize
from lit_wsl.errors import CheckpointError
from lit_wsl.structure.description import Shape
from lit_wsl.structure.families import prefixes

NOTHING: Mapping[str, Any] = MappingProxyType({})

Wins = Literal["checkpoint", "run"]
"""Whose word counts where a checkpoint and the run that resumes it say different things."""


@dataclass(frozen=True)
class SavedGroup:
    """One parameter group of a saved optimizer."""

    # the keys of its parameters in the state, in order: numbers, or names in files of sharded strategies
    indices: tuple[Hashable, ...]
    settings: Mapping[str, Any]  # learning rate and all else
    names: tuple[str, ...] | None = None  # ``param_names``, if the file has them


@dataclass(frozen=True)
class SavedOptimizer:
    """One optimizer's state dict, taken apart."""

    label: str  # what to call it in messages
    state: Mapping[Hashable, Mapping[str, Any]]  # index -> the state of one parameter
    groups: tuple[SavedGroup, ...]  # its parameter groups
    rest: Mapping[str, Any]  # what else is in the state dict
    # key of a state -> whether it has more than one element for some parameter; empty where none has
    wide: Mapping[str, bool]

    @classmethod
    def read(cls, data: Any, label: str) -> SavedOptimizer:
        """Take a state dict apart."""
        if not isinstance(data, Mapping) or not {"state", "param_groups"} <= set(data):
            raise CheckpointError(f"{label} is not the state of a torch optimizer: no 'state' and 'param_groups'.")
        state, groups = data["state"], data["param_groups"]
        well_formed = isinstance(state, Mapping) and isinstance(groups, (list, tuple))
        if not well_formed or not all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups):
            raise CheckpointError(f"{label} is not the state of a torch optimizer: its groups are of another form.")
        if not all(isinstance(s, Mapping) for s in state.values()):
            raise CheckpointError(f"{label} is not the state of a torch optimizer: its states are of another form.")
        return cls(
            label,
            state,
            tuple(
                SavedGroup(
                    tuple(group["params"]),
                    {k: materialize(v) for k, v in group.items() if k not in ("params", "param_names")},
                    tuple(group["param_names"]) if group.get("param_names") else None,
                )
                for group in groups
            ),
            {k: v for k, v in data.items() if k not in ("state", "param_groups")},
            _wide_keys(state.values()),
        )

    @property
    def indices(self) -> tuple[Hashable, ...]:
        """All indices in order."""
        return tuple(index for group in self.groups for index in group.indices)

    def fits(self, index: Hashable, shape: Shape) -> bool:
        """Whether a parameter of this shape can have the state under an index."""
        return fits(self.state.get(index), shape, self.wide)


def _tensors(state: Mapping[str, Any]) -> dict[str, Leaf]:
    return {key: value for key, value in state.items() if isinstance(value, Leaf)}


def _wide_keys(states: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """Which keys hold one value per weight: of a parameter of one element alone nobody can tell."""
    largest: dict[str, int] = {}
    for state in states:
        for key, value in _tensors(state).items():
            largest[key] = max(largest.get(key, 0), value.numel())
    return {key: size > 1 for key, size in largest.items()} if max(largest.values(), default=0) > 1 else {}


def kind_of(key: str, value: Any, shape: Shape, wide: bool | None = None) -> str | None:
    """What a value of a parameter's state is, inferred from its shape and the parameter's.

    Returns:
        ``"same"`` (one value per weight, as Adam's moments), ``"row"`` or ``"column"`` (means over the last axis or the
        one before, as Adafactor's; a ``"*"`` is added where the axis is kept with length 1), ``"scalar"``, ``"plain"``
        (no tensor), or ``None`` for anything else.

    >>> import torch
    >>> kind_of("exp_avg", torch.zeros(4, 2), (4, 2)), kind_of("row_var", torch.zeros(4, 1), (4, 2))
    ('same', 'row*')
    >>> kind_of("exp_avg", torch.zeros(1), (), wide=True) is None  # the moment of another parameter
    True
    """
    if not isinstance(value, Leaf):
        return "plain" if value is None or isinstance(value, (bool, int, float, str)) else None
    own = tuple(value.shape)
    if key == "step" or wide is False:
        return "scalar" if value.numel() == 1 else None
    if own == tuple(shape):
        return "same"
    if len(shape) >= 2:
        *batch, rows, columns = shape
        forms = {
            "row*": (*batch, rows, 1),
            "column*": (*batch, 1, columns),
            "row": (*batch, rows),
            "column": (*batch, columns),
        }
        fitting = [form for form, expected in forms.items() if own == expected]
        if len(fitting) > 1:  # square matrices: only the name can tell
            fitting = [f for f in fitting if ("row" in key) == f.startswith("row") and ("row" in key) != ("col" in key)]
        if len(fitting) == 1:
            return fitting[0]
    return "scalar" if value.numel() == 1 and not wide else None


def fits(state: Mapping[str, Any] | None, shape: Shape, wide: Mapping[str, bool] = NOTHING) -> bool:
    """Whether a parameter of this shape can have this state; a parameter without state fits anything."""
    if not state:
        return True
    kinds = {kind_of(key, value, shape, wide.get(key)) for key, value in _tensors(state).items()}
    if "same" in kinds or None in kinds:
        return "same" in kinds
    factors = kinds - {"scalar"}  # they come in pairs; a vector's moment is no row factor of a matrix
    return factors in (set(), {"row", "column"}, {"row*", "column*"})


_RATES = frozenset(  # what schedulers and averaging write into groups
    {"lr", "initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
)
_NO_SETTINGS = frozenset({"params", "param_names"})


@dataclass(frozen=True)
class NewGroup:
    """A parameter group of the new model's optimizer."""

    names: tuple[str, ...]  # its parameters in order
    settings: Mapping[str, Any] | None = None  # its settings in the new run, ``None`` where no optimizer is at hand
    optimizer: Optimizer | None = field(default=None, repr=False, compare=False)  # the optimizer, where it is at hand

    @property
    def constants(self) -> frozenset[str]:
        """The new run's settings in any case: names of groups, and what the optimizer's class fixes."""
        if self.optimizer is None or self.settings is None:
            return frozenset()
        fixed = frozenset(self.optimizer.defaults) - frozenset(inspect.signature(type(self.optimizer)).parameters)
        return fixed | {k for k, v in self.settings.items() if isinstance(v, str) and k not in self.optimizer.defaults}


@dataclass(frozen=True)
class NewOrder:
    """The new model's parameters, in registration order, tied ones once."""

    names: tuple[str, ...]
    frozen: frozenset[str] = frozenset()  # those that don't require gradients, where that is known
    known: bool = False  # whether frozen parameters are known at all (a model was given)
    groups: Sequence[Sequence[NewGroup]] | None = None  # the groups of the new run's optimizers, where these are known


def rate_keys(*groups: Mapping[str, Any]) -> frozenset[str]:
    """The settings that a schedule writes: learning rates, and momenta where it cycles them."""
    cycled = {"momentum", "betas"} if any("max_momentum" in group for group in groups) else set()
    return _RATES | cycled


def base_rate(settings: Mapping[str, Any]) -> Any:
    """The learning rate that was asked for, before a schedule changed it."""
    return settings.get("initial_lr", settings.get("lr"))


def differing(first: Mapping[str, Any], second: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Those of some settings, sorted, whose values differ; tensors are compared by value."""
    missing = object()

    def plain(value: Any) -> Any:
        value = value.tolist() if isinstance(value, Tensor) else value
        return list(value) if isinstance(value, (list, tuple)) else value

    return sorted(key for key in keys if plain(first.get(key, missing)) != plain(second.get(key, missing)))


def merge_settings(
    saved: Mapping[str, Any], new: Mapping[str, Any] | None, settings: Wins, schedule: Wins
) -> Mapping[str, Any]:
    """A resumed group's settings: rates as the schedule, others as chosen, and what only the new run knows."""
    if new is None:
        return saved
    rates = rate_keys(saved, new)
    rest, rate = (new if settings == "run" else saved), (new if schedule == "run" else saved)
    return {
        **{key: value for key, value in rest.items() if key not in rates},
        **{key: value for key, value in rate.items() if key in rates},
        **{key: value for key, value in new.items() if key not in saved and key not in rates},
    }


def is_other_kind(saved: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]] | None:
    """Settings that only the saved optimizer knows, and only the new one; ``None`` if both are of one kind."""
    internal = rate_keys(saved, new) | _NO_SETTINGS
    old_only, new_only = set(saved) - set(new) - internal, set(new) - set(saved) - internal
    return (sorted(old_only), sorted(new_only)) if old_only and new_only else None


def keys_of_state(optimizer: Optimizer, settings: Mapping[str, Any], dimensions: int) -> frozenset[str] | None:
    """What an optimizer keeps for a parameter after a step of its small twin; ``None`` if it makes none."""
    parameter = nn.Parameter(torch.ones((2,) * dimensions))
    parameter.grad = torch.ones_like(parameter)
    twin = object.__new__(type(optimizer))
    twin.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
    twin.__dict__.update({key: OrderedDict() for key in vars(optimizer) if key.endswith("_hooks")})
    twin.state = defaultdict(dict)
    twin.param_groups = [{**settings, "params": [parameter]}]
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            twin.step()
    except Exception:
        return None
    return frozenset(map(str, twin.state[parameter]))


def groups_of(optimizers: Sequence[Optimizer], model: nn.Module) -> list[list[NewGroup]]:
    """The parameter groups of real optimizers, by name."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    made = []
    for number, optimizer in enumerate(optimizers):
        found = []
        for position, group in enumerate(optimizer.param_groups):
            if any(id(parameter) not in names for parameter in group["params"]):
                raise CheckpointError(
                    f"group {position} of optimizer {number} ({type(optimizer).__name__}) holds a tensor that is no "
                    "parameter of the model, so its state cannot be told."
                )
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            found.append(NewGroup(tuple(names[id(parameter)] for parameter in group["params"]), settings, optimizer))
        made.append(found)
    return made


MAX_STEPS = 300_000  # of the search for an assignment

REMEDY = (
    "Say which parameter has which index with parameter_names (one list of names per optimizer, in index order), or "
    "save the optimizer with named parameters (torch.optim.AdamW(model.named_parameters()))."
)

Names = tuple[tuple[str, ...], ...]


def assign_names(
    optimizers: Sequence[SavedOptimizer],
    parameters: Mapping[str, Shape],
    given: Sequence[Sequence[str] | None] | None = None,
    doubtful: Collection[str] = (),
) -> tuple[list[Names], list[str]]:
    """For each optimizer and group the parameters' names in order, and remarks for the report."""
    if given is not None and len(given) != len(optimizers):
        raise CheckpointError(
            f"parameter_names gives names for {len(given)} optimizers, but the checkpoint has {len(optimizers)}."
        )
    known: dict[int, Names] = {}
    for number, optimizer in enumerate(optimizers):
        _refuse_joint_state(optimizer)
        told = given[number] if given is not None else None
        names = _cut(optimizer, list(told)) if told is not None else _written_names(optimizer, parameters)
        if names is not None:
            _check_shapes(optimizer, names, parameters)
            known[number] = names
    open_ones = [number for number in range(len(optimizers)) if number not in known]
    if not open_ones:
        return [known[number] for number in range(len(optimizers))], []
    taken = {name for names in known.values() for group in names for name in group}
    free = {name: shape for name, shape in parameters.items() if name not in taken}
    chosen = [optimizers[number] for number in open_ones]
    remark = "which parameter has which index in the optimizer was inferred from the order and the shapes"
    total = sum(len(o.indices) for o in chosen)
    try:
        if total <= len(free):
            found = _infer(chosen, free)
        else:  # optimizers that share parameters
            found = [_infer([optimizer], parameters)[0] for optimizer in chosen]
    except CheckpointError:
        sure = {name: shape for name, shape in free.items() if name not in doubtful}
        if len(sure) == len(free) or total != len(sure):
            raise
        found = _infer(chosen, sure)
        remark += f", taking {', '.join(name for name in free if name in doubtful)} for buffers"
    known.update(zip(open_ones, found))
    return [known[number] for number in range(len(optimizers))], [remark]


def _refuse_joint_state(optimizer: SavedOptimizer) -> None:
    """LBFGS keeps vectors over all its parameters, one after another, under the first of them."""
    states = [state for state in optimizer.state.values() if state]
    if len(states) != 1 or not any(isinstance(value, (list, tuple)) for value in states[0].values()):
        return
    raise CheckpointError(
        f"{optimizer.label} keeps one state for all its parameters together ({', '.join(map(str, states[0]))}), as "
        "LBFGS does. It cannot follow single parameters to a new model. Transfer the weights alone (resume='weights'; "
        "convert with weights_only=True, --weights-only): the optimizer then gathers its history anew."
    )


def _cut(optimizer: SavedOptimizer, names: list[str]) -> Names:
    """Cut a list of names at the groups."""
    if len(names) != len(optimizer.indices):
        raise CheckpointError(
            f"{optimizer.label} has {len(optimizer.indices)} parameters, but parameter_names gives {len(names)}."
        )
    rest = iter(names)
    return tuple(tuple(islice(rest, len(group.indices))) for group in optimizer.groups)


def _written_names(optimizer: SavedOptimizer, parameters: Mapping[str, Shape]) -> Names | None:
    """The names that the file itself gives, under the prefix that they have in the checkpoint."""
    if all(isinstance(index, str) for index in optimizer.indices) and optimizer.indices:
        groups: Names = tuple(tuple(map(str, group.indices)) for group in optimizer.groups)
    elif all(group.names is not None and len(group.names) == len(group.indices) for group in optimizer.groups):
        groups = tuple(group.names or () for group in optimizer.groups)
    else:
        return None
    listed = [name for group in groups for name in group]
    if not listed or all(name in parameters for name in listed):
        return groups
    fitting = list(prefixes(listed, parameters))
    if len(fitting) != 1:
        lacking = next(name for name in listed if name not in parameters)
        raise CheckpointError(
            f"{optimizer.label} names its parameters ({lacking!r}, ...), but the weights in the file have no parameter "
            f"of this name, nor {'one prefix' if fitting else 'a prefix'} that all names lack. {REMEDY}"
        )
    return tuple(tuple(fitting[0] + name for name in group) for group in groups)


def _check_shapes(optimizer: SavedOptimizer, names: Names, parameters: Mapping[str, Shape]) -> None:
    for group, found in zip(optimizer.groups, names):
        for index, name in zip(group.indices, found):
            if name not in parameters:
                raise CheckpointError(f"{optimizer.label}: {name!r} is no parameter of the weights in the file.")
            if not optimizer.fits(index, parameters[name]):
                raise CheckpointError(_misfit(optimizer, index, name, parameters[name]))


def _misfit(optimizer: SavedOptimizer, index: Hashable, name: str, shape: Shape) -> str:
    tensors = _tensors(optimizer.state.get(index, {}))
    shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
    return (
        f"{optimizer.label}: the state with index {index} ({shapes}) does not belong to {name!r} of shape "
        f"{tuple(shape)}. {REMEDY}"
    )


def _infer(optimizers: Sequence[SavedOptimizer], parameters: Mapping[str, Shape]) -> list[Names]:
    """Find the one assignment that keeps the order within every group and agrees with all shapes."""
    names, shapes = list(parameters), list(parameters.values())
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.groups]
    total = sum(len(group.indices) for _, group in groups)
    label = " and ".join(optimizer.label for optimizer in optimizers)
    if total > len(names):
        raise CheckpointError(
            f"{label} has {total} parameters, but the weights in the file only {len(names)}. {REMEDY}"
        )
    if len(groups) == 1 and total == len(names):  # nothing to search, and a better message
        optimizer, group = groups[0]
        for index, name, shape in zip(group.indices, names, shapes):
            if not optimizer.fits(index, shape):
                raise CheckpointError(_misfit(optimizer, index, name, shape))
        return [(tuple(names),)]
    owners = _search(groups, shapes, total, label, names)
    found: list[list[str]] = [[] for _ in groups]
    for name, owner in zip(names, owners):
        if owner >= 0:
            found[owner].append(name)
    rest = iter(found)
    return [tuple(map(tuple, islice(rest, len(optimizer.groups)))) for optimizer in optimizers]


Place = tuple[int, ...]


def _search(
    groups: Sequence[tuple[SavedOptimizer, SavedGroup]],
    shapes: Sequence[Shape],
    total: int,
    label: str,
    names: Sequence[str],
) -> list[int]:
    """Give each parameter its group, or -1 for none, if there is exactly one way to do so.

    Dynamic programming over the parameters in order; a place says how many indices of each group are used up. First
    backward, to keep the places from which the end can be reached; then forward along the only way.
    """
    lengths = tuple(len(group.indices) for _, group in groups)
    cache: dict[tuple[int, int, Shape], bool] = {}

    def fitting(group: int, index: int, shape: Shape) -> bool:
        key = (group, index, shape)
        if key not in cache:
            optimizer, saved = groups[group]
            cache[key] = optimizer.fits(saved.indices[index], shape)
        return cache[key]

    def moves(place: Place, at: int) -> list[tuple[int, Place]]:
        possible = []
        if total - sum(place) < len(shapes) - at:  # more parameters than indices are left: this one may have none
            possible.append((-1, place))
        for group, used in enumerate(place):
            if used < lengths[group] and fitting(group, used, tuple(shapes[at])):
                possible.append((group, (*place[:group], used + 1, *place[group + 1 :])))
        return possible

    layers: list[dict[Place, None]] = [{(0,) * len(groups): None}]
    steps = 0
    for at in range(len(shapes)):
        reached: dict[Place, None] = {}
        for place in layers[-1]:
            possible = moves(place, at)
            reached.update((after, None) for _, after in possible)
            steps += len(possible)
        if steps > MAX_STEPS:
            raise CheckpointError(f"{label}: too many assignments of indices to parameters fit. {REMEDY}")
        layers.append(reached)
    alive = {lengths} & set(layers[-1])
    if not alive:
        raise CheckpointError(
            f"{label}: no assignment of its {total} indices to the {len(shapes)} parameters of the weights in the file "
            f"keeps the order of the parameters within every group and fits the shapes of the states. {REMEDY}"
        )
    good: list[set[Place]] = [alive]
    for at in range(len(shapes) - 1, -1, -1):
        good.append({place for place in layers[at] if any(after in good[-1] for _, after in moves(place, at))})
    good.reverse()
    owners: list[int] = []
    here: Place = (0,) * len(groups)
    for at in range(len(shapes)):
        open_moves = [(group, after) for group, after in moves(here, at) if after in good[at + 1]]
        if len(open_moves) > 1:
            ways = " or ".join(_way(group, here, groups) for group, _ in open_moves[:3])
            raise CheckpointError(
                f"{label}: which parameter has which index is not unique: {names[at]!r} of shape {tuple(shapes[at])} "
                f"may be {ways}. {REMEDY}"
            )
        owner, here = open_moves[0]
        owners.append(owner)
    return owners


def _way(group: int, place: Place, groups: Sequence[tuple[SavedOptimizer, SavedGroup]]) -> str:
    if group < 0:
        return "left out (frozen)"
    optimizer, saved = groups[group]
    number = next(n for n, other in enumerate(optimizer.groups) if other is saved)
    return f"index {saved.indices[place[group]]} in group {number} of {optimizer.label}"
