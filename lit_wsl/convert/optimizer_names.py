"""Which parameter has which index in a saved optimizer: an optimizer's file numbers its parameters and names none.

The numbers run through the groups in the order in which the user gave the parameters, which normally is that of
``model.parameters()``, within each group. Where the file has ``param_names`` these decide; otherwise an assignment is
accepted only if it is the one and only that keeps the order within every group and agrees with the states' shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

from torch import Tensor

from lit_wsl.checkpoint.document import LazyTensor
from lit_wsl.convert.saved_optimizer import SavedGroup, SavedOptimizer
from lit_wsl.errors import CheckpointError
from lit_wsl.structure.description import Shape

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
    """Find the name of every index of every optimizer.

    Args:
        optimizers: The saved optimizers.
        parameters: Names and shapes of the old model's parameters, in registration order, tied ones once.
        given: What the user or another part of the file says: for each optimizer the names in index order, or ``None``.
        doubtful: Those of the parameters that may be buffers, such as the class weights of a loss.

    Returns:
        For each optimizer and group the names in order, and remarks for the report.

    Raises:
        CheckpointError: If names and shapes contradict each other, or no assignment or several fit.
    """
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
    cut, start = [], 0
    for group in optimizer.groups:
        cut.append(tuple(names[start : start + len(group.indices)]))
        start += len(group.indices)
    return tuple(cut)


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
    first = listed[0]
    prefixes = [name[: -len(first)] for name in parameters if name.endswith("." + first)]
    fitting = [prefix for prefix in prefixes if all(prefix + name in parameters for name in listed)]
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
    state = optimizer.state.get(index, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, (Tensor, LazyTensor))}
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
    result, start = [], 0
    for optimizer in optimizers:
        result.append(tuple(map(tuple, found[start : start + len(optimizer.groups)])))
        start += len(optimizer.groups)
    return result


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
            for _, after in moves(place, at):
                reached[after] = None
                steps += 1
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
