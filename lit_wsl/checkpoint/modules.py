"""The tensors of a whole pickled module, and of pickled NumPy arrays, from their inert records."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.inert import ForeignName, ForeignObject, as_mapping
from lit_wsl.checkpoint.rebuild import RefusedError

MAX_NAMES = 4_000_000
MAX_MODULE_DEPTH = 300

_NUMPY_DTYPES: dict[str, torch.dtype] = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "b1": torch.bool,
    "c8": torch.complex64,
    "c16": torch.complex128,
}


def is_module(value: Any) -> bool:
    """Whether a value is the record of an ``nn.Module`` (told by its structure) or of a script module."""
    if not isinstance(value, ForeignObject):
        return False
    if isinstance(value.func, ForeignName) and value.func.module.startswith("__torch__"):
        return True
    state = value.state
    return all(isinstance(state.get(key), dict) for key in ("_parameters", "_buffers", "_modules"))


def module_state_dict(root: ForeignObject) -> dict[str, Tensor]:
    """List the tensors that ``module.state_dict()`` would give, in its order, with its names.

    Own parameters, then own persistent buffers, then children; a module or tensor that is used under several names is
    listed under each, as ``state_dict`` does.

    Raises:
        RefusedError: if modules contain themselves, or are nested to an astronomical size.
    """
    result: dict[str, Tensor] = {}
    stack: list[tuple[str, ForeignObject, int]] = [("", root, 0)]
    visits = 0
    while stack:
        prefix, module, depth = stack.pop()
        visits += 1
        if depth > MAX_MODULE_DEPTH or visits > MAX_NAMES or len(result) > MAX_NAMES:
            raise RefusedError("modules that contain themselves, or are nested to an excessive size")
        own, children = _contents(module)
        result.update((prefix + name, tensor) for name, tensor in own.items())
        stack.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children.items()))
    return result


def _contents(module: ForeignObject) -> tuple[dict[str, Tensor], dict[str, ForeignObject]]:
    state = module.state
    if not isinstance(state.get("_modules"), dict):  # a script module: its attributes are its state
        own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return own, {name: value for name, value in state.items() if is_module(value)}
    transient = state.get("_non_persistent_buffers_set")
    transient = transient if isinstance(transient, (set, frozenset, list, tuple)) else ()
    own = {str(name): value for name, value in state["_parameters"].items() if isinstance(value, Tensor)}
    own |= {
        str(name): value
        for name, value in (state.get("_buffers") or {}).items()
        if isinstance(value, Tensor) and name not in transient
    }
    return own, {str(name): child for name, child in state["_modules"].items() if isinstance(child, ForeignObject)}


def numpy_tensor(value: Any) -> Tensor | None:
    """Give the tensor of a pickled NumPy array (not an object array), or None if the record is something else.

    Raises:
        RefusedError: if the array's data does not have the size that its shape needs.
    """
    if not isinstance(value, ForeignObject) or not isinstance(value.func, ForeignName):
        return None
    if not value.func.module.startswith("numpy"):
        return None
    if value.func.name == "_reconstruct":
        states = [order[1] for order in value.orders if order[0] == "build"]
        if len(states) != 1 or not isinstance(states[0], tuple) or len(states[0]) != 5:
            return None
        _, shape, kind, fortran, raw = states[0]
    elif value.func.name == "_frombuffer" and len(value.args) == 4:
        raw, kind, shape, order = value.args
        fortran = order == "F"
    else:
        return None
    dtype, swap = _numpy_dtype(kind)
    if dtype is None or not isinstance(raw, (bytes, bytearray)) or not isinstance(shape, tuple):
        return None
    if not all(type(length) is int and length >= 0 for length in shape):
        return None
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise RefusedError(f"a NumPy array of shape {shape} with {len(raw)} bytes of data")
    if not raw:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    if swap:
        width = dtype.itemsize // (2 if dtype.is_complex else 1)
        flat = flat.view(-1, width).flip(1).reshape(-1)
    flat = flat.view(dtype)
    return flat.view(shape[::-1]).permute(*range(len(shape) - 1, -1, -1)) if fortran else flat.view(shape)


def _numpy_dtype(record: Any) -> tuple[torch.dtype | None, bool]:
    """Read ``numpy.dtype('f4')`` with its state ``(version, byte order, ...)``; the flag says big-endian."""
    if not isinstance(record, ForeignObject) or str(record.func) != "numpy.dtype" or not record.args:
        return None, False
    states = [order[1] for order in record.orders if order[0] == "build"]
    order = states[0][1] if states and isinstance(states[0], tuple) and len(states[0]) > 1 else "<"
    code = record.args[0] if isinstance(record.args[0], str) else ""
    return _NUMPY_DTYPES.get(code.lstrip("<|=>")), order == ">" or code.startswith(">")


def attributes(value: Any) -> dict[Any, Any]:
    """What can be looked into: the items of a mapping, the attributes of a record."""
    mapping = as_mapping(value)
    if mapping is not None:
        return dict(mapping)
    return value.state if isinstance(value, ForeignObject) else {}
