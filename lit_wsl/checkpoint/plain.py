"""Records of plain values, built as the values that they are: numbers and arrays of NumPy, paths, dates.

Optimizers, schedulers and callbacks keep a learning rate as ``numpy.float64`` or a folder as ``pathlib.Path``. Such a
value is data, and each is built here by a function of our own from the record's parts; no name of the file is looked
up, and a record of any other class stays a record.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lit_wsl.checkpoint.document import with_entries
from lit_wsl.checkpoint.records import ForeignName, ForeignObject

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
        except (_NotPlainError, ValueError, TypeError, OverflowError, ArithmeticError):
            made = value
    elif isinstance(value, Mapping):
        entries = {key: _build(item, done, depth + 1) for key, item in value.items()}
        unchanged = all(entries[key] is item for key, item in value.items())
        made = value if unchanged else with_entries(value, entries)
    else:
        items = [_build(item, done, depth + 1) for item in value]
        unchanged = all(a is b for a, b in zip(items, value))
        made = value if unchanged else _like(value, items)
    done[id(value)] = made
    return made


def _like(value: Any, items: list[Any]) -> Any:
    if isinstance(value, tuple) and type(value) is not tuple:
        return tuple(items)
    return type(value)(items)


def _value_of(record: ForeignObject, done: dict[int, Any], depth: int) -> Any:
    name = record.func
    if not isinstance(name, ForeignName) or record.kwargs:
        raise _NotPlainError
    if name.module == "numpy" and name.name == "dtype":
        return _dtype(record)
    if name.name == "_reconstruct" and name.module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        return _array(record)
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


def _array(record: ForeignObject) -> Any:
    states = [order[1] for order in record.orders if order[0] == "build"]
    if len(states) != 1 or len(record.orders) != 1 or not isinstance(states[0], tuple) or len(states[0]) != 5:
        raise _NotPlainError
    _, shape, dtype, fortran, data = states[0]
    numbers = _dtype(dtype)
    if not isinstance(data, bytes) or not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise _NotPlainError
    array = np.frombuffer(data, numbers)
    return array.reshape(shape, order="F" if fortran else "C").copy()


def _path(cls: type[pathlib.PurePath]) -> Callable[..., Any]:
    def build(*parts: Any) -> Any:
        if not all(isinstance(part, str) for part in parts):
            raise _NotPlainError
        return cls(*parts)

    return build


def _moment(cls: Any) -> Callable[..., Any]:
    """A date or time, from its bytes or numbers."""

    def build(*args: Any) -> Any:
        plain = (bytes, str, int, datetime.timedelta, datetime.timezone, type(None))
        if not all(isinstance(arg, plain) for arg in args):
            raise _NotPlainError
        return cls(*args)

    return build


def _decimal(text: Any) -> Any:
    if not isinstance(text, str) or len(text) > _MOST_DIGITS:
        raise _NotPlainError
    return decimal.Decimal(text)


def _fraction(*parts: Any) -> Any:
    if not all(isinstance(part, (int, str)) and len(str(part)) <= _MOST_DIGITS for part in parts):
        raise _NotPlainError
    return fractions.Fraction(*parts)


def _deque(items: Any = (), longest: Any = None) -> Any:
    if not isinstance(items, (list, tuple)) or not isinstance(longest, (int, type(None))):
        raise _NotPlainError
    return collections.deque(items, longest)


def _numbers(cls: Any) -> Callable[..., Any]:
    def build(*args: Any) -> Any:
        if not all(isinstance(arg, (int, type(None))) for arg in args):
            raise _NotPlainError
        return cls(*args)

    return build


_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{
        (module, name): _path(pathlib.PurePosixPath if "Pure" in name else pathlib.Path)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PurePath", "PosixPath", "PurePosixPath")
    },
    **{("datetime", cls.__name__): _moment(cls) for cls in (datetime.date, datetime.datetime, datetime.time)},
    **{("datetime", cls.__name__): _moment(cls) for cls in (datetime.timedelta, datetime.timezone)},
    ("decimal", "Decimal"): _decimal,
    ("fractions", "Fraction"): _fraction,
    ("collections", "deque"): _deque,
    ("builtins", "range"): _numbers(range),
    ("builtins", "slice"): _numbers(slice),
}


__all__ = ["build_plain"]
