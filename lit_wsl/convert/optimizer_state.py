"""One parameter's optimizer state through the operations of its parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.document import LazyTensor, materialize
from lit_wsl.convert.saved_optimizer import NOTHING, kind_of
from lit_wsl.errors import CheckpointError
from lit_wsl.plan.entries import PlanEntry
from lit_wsl.plan.operations import (
    Cast,
    Concat,
    Operation,
    Permute,
    Reshape,
    Split,
    Stack,
    Transpose,
    Unstack,
    run_operations,
    run_shapes,
)
from lit_wsl.structure.description import Shape

State = Mapping[str, Any]

Keep = Callable[[str, str, Tensor], Tensor]
"""Called with a target's name, a key of its state and the value; gives what is held of the value."""


class NotCarriedError(CheckpointError):
    """A parameter's state cannot go through the operations of its parameter; the message says why."""


def carry_state(
    entry: PlanEntry,
    states: Sequence[State],
    shapes: Sequence[Shape],
    keep: Keep | None = None,
    wide: Mapping[str, bool] = NOTHING,
) -> list[dict[str, Any]]:
    """Take the states of an entry's sources to the states of its targets.

    Values that belong to single weights (Adam's moments, momentum) go through the operations as the weights do, and
    stay bit for bit what they are. Factors (means over rows or columns) go along where rows stay rows or become
    columns as a whole. Counters and scalars must agree among sources that are joined.

    Args:
        entry: The entry of the plan.
        states: The state of each source.
        shapes: The shape of each source.
        keep: What to hold of each value that is carried, such as one rank's part; the rest is let go before the next
            value is read. Everything by default.
        wide: Which keys have more than one element for some parameter, see :class:`SavedOptimizer`.

    Returns:
        One state for each target.

    Raises:
        NotCarriedError: If the mathematics does not allow it.
    """
    made: list[dict[str, Any]] = [{} for _ in entry.targets]

    def hold(name: str, key: str, value: Any) -> Any:
        return keep(name, key, value) if keep is not None and isinstance(value, Tensor) else value

    if all(isinstance(op, Cast) for op in entry.operations):  # each on its own: whatever it is, it stays true
        for name, target, state in zip(entry.targets, made, states):
            for key, value in state.items():
                target[key] = hold(name, key, _cast(key, materialize(value), entry.operations))
        return made
    refused = next((op for op in entry.operations if not op.lossless or op.name in ("fan_out", "tie")), None)
    if refused is not None:
        why = "changes values" if not refused.lossless else "changes which gradients are summed"
        raise NotCarriedError(f"{refused.name} {why}, so the old averages of gradients do not hold for the new weights")
    keys = list(states[0])
    odd = next((state for state in states if list(state) != keys and set(state) != set(keys)), None)
    if odd is not None:
        raise NotCarriedError(f"the sources have states of different kinds: {sorted(keys)} and {sorted(odd)}")
    _refuse_new_factors(entry.operations, shapes, states)

    def carry(key: str) -> None:  # a function, so that its values are gone before the next are made
        of_sources = [state[key] for state in states]
        kinds = {kind_of(key, value, shape, wide.get(key)) for value, shape in zip(of_sources, shapes)}
        values = _carry_values(entry, key, of_sources, kinds, states, shapes, views=keep is not None)
        for name, target, value in zip(entry.targets, made, values):
            target[key] = hold(name, key, value)

    for key in keys:
        carry(key)
    return made


def own_memory(result: Tensor, *, shared: bool = False) -> Tensor:
    """The tensor, contiguous and with memory of its own: ``torch.save`` writes the whole storage of a view.

    Args:
        result: What an operation gave.
        shared: Whether it gave several results, which may be one and the same memory.
    """
    whole = result.untyped_storage().nbytes() == result.nbytes
    if result.is_contiguous() and whole and not shared:
        return result.detach()
    return result.detach().clone(memory_format=torch.contiguous_format)


def _cast(key: str, value: Any, operations: Sequence[Operation]) -> Any:
    """Moments are kept in the weights' own type, so they are cast where they were in it."""
    for operation in operations:
        assert isinstance(operation, Cast)
        if key != "step" and isinstance(value, Tensor) and str(value.dtype) == f"torch.{operation.source}":
            value = operation.apply([value])[0]
    return value


