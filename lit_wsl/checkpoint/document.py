"""The whole content of a checkpoint as one tree, with tensors that are read when asked for; its parts exchanged.

Optimizers, schedulers and callbacks keep a learning rate as ``numpy.float64`` or a folder as ``pathlib.Path``. Such a
value is data: :func:`build_plain` builds it by a function of our own from the record's parts; no name of the file is
looked up, and a record of any other class stays a record.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import math
import pathlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_wsl.checkpoint.allowlist import RefusedError
from lit_wsl.checkpoint.records import ForeignName, ForeignObject, as_mapping
from lit_wsl.errors import CheckpointError
from lit_wsl.structure.description import memory_of


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of known shape and dtype whose data is read on request."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]  # gives the tensor

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()


Leaf = Tensor | LazyTensor


def tensors_of(entries: Mapping[Any, Any]) -> dict[str, Leaf]:
    """The tensors among the entries of a mapping that have names."""
    return {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, Leaf)}


def with_ties(tensors: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Some tensors made anew, and with them those that were tied to them; the others as they are."""
    tied = {memory_of(tensors[n]): value for n, value in made.items() if isinstance(tensors.get(n), Tensor)}
    tied.pop(None, None)  # an empty one is tied to none
    memory = {n: memory_of(value) if isinstance(value, Tensor) else None for n, value in tensors.items()}
    return {n: made.get(n, tied.get(memory[n], value)) for n, value in tensors.items()}


@dataclass(frozen=True)
class Document:
    """The content of a checkpoint file or folder."""

    format: str  # what it is, such as ``"lightning"``, ``"torch"``, ``"safetensors"``
    tree: Any  # nested dicts and lists; leaves are tensors, :class:`LazyTensor`, plain values and inert records
    stubbed: tuple[str, ...] = ()  # dotted names of foreign classes and functions that became inert records
    notes: tuple[str, ...] = ()  # remarks for the report
    metadata: Mapping[str, str] | None = None  # the ``__metadata__`` of a safetensors file
    lossy: bool = False  # whether writing the tree again would lose something of the file
    lazy: bool = False  # whether the tree holds lazy tensors
    keep: Any = None  # what holds the files, where they are a temporary copy

    def read(self, part: Any) -> Any:
        """Read the lazy tensors of a part of the tree, if the reader makes any."""
        return materialize(part) if self.lazy else part


def materialize(tree: Any) -> Any:
    """Read every lazy tensor of nested plain dicts and lists without cycles; the same tree where there is none."""
    if isinstance(tree, LazyTensor):
        return tree.read()
    if type(tree) is dict and any(isinstance(value, (LazyTensor, dict, list)) for value in tree.values()):
        return {key: materialize(value) for key, value in tree.items()}
    if type(tree) is list and any(isinstance(value, (LazyTensor, dict, list)) for value in tree):
        return [materialize(value) for value in tree]
    return tree


def replace_at(tree: Any, path: Sequence[str], value: Any) -> Any:
    """Give a copy of a tree with another value at a path of keys; what is off the path is shared, not copied.

    Args:
        tree: nested dicts, or records of dict subclasses.
        path: keys from the top.
        value: what to put there.

    Raises:
        CheckpointError: if the path is not in the tree.

    Example:
        >>> replace_at({"a": {"b": 1, "c": 2}, "d": 3}, ("a", "b"), 9)
        {'a': {'b': 9, 'c': 2}, 'd': 3}
    """
    if not path:
        return value
    entries = as_mapping(tree)
    if entries is None or path[0] not in entries:
        raise CheckpointError(f"The checkpoint has no entry {path[0]!r} to replace.")
    return with_entries(tree, {**entries, path[0]: replace_at(entries[path[0]], path[1:], value)})


def with_entries(container: Any, entries: Mapping[Any, Any]) -> Any:
    """Give a container of the same kind (dict, OrderedDict with its ``_metadata``, record) with other items."""
    if isinstance(container, ForeignObject):
        first = next((at for at, order in enumerate(container.orders) if order[0] == "setitem"), len(container.orders))
        rest = [order for order in container.orders if order[0] != "setitem"]
        items = [("setitem", key, value) for key, value in entries.items()]
        orders = [*rest[:first], *items, *rest[first:]]
        return ForeignObject(container.func, container.args, container.kwargs, container.how, orders)
    if isinstance(container, OrderedDict):
        result: OrderedDict[Any, Any] = OrderedDict(entries)
        if hasattr(container, "_metadata"):
            result._metadata = container._metadata  # type: ignore[attr-defined]
        return result
    return dict(entries)


_MOST_DIGITS = 1000
_KINDS = "biufc"  # of NumPy's numbers: no objects, no text


class _NotPlainError(Exception):
    """A record that is no plain value after all."""


def build_plain(tree: Any) -> Any:
    """Give a tree with every record that stands for a plain value built; the same object where there is none.

    Cycles and shared values stay what they are where nothing in them is built.

    >>> build_plain({"root": ForeignObject(ForeignName("pathlib", "PurePosixPath"), ("data", "x"))})
    {'root': PurePosixPath('data/x')}
    """
    return _build(tree, {}, 0)


