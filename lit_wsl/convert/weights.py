"""Weights and the optimizer's states of them through the operations of a plan, each tensor with memory of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_wsl.checkpoint.document import Leaf, materialize
from lit_wsl.checkpoint.reader import Checkpoint
from lit_wsl.checkpoint.records import as_mapping
from lit_wsl.convert.saved_optimizer import NOTHING, NewOrder, kind_of
from lit_wsl.errors import CheckpointError, PlanError, listed
from lit_wsl.plan.entries import PlanEntry, fingerprint
from lit_wsl.plan.notation import registration_order
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
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure import ModelDescription, describe
from lit_wsl.structure.description import Shape, dtype_text

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
    """The tensor, contiguous and with memory of its own: ``torch.save`` writes the whole storage of a view."""
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
    shown = [tuple(v.shape) if isinstance(v, Leaf) else type(v).__name__ for v in values[:3]]
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
        dtypes = {dtype_text(value.dtype) for value in values}
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


@dataclass(frozen=True)
class Translation:
    """A plan with the checkpoint that it takes from and the model that it fills, each described once."""

    checkpoint: Checkpoint  # the old checkpoint
    plan: TransferPlan  # from the old model to the new
    target: nn.Module | None  # the new model, where it is known; it may be on the meta device
    old: ModelDescription  # what is known of the checkpoint
    new: ModelDescription | None  # what is known of the new model

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: TransferPlan, target: nn.Module | None = None) -> Translation:
        """Describe both sides."""
        described = describe(target) if target is not None else None
        return cls(checkpoint, plan, target, describe(checkpoint, label=str(checkpoint.path)), described)

    @cached_property
    def old_parameters(self) -> dict[str, Shape]:
        """Names and shapes of the old model's parameters, in registration order, tied ones once.

        What the plan knows to be a buffer, from the model that it was matched with, goes before what is inferred.
        """
        kinds = {u.name: u.kind for u in self.plan.unmatched_source}
        kinds.update((source, entry.kind) for entry in self.plan.entries for source in entry.sources)
        return {i.name: i.shape for i in self.old.parameters if kinds.get(i.name, i.kind) != "buffer"}

    @cached_property
    def doubtful(self) -> frozenset[str]:
        """Those of the old parameters that may be buffers: the tensors of modules of which the new model has nothing.

        Class weights of a loss look like a bias; that it is no parameter only the old code could tell.
        """
        used = {source for entry in self.plan.entries for source in entry.sources}
        used.update(source for a in self.plan.ambiguous for candidate in a.candidates for source in candidate.sources)
        alive = {name.rpartition(".")[0] for name in used}
        return frozenset(name for name in self.old_parameters if name.rpartition(".")[0] not in alive)

    @cached_property
    def order(self) -> NewOrder:
        """The order in which the new model registers its parameters.

        Without the model it is worked out from the plan, and accepted only if the fingerprint of the target, a hash
        over all names and shapes in order, proves it.
        """
        if self.target is not None and self.new is not None:
            gradients = {name: p.requires_grad for name, p in self.target.named_parameters(remove_duplicate=False)}
            names = [info.name for info in self.new.parameters if info.kind == "parameter"]
            return NewOrder(tuple(names), frozenset(n for n in names if not gradients.get(n, True)), known=True)
        proven = proven_order(self.plan)
        if proven is not None:
            return NewOrder(tuple(name for name, kind in proven if kind == "parameter"))
        raise CheckpointError(
            "the order in which the new model registers its parameters, which is that of the optimizer's states, does "
            "not follow from the plan alone (it was edited, or some parameters have no source). Give the new model: "
            "target=..., or --model on the command line; or convert the weights only (weights_only=True, "
            "--weights-only)."
        )

    def whole_state(self, filled: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """Put converted tensors in the new model's order, under tied names too, and what has no source beside them.

        Returns:
            The tensors; the names of those whose values are the target's own; those that have no value, since there is
            no target or it is on the meta device.
        """
        if self.target is None or self.new is None:
            proven = proven_order(self.plan)
            names = [name for name, _ in proven] if proven is not None else list(filled)
            missing = [u.name for u in self.plan.unmatched_target]
            missing += [name for a in self.plan.ambiguous for name in a.targets]
            return {name: filled[name] for name in names if name in filled}, [], missing
        strange = next((name for name in filled if name not in self.new), None)
        if strange is not None:
            raise PlanError(f"the plan fills {strange!r}, which {self.new.label} does not have; make a new plan.")
        state: dict[str, Tensor] = {}
        fresh, lacking = [], []
        for name, tensor in self.target.state_dict(keep_vars=True).items():
            first = self.new.tied.get(name, name)
            if first in filled:
                state[name] = filled[first]
            elif not isinstance(tensor, Tensor) or nn.parameter.is_lazy(tensor) or tensor.is_meta:
                lacking.append(name)
            else:
                state[name] = state[first] if first in state else tensor.detach().clone()
                fresh.append(name)
        return state, fresh, lacking


def proven_order(plan: TransferPlan) -> list[tuple[str, str]] | None:
    """Names and kinds of the target's tensors in registration order, if the plan's fingerprint proves them."""
    known: list[tuple[str, Shape, str]] = [
        (name, shape, entry.kind) for entry in plan.entries for name, shape in zip(entry.targets, entry.target_shapes)
    ]
    loose = [(u.name, u.shape, str(u.kind)) for u in plan.unmatched_target]
    loose += [(name, a.shape, "parameter") for a in plan.ambiguous for name in a.targets]
    for rows in (known + loose, loose + known):
        by_module = [rows[i] for i in registration_order([name for name, _, _ in rows])]
        for candidate in (by_module, rows):
            if fingerprint((name, shape) for name, shape, _ in candidate) == plan.target.fingerprint:
                return [(name, kind) for name, _, kind in candidate]
    return None


Progress = Callable[[int, int], None]
"""Called with the number of entries done and their total."""


def convert_weights(sides: Translation, progress: Progress | None = None) -> tuple[dict[str, Any], list[str]]:
    """The new model's state dict, in its order, and remarks."""
    checkpoint, plan, target = sides.checkpoint, sides.plan, sides.target
    notes: list[str] = []
    ordered, fresh, missing = sides.whole_state(convert_tensors(checkpoint, plan, target, progress))
    if fresh:
        notes.append(f"{len(fresh)} tensors of the new model have no source and its own fresh values: {listed(fresh)}")
    if missing:
        notes.append(
            f"{len(missing)} tensors of the new model are not in the new checkpoint, so it loads with strict=False "
            f"(Lightning: strict_loading=False): {listed(missing)}"
        )
    notes += _left_over(sides)
    state: dict[str, Any] = OrderedDict(ordered)
    moved = {e.sources[0].rpartition(".")[0]: e.targets[0].rpartition(".")[0] for e in plan.entries}
    for name, value in checkpoint.extra.items():  # the extra state of a module moves with it
        module, dot, leaf = str(name).rpartition(".")
        state[f"{moved[module]}{dot}{leaf}" if dot and module in moved else name] = value
    state._metadata = _metadata(checkpoint, moved, target)  # type: ignore[attr-defined]
    return state, notes


def _left_over(sides: Translation) -> list[str]:
    """Say which tensors of the checkpoint are unused; what the plan does not know came since it was made."""
    plan, tied = sides.plan, sides.old.tied
    used = {source for entry in plan.entries for source in entry.sources}
    known = {u.name for u in plan.unmatched_source}
    known.update(source for a in plan.ambiguous for candidate in a.candidates for source in candidate.sources)
    left = [name for name in sides.checkpoint if tied.get(name, name) not in used and name not in used]
    strange = [name for name in left if name not in known]
    notes = [f"{len(left)} tensors of the checkpoint are not used: {listed(left)}"] if left else []
    if strange and (plan.unmatched_source or plan.source.fingerprint):
        notes.append(f"the plan was made for another checkpoint: it does not know {listed(strange)}")
    return notes


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
    """Run the plan's operations on a state dict; each result has memory of its own."""
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
