"""A saved optimizer taken apart, and what the values of its states are, told by their shapes."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_wsl.checkpoint.document import LazyTensor, materialize
from lit_wsl.errors import CheckpointError
from lit_wsl.structure.description import Shape

NOTHING: Mapping[str, Any] = MappingProxyType({})

Wins = Literal["checkpoint", "run"]
"""Whose word counts where a checkpoint and the run that resumes it say different things."""


@dataclass(frozen=True)
class SavedGroup:
    """One parameter group of a saved optimizer.

    Attributes:
        indices: The keys of its parameters in the state, in order: numbers, or names in files of sharded strategies.
        settings: Learning rate and all else.
        names: ``param_names``, if the file has them.
    """

    indices: tuple[Hashable, ...]
    settings: Mapping[str, Any]
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SavedOptimizer:
    """One optimizer's state dict, taken apart.

    Attributes:
        label: What to call it in messages.
        state: Index -> the state of one parameter.
        groups: Its parameter groups.
        rest: What else is in the state dict.
        wide: Key of a state -> whether it has more than one element for some parameter; empty where none has.
    """

    label: str
    state: Mapping[Hashable, Mapping[str, Any]]
    groups: tuple[SavedGroup, ...]
    rest: Mapping[str, Any]
    wide: Mapping[str, bool]

    @classmethod
    def read(cls, data: Any, label: str) -> SavedOptimizer:
        """Take a state dict apart.

        Raises:
            CheckpointError: If it is not that of a ``torch.optim.Optimizer``.
        """
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


def _wide_keys(states: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """Which keys hold one value per weight: of a parameter of one element alone nobody can tell."""
    largest: dict[str, int] = {}
    for state in states:
        for key, value in state.items():
            if isinstance(value, (Tensor, LazyTensor)):
                largest[key] = max(largest.get(key, 0), value.numel())
    return {key: size > 1 for key, size in largest.items()} if max(largest.values(), default=0) > 1 else {}


def kind_of(key: str, value: Any, shape: Shape, wide: bool | None = None) -> str | None:
    """What a value of a parameter's state is, told by its shape against the parameter's.

    Args:
        key: Its key in the state.
        value: The value.
        shape: The parameter's shape.
        wide: Whether this key has more than one element for some parameter of the optimizer, where that is known.

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
    if not isinstance(value, (Tensor, LazyTensor)):
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
    tensors = {key: value for key, value in state.items() if isinstance(value, (Tensor, LazyTensor))}
    kinds = {kind_of(key, value, shape, wide.get(key)) for key, value in tensors.items()}
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
    """A parameter group of the new model's optimizer.

    Attributes:
        names: Its parameters in order.
        settings: Its settings in the new run, ``None`` where no optimizer is at hand.
        optimizer: The optimizer, where it is at hand.
    """

    names: tuple[str, ...]
    settings: Mapping[str, Any] | None = None
    optimizer: Optimizer | None = field(default=None, repr=False, compare=False)

    @property
    def constants(self) -> frozenset[str]:
        """Settings that are the new run's in any case.

        Those that the optimizer's class fixes, as AdamW that its weight decay is decoupled, and names of groups.
        """
        if self.optimizer is None or self.settings is None:
            return frozenset()
        fixed = frozenset(self.optimizer.defaults) - frozenset(inspect.signature(type(self.optimizer)).parameters)
        return fixed | {k for k, v in self.settings.items() if isinstance(v, str) and k not in self.optimizer.defaults}


@dataclass(frozen=True)
class NewOrder:
    """The new model's parameters, in registration order, tied ones once.

    Attributes:
        names: All of them.
        frozen: Those that don't require gradients, where that is known.
        known: Whether frozen parameters are known at all (a model was given).
        groups: The groups of the new run's optimizers, where these are known.
    """

    names: tuple[str, ...]
    frozen: frozenset[str] = frozenset()
    known: bool = False
    groups: Sequence[Sequence[NewGroup]] | None = None


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
    """The settings of a group that is resumed: rates as the schedule, all else as the settings are chosen.

    What only the new run knows, such as a mark that its own code reads, stays.
    """
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
    """What tells two optimizers apart, Adam's state meaning nothing to SGD: the settings that only one of them knows.

    Returns:
        What only the saved one has, and what only the new one; ``None`` if they are of one kind.
    """
    internal = rate_keys(saved, new) | _NO_SETTINGS
    old_only, new_only = set(saved) - set(new) - internal, set(new) - set(saved) - internal
    return (sorted(old_only), sorted(new_only)) if old_only and new_only else None


def keys_of_state(optimizer: Optimizer, settings: Mapping[str, Any], dimensions: int) -> frozenset[str] | None:
    """What an optimizer keeps for a parameter after its first step: its twin makes that step with a small one.

    Args:
        optimizer: The optimizer; nothing of it is changed, and no hook of it is called.
        settings: Those of the group.
        dimensions: Number of the parameter's dimensions; some optimizers keep less for vectors.

    Returns:
        The keys of the state; ``None`` where the step can't be made so, as by an optimizer that needs a closure.
    """
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
    """The parameter groups of real optimizers, by name.

    Raises:
        CheckpointError: If an optimizer holds a parameter that is not the model's.
    """
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