def _build(value: Any, done: dict[int, Any], depth: int) -> Any:
    if depth > 200 or not isinstance(value, (Mapping, list, tuple, set, frozenset, ForeignObject)):
        return value
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value
    if isinstance(value, ForeignObject):
        try:
            made = _value_of(value, done, depth)
        except (_NotPlainError, RefusedError, ValueError, TypeError, OverflowError, ArithmeticError):
            made = value
    elif isinstance(value, Mapping):
        entries = {key: _build(item, done, depth + 1) for key, item in value.items()}
        unchanged = all(entries[key] is item for key, item in value.items())
        made = value if unchanged else with_entries(value, entries)
    else:
        items = [_build(item, done, depth + 1) for item in value]
        unchanged = all(a is b for a, b in zip(items, value))
        made = value if unchanged else (tuple if isinstance(value, tuple) else type(value))(items)
    done[id(value)] = made
    return made


def _value_of(record: ForeignObject, done: dict[int, Any], depth: int) -> Any:
    name = record.func
    if not isinstance(name, ForeignName) or record.kwargs:
        raise _NotPlainError
    if name.module == "numpy" and name.name == "dtype":
        return _dtype(record)
    if name.name == "_reconstruct" and name.module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        array = numpy_array(record) if len(record.orders) == 1 else None
        if array is None:
            raise _NotPlainError
        return array
    build = _BUILDERS.get((name.module, name.name))
    if build is None or any(order[0] != "append" for order in record.orders):
        raise _NotPlainError
    args = [_build(arg, done, depth + 1) for arg in record.args]
    made = build(*args)
    for _, item in record.orders:
        if not isinstance(made, collections.deque):
            raise _NotPlainError
        made.append(_build(item, done, depth + 1))
    return made


def _dtype(record: Any) -> np.dtype[Any]:
    """A dtype of numbers: its code, and the order of its bytes from the state."""
    if isinstance(record, np.dtype):
        return record
    if not isinstance(record, ForeignObject) or not isinstance(record.func, ForeignName):
        raise _NotPlainError
    code = record.args[0] if record.args else None
    if (record.func.module, record.func.name) != ("numpy", "dtype") or not isinstance(code, str):
        raise _NotPlainError
    if len(code) > 3 or code[0] not in _KINDS:
        raise _NotPlainError
    states = [order[1] for order in record.orders if order[0] == "build"]
    order = states[0][1] if states and isinstance(states[0], tuple) and len(states[0]) > 1 else "="
    if order not in ("<", ">", "|", "="):
        raise _NotPlainError
    return np.dtype(order + code if order in "<>" else code)


def _scalar(dtype: Any, data: Any) -> Any:
    """A number; Python's own, which computes the same."""
    dtype = _dtype(dtype)
    if not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise _NotPlainError
    return np.frombuffer(data, dtype)[0].item()


def numpy_array(record: Any) -> np.ndarray[Any, Any] | None:
    """The array of numbers that a record stands for, in its own byte order; ``None`` if it is something else."""
    if not isinstance(record, ForeignObject) or not isinstance(record.func, ForeignName):
        return None
    if not record.func.module.startswith("numpy"):
        return None
    if record.func.name == "_reconstruct":
        states = [order[1] for order in record.orders if order[0] == "build"]
        if len(states) != 1 or not isinstance(states[0], tuple) or len(states[0]) != 5:
            return None
        _, shape, kind, fortran, data = states[0]
    elif record.func.name == "_frombuffer" and len(record.args) == 4:
        data, kind, shape, order = record.args
        fortran = order == "F"
    else:
        return None
    try:
        dtype = _dtype(kind)
    except (_NotPlainError, TypeError):
        return None
    if not isinstance(data, (bytes, bytearray)) or not isinstance(shape, tuple):
        return None
    if not all(type(length) is int and length >= 0 for length in shape):
        return None
    if math.prod(shape) * dtype.itemsize != len(data):
        raise RefusedError(f"a NumPy array of shape {shape} with {len(data)} bytes of data")
    flat = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C").copy("K")


def _made_of(cls: Any, *kinds: type, longest: float = math.inf) -> Callable[..., Any]:
    """An object of a class of Python's own, from arguments of these kinds only, none longer as text."""

    def build(*args: Any) -> Any:
        if not all(isinstance(arg, kinds) and (longest == math.inf or len(str(arg)) <= longest) for arg in args):
            raise _NotPlainError
        return cls(*args)

    return build


def _deque(items: Any = (), longest: Any = None) -> Any:
    if not isinstance(items, (list, tuple)) or not isinstance(longest, (int, type(None))):
        raise _NotPlainError
    return collections.deque(items, longest)


_TIMES = datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone
_OF_TIMES = bytes, str, int, datetime.timedelta, datetime.timezone, type(None)
_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{
        (module, name): _made_of(pathlib.PurePosixPath if "Pure" in name else pathlib.Path, str)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PurePath", "PosixPath", "PurePosixPath")
    },
    **{("datetime", cls.__name__): _made_of(cls, *_OF_TIMES) for cls in _TIMES},
    ("decimal", "Decimal"): _made_of(decimal.Decimal, str, longest=_MOST_DIGITS),
    ("fractions", "Fraction"): _made_of(fractions.Fraction, int, str, longest=_MOST_DIGITS),
    ("collections", "deque"): _deque,
    **{("builtins", cls.__name__): _made_of(cls, int, type(None)) for cls in (range, slice)},
}
