"""The exact allowlist: what a pickle may name and get for real. Everything else becomes an inert record.

Each entry maps a name to a function of our own (or a constant) that checks its arguments and builds plain data: tensors
over the file's own storages, sizes, dtypes and plain containers. Nothing here imports, and no function of the file's
choice is ever called.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.inert import ForeignName, ForeignObject
from lit_wsl.checkpoint.rebuild_tensors import (
    CONSTANTS,
    STORAGE_DTYPES,
    TENSOR_BUILDERS,
    ForeignUseError,
    RefusedError,
    Storage,
)
from lit_wsl.errors import CheckpointError

KEY_BUDGET = 256  # parts of one dict key; nested tuples hash in exponential time and unbounded recursion
MAX_INT_KEY = 1 << 60  # beyond, ints can be chosen so that their hashes all collide


def check_key(key: Any) -> Any:
    """Let only keys be hashed whose hash is cheap: scalars, strings, names, and small tuples of them."""
    budget = KEY_BUDGET
    stack = [key]
    while stack:
        budget -= 1
        if budget < 0:
            raise RefusedError("a dict key or set member of excessive size")
        part = stack.pop()
        if type(part) in (tuple, frozenset, torch.Size):
            stack.extend(part)
        elif isinstance(part, int):
            if not -MAX_INT_KEY < part < MAX_INT_KEY:
                raise RefusedError("an integer of excessive size as a dict key")
        elif isinstance(part, (Tensor, Storage, list, dict, set, bytearray)):
            raise RefusedError(f"a {type(part).__name__} as a dict key or set member")
    return key


def _rebuild_from_type(func: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """Build the plain tensor inside a tensor subclass, or a tensor that carries attributes; both extras are dropped."""
    builder = BUILDERS.get((func.module, func.name)) if isinstance(func, ForeignName) else None
    if builder is None or builder is _rebuild_from_type or not isinstance(args, tuple):
        raise ForeignUseError  # DTensor and other wrappers: a record, reported when it is among the weights
    return builder(*args)


def _set(items: Any = ()) -> set[Any]:
    return {check_key(item) for item in _members(items)}


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(check_key(item) for item in _members(items))


def _members(items: Any) -> Iterable[Any]:
    if isinstance(items, (ForeignName, ForeignObject)):
        raise ForeignUseError
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise RefusedError(f"a container made from a {type(items).__name__}")
    return items


def _pairs(items: Any) -> list[tuple[Any, Any]]:
    if isinstance(items, Mapping):
        return list(items.items())
    pairs = list(_members(items))
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise RefusedError("a dict made from something other than pairs")
    return [(check_key(key), value) for key, value in pairs]


def _ordered_dict(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(_pairs(items))


def _plain_dict(items: Any = ()) -> dict[Any, Any]:
    return dict(_pairs(items))


def _counter(items: Any = ()) -> Counter[Any]:
    result: Counter[Any] = Counter()
    for key, value in _pairs(items):
        dict.__setitem__(result, key, value)
    return result


_FACTORIES = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str, "tuple": tuple}


def _defaultdict(factory: Any = None, items: Any = ()) -> defaultdict[Any, Any]:
    known = None
    if factory is not None:
        known = _FACTORIES.get(factory.name) if isinstance(factory, ForeignName) else None
        if known is None or factory.module != "builtins":
            raise ForeignUseError
    return defaultdict(known, _pairs(items))


def _list(items: Any = ()) -> list[Any]:
    return list(_members(items))


def _tuple(items: Any = ()) -> tuple[Any, ...]:
    return tuple(_members(items))


def _complex(real: Any = 0.0, imag: Any = 0.0) -> complex:
    if not isinstance(real, (int, float)) or not isinstance(imag, (int, float)):
        raise RefusedError("a complex number made from something other than numbers")
    return complex(real, imag)


def _octets(value: Any, encoding: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and encoding in (None, "latin1", "latin-1"):
        return value.encode("latin-1")
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 256 for item in value):
        return bytes(value)
    raise RefusedError("bytes made from something other than bytes")  # bytes(10**12) would be a memory bomb


def _bytes(value: Any = b"", encoding: Any = None) -> bytes:
    return _octets(value, encoding)


def _bytearray(value: Any = b"", encoding: Any = None) -> bytearray:
    return bytearray(_octets(value, encoding))


def _encode(value: Any, encoding: Any = None) -> bytes:
    # pickle's protocols 0 to 2 write bytes as _codecs.encode(text, "latin1"); any other codec would be an import
    if not isinstance(value, str) or encoding != "latin1":
        raise RefusedError("a text codec other than latin1")
    return value.encode("latin-1")


BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    **TENSOR_BUILDERS,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "Counter"): _counter,
    ("collections", "defaultdict"): _defaultdict,
    ("builtins", "dict"): _plain_dict,
    ("builtins", "list"): _list,
    ("builtins", "tuple"): _tuple,
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): _frozenset,
    ("builtins", "complex"): _complex,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("_codecs", "encode"): _encode,
}


def is_known(name: ForeignName) -> bool:
    """Whether a name stands on the allowlist (as a function, a storage class or a constant)."""
    key = (name.module, name.name)
    return key in BUILDERS or key in STORAGE_DTYPES or key in CONSTANTS


def build(func: ForeignName, args: tuple[Any, ...]) -> Any:
    """Call our own function for an allowed name.

    Raises:
        ForeignUseError: if the name is not allowed, or its arguments make it foreign.
        RefusedError: if the arguments are of a form that no honest file has.
    """
    builder = BUILDERS.get((func.module, func.name))
    if builder is None:
        raise ForeignUseError
    try:
        return builder(*args)
    except (RefusedError, ForeignUseError, CheckpointError):
        raise
    except Exception as error:  # a wrong number of arguments, or torch's own checks
        raise RefusedError(f"{func} with unusable arguments ({type(error).__name__}: {str(error)[:200]})") from error
