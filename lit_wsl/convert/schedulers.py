"""Learning rate schedulers of a checkpoint for the schedulers of a run: by kind, and by the optimizer that they drive.

A checkpoint holds the attributes of each scheduler and not its class. ``load_state_dict`` takes any attributes, so a
scheduler of one kind would continue with those of another without a word. Kinds are told apart by their attributes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiplicativeLR

from lit_wsl.convert.optimizers import Carried, Place, told
from lit_wsl.convert.saved_optimizer import SavedOptimizer, Wins, base_rate, differing
from lit_wsl.errors import CheckpointError

_MOST_ORDERS = 6  # schedulers that are tried in every order
_MOST_FACTORS = 1_000_000  # steps whose factors are multiplied to see what a rate should be
REMEDY = "Configure the same scheduler, or take the new run's own with the old moments (schedule='run')."


def carry_schedulers(
    saved: Sequence[Any],
    schedulers: Sequence[Any],
    optimizers: Sequence[Optimizer],
    carried: Carried,
    settings: Wins,
    label: str,
) -> tuple[list[Any], list[str]]:
    """A state to continue with for each of the run's schedulers, and remarks."""
    if len(saved) != len(schedulers):
        raise CheckpointError(
            f"{label} has {len(saved)} learning rate schedulers, the run {len(schedulers)}; configure as many, or take "
            "the new run's own with the old moments (schedule='run')."
        )
    if not all(isinstance(state, Mapping) for state in saved):
        raise CheckpointError(f"{label}: the state of a learning rate scheduler is no mapping. {REMEDY}")
    own = [scheduler.state_dict() for scheduler in schedulers]
    made, notes = [], []
    for number, place in enumerate(_order(saved, schedulers, own, optimizers, carried)):
        scheduler, state = schedulers[number], saved[place]
        origins = _origins(scheduler, optimizers, carried)
        if origins is not None:
            state = _regroup(state, own[number], origins, carried.optimizers, _arguments(scheduler))
        state, remarks = _choose_settings(
            state, scheduler, settings, f"scheduler {number} ({type(scheduler).__name__})"
        )
        kept = [n for n, place in enumerate(origins or ()) if place is not None]
        remark = _rates_by_function(state, scheduler, kept, f"scheduler {number}")
        made.append(state)
        notes += [*remarks, *([remark] if remark else [])]
    return made, notes


