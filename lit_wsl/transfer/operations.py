"""Operations take the tensors of a checkpoint to the tensors of a model: small, pure, and data themselves.

An operation maps a list of tensors to a list of tensors and knows the shapes of its results without seeing data.
Entries of a plan chain them: ``[q, k, v] --concat--> [qkv]``, ``[c_attn] --transpose--> --split--> [q, k, v]``.
Operations that work on each tensor alone (transpose, permute, reshape, cast) take lists of any length; those that
join take consecutive runs of the list, so ``[g0, u0, g1, u1]`` concatenates pairwise and then stacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from lit_wsl.errors import PlanError
from lit_wsl.transfer.operation import MAX_TENSORS, Operation, Shape
from lit_wsl.transfer.operations_each import Cast, Permute, Reshape, Transpose
from lit_wsl.transfer.operations_join import Concat, FanOut, Split, Stack, Tie, Unstack

__all__ = [
    "MAX_TENSORS",
    "OPERATIONS",
    "Cast",
    "Concat",
    "FanOut",
    "Operation",
    "Permute",
    "Reshape",
    "Shape",
    "Split",
    "Stack",
    "Tie",
    "Transpose",
    "Unstack",
    "operation_from_dict",
    "run_operations",
    "run_shapes",
]

OPERATIONS: dict[str, type[Operation]] = {
    op.name: op for op in (Permute, Transpose, Reshape, Split, Concat, Stack, Unstack, FanOut, Tie, Cast)
}


def operation_from_dict(data: Mapping[str, Any]) -> Operation:
    """Rebuild an operation from :meth:`Operation.to_dict`; arguments that have defaults may be left out.

    Raises:
        PlanError: If the name is unknown, or an argument is missing, unknown or not allowed.

    >>> operation_from_dict({"op": "split", "dim": 0, "sizes": [2, 2]})
    Split(dim=0, sizes=(2, 2))
    """
    name = data.get("op")
    cls = OPERATIONS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise PlanError(f"unknown operation {name!r}; known are {', '.join(sorted(OPERATIONS))}.")
    hints = get_type_hints(cls)
    args = {k: v for k, v in data.items() if k != "op"}
    known = {f.name for f in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if not needed <= set(args) <= known:
        raise PlanError(f"operation {name!r} takes {sorted(known)}, but the plan gives {sorted(map(str, args))}.")
    return cls(**{key: _typed(value, hints[key], f"{name}: {key}") for key, value in args.items()})


def _typed(value: object, hint: Any, where: str) -> Any:
    """Take a plain value for an argument of the given type; lists become tuples."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(parts) == 2 and parts[1] is Ellipsis:
            return tuple(_typed(v, parts[0], where) for v in value)
        if len(parts) == len(value):
            return tuple(_typed(v, p, where) for v, p in zip(value, parts))
    elif origin in (Union, UnionType):
        for part in parts:
            try:
                return _typed(value, part, where)
            except PlanError:
                continue
    elif origin is Literal:
        if any(value == p and type(value) is type(p) for p in parts):
            return value
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif (
        origin is None  # Python 3.10 calls tuple[int] a type
        and isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool or not isinstance(value, bool))
    ):
        return value
    shown = repr(value)
    wanted = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    raise PlanError(f"{where} must be {wanted}, got {shown[:60] + '...' if len(shown) > 60 else shown}.")


def run_operations(
    operations: Sequence[Operation], inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Chain operations over a list of tensors.

    >>> import torch
    >>> run_operations([Transpose(), Split(0, (2, 2))], [torch.zeros(3, 4)])[0].shape
    torch.Size([2, 3])
    """
    tensors = list(inputs)
    for op in operations:
        tensors = op.apply(tensors, targets)
    return tensors


def run_shapes(operations: Sequence[Operation], inputs: Sequence[Shape]) -> list[Shape]:
    """Chain operations over shapes only.

    >>> run_shapes([Concat(0, (2, 2)), Transpose()], [(2, 3), (2, 3)])
    [(3, 4)]
    """
    shapes = [tuple(s) for s in inputs]
    for op in operations:
        shapes = op.shapes(shapes)
    return shapes