def _carry_values(
    entry: PlanEntry,
    key: str,
    values: list[Any],
    kinds: set[str | None],
    states: Sequence[State],
    shapes: Sequence[Shape],
    *,
    views: bool = False,
) -> list[Any]:
    """Carry the values of one key, one per source, to one per target; as views of the sources where those will do."""
    shown = [tuple(v.shape) if isinstance(v, (Tensor, LazyTensor)) else type(v).__name__ for v in values[:3]]
    if len(kinds) != 1 or None in kinds:
        raise NotCarriedError(f"{key!r} ({shown}) is neither one value per weight, nor a factor, nor a scalar")
    kind = kinds.pop()
    if kind in ("scalar", "plain", "same"):
        values = [materialize(value) for value in values]
    if kind in ("scalar", "plain"):
        if any(not _equal(values[0], other) for other in values[1:]):
            raise NotCarriedError(
                f"{key!r} differs among the sources that are joined ({_numbers(values)}); one parameter has only one"
            )
        return [v.clone() if isinstance((v := values[0]), Tensor) else v for _ in entry.targets]
    if kind == "same":
        dtypes = {str(value.dtype).removeprefix("torch.") for value in values}
        operations = [op for op in entry.operations if not isinstance(op, Cast) or dtypes == {op.source}]
        results = run_operations(operations, values)
        return results if views else [own_memory(result, shared=len(results) > 1) for result in results]
    assert kind is not None
    return _carry_factors(entry, key, kind, states, shapes)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first.reshape(()), second.reshape(()))
    return bool(first == second)


def _numbers(values: Sequence[Any]) -> str:
    found = dict.fromkeys(v.item() if isinstance(v, Tensor) else v for v in values)
    return ", ".join(map(str, list(found)[:4]))


def _refuse_new_factors(operations: Sequence[Operation], shapes: Sequence[Shape], states: Sequence[State]) -> None:
    """Optimizers with factors keep them for matrices only: a vector's state is not that of a matrix of one column."""
    before = {len(shape) >= 2 for shape in shapes}
    after = {len(shape) >= 2 for shape in run_shapes(operations, shapes)}
    if before == after:
        return
    factored = ("row", "col", "variance", "factor", "exp_avg_sq_row", "exp_avg_sq_col")
    if any(any(word in key for word in factored) for state in states for key in state):
        raise NotCarriedError("the operation makes a matrix of a vector (or back), whose states have different forms")


def _carry_factors(
    entry: PlanEntry, key: str, kind: str, states: Sequence[State], shapes: Sequence[Shape]
) -> list[Tensor]:
    """Carry row or column factors; where rows become columns, the partner's values go under this key."""
    swapped = _swaps(entry.operations, len(shapes[0]))
    wanted = kind
    if swapped:
        wanted = ("column" if kind.startswith("row") else "row") + ("*" if kind.endswith("*") else "")
    source_key = next(
        (k for k in states[0] if all(kind_of(k, s[k], shape) == wanted for s, shape in zip(states, shapes))), None
    )
    if source_key is None:
        raise NotCarriedError(f"{key!r} is a factor of rows or columns whose counterpart is not in the state")
    is_row = wanted.startswith("row")
    axis = -1 if is_row else -2
    keeps = wanted.endswith("*")
    read = [materialize(state[source_key]) for state in states]
    factors = read if keeps else [factor.unsqueeze(axis) for factor in read]
    current = list(shapes)
    for operation in entry.operations:
        factors = _step(operation, factors, current, source_key)
        current = operation.shapes(current)
    new_axis = (-2 if is_row else -1) if swapped else axis
    return [own_memory(factor if keeps else factor.squeeze(new_axis), shared=len(factors) > 1) for factor in factors]


def _swaps(operations: Sequence[Operation], rank: int) -> bool:
    """Whether rows become columns."""
    order = list(range(rank))
    for operation in operations:
        if isinstance(operation, (Transpose, Permute)):
            order = [order[d] for d in _dims(operation, len(order))]
        elif isinstance(operation, Stack):
            order.insert(operation.dim, -1)
        elif isinstance(operation, Unstack) and operation.dim < len(order):
            del order[operation.dim]
        elif isinstance(operation, Reshape):
            order = [-1] * (len(operation.target) - 2) + order[-2:]
    return len(order) >= 2 and order[-2] > order[-1]


def _dims(operation: Transpose | Permute, rank: int) -> list[int]:
    if isinstance(operation, Permute):
        return list(operation.dims)
    dims = list(range(rank))
    dims[operation.dim0], dims[operation.dim1] = dims[operation.dim1], dims[operation.dim0]
    return dims


def _step(operation: Operation, factors: list[Tensor], shapes: list[Shape], key: str) -> list[Tensor]:
    """One operation on factors that are kept with length 1 on the axis over which they are means."""
    rank = len(shapes[0])
    if isinstance(operation, Cast):
        return factors
    if isinstance(operation, (Transpose, Permute)):
        dims = _dims(operation, rank)
        if set(dims[-2:]) == {rank - 2, rank - 1}:
            return [factor.permute(dims) for factor in factors]
    elif (
        (isinstance(operation, Stack) and operation.dim <= rank - 2)
        or (isinstance(operation, Unstack) and operation.dim < rank - 2)
        or (isinstance(operation, (Split, Concat)) and operation.dim < rank - 2)
    ):
        return operation.apply(factors)
    elif isinstance(operation, Reshape) and operation.source[-2:] == operation.target[-2:]:
        return [factor.reshape(*operation.target[:-2], *factor.shape[-2:]) for factor in factors]
    raise NotCarriedError(
        f"{key!r} is a mean over whole rows or columns, which {operation.name} of shape {tuple(shapes[0])} cuts or "
        "joins: the means of the new ones do not follow from those of the old ones"
    )