@cache
def _common() -> frozenset[str]:
    """What every scheduler of torch has, of this version and of older ones."""

    class Plain(LRScheduler):
        def get_lr(self) -> list[Any]:
            return [group["lr"] for group in self.optimizer.param_groups]

    scheduler = Plain(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    return frozenset(scheduler.state_dict()) | {"verbose", "_initial_step", "_get_lr_called_within_step", "_is_initial"}


def kind_of_scheduler(state: Mapping[str, Any]) -> Any:
    """What tells a scheduler's kind: the names of its attributes, and the kinds of the schedulers inside.

    >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> sorted(name for name, _ in kind_of_scheduler(torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict()))
    ['gamma', 'step_size']
    """
    # a method that somebody exchanged on the object is no state
    own = {key: value for key, value in state.items() if key not in _common() and not callable(value)}
    return frozenset((key, _inside(value)) for key, value in own.items())


def _inside(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and all(_is_scheduler(item) for item in value):
        return tuple(kind_of_scheduler(item) for item in value)
    return kind_of_scheduler(value) if _is_scheduler(value) else None


def _is_scheduler(value: Any) -> bool:
    return isinstance(value, Mapping) and ("last_epoch" in value or "_schedulers" in value)


def _order(
    saved: Sequence[Mapping[str, Any]],
    schedulers: Sequence[Any],
    own: Sequence[Mapping[str, Any]],
    optimizers: Sequence[Optimizer],
    carried: Carried,
) -> Sequence[int]:
    """Which of the saved states each scheduler takes."""
    kinds, wanted = [kind_of_scheduler(s) for s in saved], [kind_of_scheduler(s) for s in own]
    if sorted(map(_names, kinds)) != sorted(map(_names, wanted)):
        place = next(i for i, kind in enumerate(kinds) if kind != wanted[i])
        raise CheckpointError(_other_kind(schedulers[place], saved[place], kinds[place], wanted[place]))
    drives = [_driven(state, carried.optimizers) for state in saved]

    def fits(number: int, place: int) -> bool:
        origins = _origins(schedulers[number], optimizers, carried)
        olds = {origin[0] for origin in origins or () if origin is not None}
        return kinds[place] == wanted[number] and (not olds or not drives[place] or bool(olds & drives[place]))

    straight = tuple(range(len(saved)))
    candidates = permutations(straight) if len(saved) <= _MOST_ORDERS else iter([straight])
    fitting = [order for order in candidates if all(fits(n, place) for n, place in enumerate(order))]
    told_apart = {tuple(repr(saved[place]) for place in order) for order in fitting}
    moved = any(o is not None and o[0] != n for n, groups in enumerate(carried.origins) for o in groups)
    if straight in fitting and (not moved or len(told_apart) == 1):
        return straight
    if len(told_apart) != 1:
        raise CheckpointError(
            f"which of the {len(saved)} learning rate schedulers of the checkpoint belongs to which of the run's is "
            "not known, since the optimizers stand in another order. List them in the old order, or take the new run's "
            "own schedulers with the old moments (schedule='run')."
        )
    return fitting[0]


def _rates_by_function(state: Mapping[str, Any], scheduler: Any, groups: Sequence[int], label: str) -> str:
    """A remark where the functions of a ``LambdaLR`` or ``MultiplicativeLR``, alike in attributes, give other rates."""
    own = next((kind for kind in (LambdaLR, MultiplicativeLR) if isinstance(scheduler, kind)), None)
    functions, epoch = getattr(scheduler, "lr_lambdas", ()), state.get("last_epoch")
    base, last = state.get("base_lrs"), state.get("_last_lr")
    if own is None or not isinstance(epoch, int) or not 0 <= epoch <= _MOST_FACTORS or base is None or last is None:
        return ""
    if not all(isinstance(f, FunctionType) for f in functions):  # objects have a state, and may change by a call
        return ""
    try:
        wanted: dict[type, list[float]] = {
            LambdaLR: [float(base[n]) * functions[n](epoch) for n in groups],
            MultiplicativeLR: [float(base[n]) * math.prod(map(functions[n], range(1, epoch + 1))) for n in groups],
        }
        agrees = {
            kind: all(math.isclose(rate, last[n], rel_tol=1e-4) for n, rate in zip(groups, rates))
            for kind, rates in wanted.items()
        }
    except Exception:  # a function that works in its own run only
        return ""
    if agrees[own]:
        return ""
    (other,) = set(wanted) - {own}
    if agrees[other]:
        raise CheckpointError(
            f"the checkpoint's learning rate scheduler is of another kind than the run's {type(scheduler).__name__}: "
            f"its rates are those of a {other.__name__}. {REMEDY}"
        )
    n = groups[0]
    return (
        f"{label} ({type(scheduler).__name__}): at its step {epoch} the learning rate is {last[n]:.4g} in the "
        f"checkpoint and {wanted[own][0]:.4g} by the run's function: another function, another kind of scheduler, or "
        "something else that changed the rate"
    )


def _names(kind: Any) -> str:
    return repr(sorted((name, repr(inside)) for name, inside in kind))


def _other_kind(scheduler: Any, saved: Mapping[str, Any], old_kind: Any, new_kind: Any) -> str:
    theirs, ours = sorted({name for name, _ in old_kind}), sorted({name for name, _ in new_kind})
    averaging = " (StochasticWeightAveraging exchanges the scheduler in its phase)" if "anneal_epochs" in saved else ""
    inside = " and other schedulers inside" if theirs == ours else ""
    return (
        f"the checkpoint's learning rate scheduler is of another kind than the run's {type(scheduler).__name__}: it "
        f"has {theirs or 'no attributes of its own'}{inside}, the run's {ours or 'none'}{averaging}. {REMEDY}"
    )


def _driven(state: Mapping[str, Any], optimizers: Sequence[SavedOptimizer]) -> set[int]:
    """The saved optimizers that a saved scheduler may belong to: its rates are theirs."""
    base, last = state.get("base_lrs"), state.get("_last_lr")

    def rates(optimizer: SavedOptimizer, key: str) -> list[Any]:
        return [base_rate(g.settings) if key == "base" else g.settings.get("lr") for g in optimizer.groups]

    fitting = {n for n, o in enumerate(optimizers) if base is None or list(base) == rates(o, "base")}
    exact = {n for n in fitting if last is not None and list(last) == rates(optimizers[n], "lr")}
    return exact or fitting


def _origins(scheduler: Any, optimizers: Sequence[Optimizer], carried: Carried) -> list[Place | None] | None:
    optimizer = getattr(scheduler, "optimizer", None)
    number = next((n for n, known in enumerate(optimizers) if known is optimizer), None)
    return carried.origins[number] if number is not None else None


def _arguments(scheduler: Any) -> frozenset[str]:
    """The names of what its constructor is given: settings, where other attributes are counters."""
    found: set[str] = set()
    for cls in type(scheduler).__mro__:
        try:
            found.update(inspect.signature(cls).parameters)
        except (TypeError, ValueError):
            continue
    return frozenset(found) - {"self", "args", "kwargs", "optimizer", "last_epoch", "verbose"}


def _regroup(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    origins: Sequence[Place | None],
    optimizers: Sequence[SavedOptimizer],
    arguments: frozenset[str],
) -> dict[str, Any]:
    """Give what a scheduler keeps for each parameter group the order and number of the new groups."""
    olds = {place[0] for place in origins if place is not None}
    if len(olds) != 1:
        return dict(state)
    count = len(optimizers[olds.pop()].groups)
    if [place[1] if place is not None else None for place in origins] == list(range(count)):
        return dict(state)

    def regroup(key: str, value: Any, mine: Any) -> Any:
        if isinstance(value, (list, tuple)) and value and all(map(_is_scheduler, value)):
            inner = mine if isinstance(mine, (list, tuple)) and len(mine) == len(value) else [{}] * len(value)
            return [_regroup(item, own_item, origins, optimizers, arguments) for item, own_item in zip(value, inner)]
        listed = isinstance(value, (list, tuple)) and isinstance(mine, (list, tuple))
        if not listed or len(value) != count or len(mine) != len(origins) or key.lstrip("_") in arguments:
            return value
        return [mine[n] if place is None else value[place[1]] for n, place in enumerate(origins)]

    return {key: regroup(key, value, own.get(key)) for key, value in state.items()}


def _choose_settings(
    state: Mapping[str, Any], scheduler: Any, settings: Wins, label: str
) -> tuple[dict[str, Any], list[str]]:
    """Name the settings that differ, and let the chosen side win."""
    made, notes = dict(state), []
    own, arguments = scheduler.state_dict(), _arguments(scheduler)
    for key in state:
        if key not in own or key in _common():
            continue
        inner = getattr(scheduler, key, None)
        if isinstance(inner, (list, tuple)) and inner and all(map(_is_scheduler, state[key])):
            parts = [
                _choose_settings(item, part, settings, f"{label}, {type(part).__name__}")
                for item, part in zip(state[key], inner)
            ]
            made[key] = [part for part, _ in parts]
            notes += [note for _, remarks in parts for note in remarks]
        elif key.lstrip("_") in arguments and differing(state, own, (key,)):
            notes.append(
                told(label, key.lstrip("_"), _brief(state[key]), _brief(own[key]), settings, "optimizer_settings")
            )
            if settings == "run":
                made[key] = own[key]
    return made, notes


_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def schedulers_for_file(saved: Sequence[Any], carried: Carried, schedule: Wins) -> tuple[list[Any], list[str]]:
    """States of schedulers for a converted file without a run: in the order of the optimizers that they drive."""
    if schedule == "run":
        return [], ["the new run's own schedulers start anew"] if saved else []
    straight = [[(n, g) for g in range(len(o.groups))] for n, o in enumerate(carried.optimizers)]
    if not saved or carried.origins == straight:
        return list(saved), []
    own = {n: {o[0] for o in origins if o is not None} for n, origins in enumerate(carried.origins)}
    drives = [_driven(state, carried.optimizers) if isinstance(state, Mapping) else set() for state in saved]
    made = []
    for number in range(len(carried.origins)):
        places = [place for place, olds in enumerate(drives) if olds & own[number]]
        if len(saved) == len(carried.optimizers) and own[number] & set(places):
            places = sorted(own[number] & set(places))
        if not places:
            continue
        if len(places) > 1 or len(own[number]) > 1:
            raise CheckpointError(
                f"the new run's optimizer {number} is made of several, or several schedulers drive it, so which "
                f"scheduler it has is not known. {REMEDY}"
            )
        state, origins = saved[places[0]], carried.origins[number]
        count = len(carried.optimizers[next(iter(own[number]))].groups)
        groups = carried.states[number]["param_groups"]
        if [o[1] if o else None for o in origins] != list(range(count)):
            state = _regroup_known(state, origins, count, groups)
        made.append(state)
    if len(made) != len(saved):
        raise CheckpointError(
            f"which of the {len(saved)} learning rate schedulers belongs to which optimizer of the new run is not "
            f"known. {REMEDY}"
        )
    return made, []


def _regroup_known(
    state: Mapping[str, Any], origins: Sequence[Place | None], count: int, groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    made = dict(state)
    for key, value in state.items():
        if isinstance(value, (list, tuple)) and value and all(map(_is_scheduler, value)):
            made[key] = [_regroup_known(item, origins, count, groups) for item in value]
        elif key in _PER_GROUP and isinstance(value, (list, tuple)) and len(value) == count:
            fresh = {"base_lrs": "initial_lr", "_last_lr": "lr"}.get(key)
            if None in origins and fresh is None:
                raise CheckpointError(
                    f"a scheduler holds {key!r} for {count} parameter groups, and what that is for a new group is not "
                    f"known. {REMEDY}"
                )
            made[key] = [
                value[place[1]] if place is not None else groups[n].get(fresh or "", groups[n].get("lr"))
                for n, place in enumerate(origins)
            ]
    return made


def _brief(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
