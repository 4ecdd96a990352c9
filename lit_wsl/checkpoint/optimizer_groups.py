"""Parameter groups of the new run's optimizers, and their settings against those of the saved ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_wsl.checkpoint.optimizer_saved import SavedGroup, SavedOptimizer
from lit_wsl.errors import CheckpointError

SCHEDULED = frozenset(  # written into groups by schedulers and averaging, not by the optimizer
    {"initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "param_names", "params", "foreach"}
)


@dataclass(frozen=True)
class NewGroup:
    """A parameter group of the new model's optimizer.

    Attributes:
        names: Its parameters in order.
        settings: Its settings in the new run, ``None`` where no optimizer is at hand.
    """

    names: tuple[str, ...]
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class NewOrder:
    """The new model's parameters, in registration order, tied ones once.

    Attributes:
        names: All of them.
        frozen: Those that don't require gradients, where that is known.
        known: Whether frozen parameters are known at all (a model was given).
    """

    names: tuple[str, ...]
    frozen: frozenset[str] = frozenset()
    known: bool = False


def same_settings(first: SavedGroup, second: SavedGroup) -> bool:
    """Whether two saved groups have the same settings, those included that are tensors."""
    a, b = first.settings, second.settings
    return first is second or (set(a) == set(b) and all(_plain(a[key]) == _plain(b[key]) for key in a))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def refuse_other_optimizer(optimizer: SavedOptimizer, saved: SavedGroup, group: NewGroup) -> None:
    """Adam's state means nothing to SGD: tell them apart by the settings that they know."""
    if group.settings is None:
        return
    old, new = set(saved.settings) - SCHEDULED, set(group.settings) - SCHEDULED
    if old - new and new - old:
        raise CheckpointError(
            f"{optimizer.label} of the checkpoint is of another kind than the new run's: its groups have "
            f"{sorted(old - new)}, the new ones {sorted(new - old)}. "
            "Use the same optimizer, or transfer the weights only."
        )


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
            found.append(NewGroup(tuple(names[id(parameter)] for parameter in group["params"]), settings))
        made.append(found)
    return made
