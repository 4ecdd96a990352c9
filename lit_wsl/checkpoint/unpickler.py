"""A pickle machine that runs no code: it imports nothing, calls only the allowlist, and is bounded.

The operations are those of the standard library's ``pickle._Unpickler`` for all protocols (0 to 5), but for the ones
that could act:

* a global is a :class:`~lit_wsl.checkpoint.records.ForeignName`, never an import;
* REDUCE, NEWOBJ, NEWOBJ_EX, OBJ and INST call a function of the exact allowlist, or else write down a record;
* BUILD, APPEND(S) and SETITEM(S) fill plain containers and records, never an object of the file's choice;
* the extension registry, text persistent ids and out-of-band buffers are refused;
* every length is checked against the bytes that are left before anything is allocated, and the number of steps, of
  containers and the depth of the result are limited.
"""

from __future__ import annotations

import _compat_pickle
import codecs
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint import allowlist
from lit_wsl.checkpoint.allowlist import RefusedError, check_key
from lit_wsl.checkpoint.records import ForeignName, ForeignObject, children_of

MAX_STEPS = 60_000_000  # a checkpoint of a million tensors with Adam's states takes about 50 million
MAX_MEMORY = 6 << 30  # bytes of Python objects, roughly; honest files take about 25 bytes for one byte of pickle
MEMORY_PER_BYTE = 64
MAX_DEPTH = 1000  # nested containers; Python's own pickler stops near here too
MAX_INTEGER = 1024  # bytes of one integer, or of a number written as text
MAX_EXPANSION = 100_000_000  # values if shared containers were written out: "billion laughs"
CONTAINERS = (Mapping, list, tuple, set, frozenset)
LoadStorage = Callable[[torch.dtype, str, int], allowlist.Storage]
_PythonUnpickler: Any = pickle._Unpickler  # the C unpickler's operations cannot be replaced


class _RecordUnpickler(_PythonUnpickler):
    """One run of a pickle; :meth:`load` gives its value."""

    dispatch = _PythonUnpickler.dispatch.copy()

    def __init__(self, data: memoryview, start: int, load_storage: LoadStorage | None) -> None:
        self.data = data
        self.at = start
        self.load_storage = load_storage
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], ForeignName] = {}
        self.foreign_uses: set[str] = set()
        self.memory = 0
        self.memory_limit = min(MAX_MEMORY, (256 << 20) + MEMORY_PER_BYTE * len(data))
        self.lossy = False

    def load(self) -> Any:
        """Run the operations up to STOP."""
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        table, data, end = self.dispatch, self.data, len(self.data)
        try:
            for _ in range(MAX_STEPS):
                at = self.at
                if at >= end:
                    raise RefusedError("a pickle that ends before its STOP (the file is truncated or damaged)")
                self.at = at + 1
                operation = table.get(data[at])
                if operation is None:
                    raise RefusedError(f"a damaged pickle (no operation has the code {data[at]:#04x})")
                operation(self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise RefusedError(f"a pickle of more than {MAX_STEPS} operations")

    # ---- reading and counting ----------------------------------------------------------------------------------------

    def read(self, length: int) -> bytes:
        """The next bytes, which must be there."""
        end = self.at + length
        if length < 0 or end > len(self.data):
            raise RefusedError("a pickle with a length beyond its end (the file is truncated or damaged)")
        part = bytes(self.data[self.at : end])
        self.at = end
        return part

    def readinto(self, buffer: bytearray) -> None:
        """Not used: BYTEARRAY8 reads its bytes before it allocates."""
        raise NotImplementedError

    def readline(self) -> bytes:
        """The next line; a long one is looked for in growing steps, since text operands are names and numbers."""
        span = 256
        while True:
            chunk = bytes(self.data[self.at : self.at + span])
            found = chunk.find(b"\n")
            if found >= 0:
                self.at += found + 1
                return chunk[: found + 1]
            if len(chunk) < span:
                raise RefusedError("a pickle with an unfinished text line (the file is truncated or damaged)")
            span *= 4

    def charge(self, size: int) -> None:
        """Count the approximate bytes of what is built; most operations cannot exceed the limit, copies could."""
        self.memory += size
        if self.memory > self.memory_limit:
            raise RefusedError("a pickle that builds far more objects than its size explains")

    def _decode_string(self, value: bytes) -> str | bytes:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value

    # ---- what names and calls become -------------------------------------------------------------------------------

    def find_class(self, module: str, name: str) -> Any:
        """A record of a global; names of Python 2 as the standard library maps them."""
        if (module, name) in _compat_pickle.NAME_MAPPING:
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        elif module in _compat_pickle.IMPORT_MAPPING:
            module = _compat_pickle.IMPORT_MAPPING[module]
        found = self.names.get((module, name))
        if found is None:
            found = self.names[module, name] = ForeignName(module, name)
        return allowlist.CONSTANTS.get((module, name), found)

    def call(self, func: Any, args: Any, how: str, kwargs: dict[str, Any] | None = None) -> None:
        """Push what an allowed function builds, or a record of the call."""
        if type(args) is not tuple:
            raise RefusedError("a call whose arguments are not a tuple")
        self.charge(800 + 8 * sum(len(arg) for arg in args if isinstance(arg, (*CONTAINERS, str, bytes, bytearray))))
        if not isinstance(func, (ForeignName, ForeignObject)):
            raise RefusedError(f"a call of a {type(func).__name__}, which is not a class or function")
        if isinstance(func, ForeignName) and not kwargs:
            try:
                if func.name in ("_rebuild_from_type_v2", "_rebuild_parameter_with_state"):
                    self.lossy = self.lossy or any(args[-1:])  # attributes set on a tensor are dropped
                self.append(allowlist.build(func, args))
                return
            except allowlist.ForeignUseError:
                self.foreign_uses.update({str(func)} if allowlist.is_known(func) else ())
        self.append(ForeignObject(func, args, kwargs or {}, how))

    def _instantiate(self, klass: Any, args: list[Any]) -> None:  # OBJ and INST
        self.call(klass, tuple(args), "reduce")

    def persistent_load(self, saved: Any) -> allowlist.Storage:
        """Resolve ``("storage", class, key, location, number of elements[, view])`` and nothing else."""
        if self.load_storage is None:
            raise RefusedError("a persistent id outside a torch file")
        if type(saved) is not tuple or len(saved) not in (5, 6) or saved[0] not in ("storage", b"storage"):
            raise RefusedError("a persistent id that is not one of torch's storages")
        kind, key, location, numel = saved[1:5]
        dtype = allowlist.STORAGE_DTYPES.get((kind.module, kind.name)) if isinstance(kind, ForeignName) else None
        if dtype is None:
            raise RefusedError(f"a storage of unknown class {kind!r:.100}")
        if not isinstance(key, str) or not isinstance(location, (str, bytes)) or type(numel) is not int or numel < 0:
            raise RefusedError("a storage without key, location and size")
        found = self.load_storage(dtype, key, numel)
        view = saved[5] if len(saved) == 6 else None
        if view is None:
            return found
        if type(view) is not tuple or len(view) != 3 or not all(type(item) is int and item >= 0 for item in view[1:]):
            raise RefusedError("a storage view of unknown form")
        first, last = view[1] * dtype.itemsize, (view[1] + view[2]) * dtype.itemsize
        if last > found.nbytes:
            raise RefusedError("a storage view beyond its storage")
        return allowlist.Storage(f"{key}/{view[0]!r:.50}", dtype, found.data[first:last])

    # ---- operations that differ --------------------------------------------------------------------------------------

    def extend(self, items: list[Any]) -> None:
        """APPEND and APPENDS."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, ForeignObject):
            self.charge(60 * len(items))
            target.orders.extend(("append", item) for item in items)
        else:
            raise RefusedError(f"an append to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        """SETITEM, SETITEMS and DICT."""
        target = self.stack[-1]
        if len(items) % 2:
            raise RefusedError("a damaged pickle (a key without a value)")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2]):
                if type(key) is not str:
                    check_key(key)
                target[key] = value
        elif isinstance(target, ForeignObject):
            self.charge(40 * len(items))
            target.orders.extend(("setitem", check_key(k), v) for k, v in zip(items[::2], items[1::2]))
        else:
            raise RefusedError(f"an item set on a {type(target).__name__}")

    def add_items(self, items: list[Any]) -> None:
        """ADDITEMS."""
        target = self.stack[-1]
        if type(target) is not set:
            raise RefusedError(f"a member added to a {type(target).__name__}")
        target.update(check_key(item) for item in items)

    def make_dict(self, items: list[Any]) -> None:
        """DICT."""
        self.append({})
        self.set_items(items)

    def make_frozenset(self, items: list[Any]) -> None:
        """FROZENSET."""
        self.append(frozenset(check_key(item) for item in items))

    def build(self, state: Any) -> None:
        """BUILD."""
        target = self.stack[-1]
        if isinstance(target, ForeignObject):
            target.orders.append(("build", state))
        elif isinstance(target, OrderedDict) and isinstance(state, dict) and set(map(str, state)) <= {"_metadata"}:
            # the one attribute that nn.Module.state_dict sets; any other could hide a method of the dict
            if isinstance(state.get("_metadata"), dict):
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        elif isinstance(target, (dict, Tensor, set, list)):
            self.lossy = True  # attributes on plain containers and tensors are dropped
        else:
            raise RefusedError(f"a state for a {type(target).__name__}")

    def new_with_keywords(self, kwargs: Any) -> None:
        """NEWOBJ_EX."""
        func, args = _last_two(self)
        if type(kwargs) is not dict or not all(isinstance(key, str) for key in kwargs):
            raise RefusedError("a call whose keyword arguments are not a dict of names")
        self.call(func, args, "newobj", kwargs)

    def mark(self) -> None:
        """MARK, not too deep."""
        _PythonUnpickler.load_mark(self)
        if len(self.metastack) > MAX_DEPTH * 4:
            raise RefusedError("marks nested too deep")

    def long4(self) -> None:
        """LONG4, of a size that takes no quadratic time to print."""
        (length,) = struct.unpack("<i", self.read(4))
        if not 0 <= length <= MAX_INTEGER:
            raise RefusedError("an integer of excessive size")
        self.append(pickle.decode_long(self.read(length)))

    def bytearray8(self) -> None:
        """BYTEARRAY8, allocated after its length was checked."""
        self.append(bytearray(self.read(*struct.unpack("<Q", self.read(8)))))

    def refuse(self) -> None:
        """What only an attacker writes."""
        raise RefusedError("an operation that no checkpoint needs (extension registry, persistent text id or buffer)")


_U = _RecordUnpickler
_CHARGES = {  # bytes of what an operation of one byte builds
    **dict.fromkeys((pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.TUPLE, pickle.LIST, pickle.DICT), 100),
    **dict.fromkeys((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), 70),
    pickle.FROZENSET: 220,
    pickle.EMPTY_SET: 220,
    pickle.MARK: 60,
}
_NUMBERS_AS_TEXT = (pickle.INT, pickle.LONG, pickle.FLOAT, pickle.PUT, pickle.GET)


def _charged(operation: Callable[[Any], None], size: int) -> Callable[[Any], None]:
    def run(unpickler: _RecordUnpickler) -> None:
        unpickler.charge(size)
        operation(unpickler)

    return run


def _short(operation: Callable[[Any], None]) -> Callable[[Any], None]:
    """Refuses a long line: turning digits into an integer takes quadratic time."""

    def run(unpickler: _RecordUnpickler) -> None:
        at = unpickler.at
        if len(unpickler.readline()) > MAX_INTEGER:
            raise RefusedError("a number of excessive size")
        unpickler.at = at
        operation(unpickler)

    return run


_OPERATIONS: dict[bytes, Callable[[Any], Any]] = {
    pickle.FRAME: lambda u: u.read(8),  # frames are hints for buffering only
    # the standard library looks its codec up, which imports it
    pickle.UNICODE: lambda u: u.append(codecs.raw_unicode_escape_decode(u.readline()[:-1])[0]),
    pickle.REDUCE: lambda u: u.call(*_last_two(u), "reduce"),
    pickle.NEWOBJ: lambda u: u.call(*_last_two(u), "newobj"),
    pickle.NEWOBJ_EX: lambda u: u.new_with_keywords(u.stack.pop()),
    pickle.BUILD: lambda u: u.build(u.stack.pop()),
    pickle.APPEND: lambda u: u.extend([u.stack.pop()]),
    pickle.APPENDS: lambda u: u.extend(u.pop_mark()),
    pickle.SETITEM: lambda u: u.set_items(list(_last_two(u))),
    pickle.SETITEMS: lambda u: u.set_items(u.pop_mark()),
    pickle.ADDITEMS: lambda u: u.add_items(u.pop_mark()),
    pickle.DICT: lambda u: u.make_dict(u.pop_mark()),
    pickle.FROZENSET: lambda u: u.make_frozenset(u.pop_mark()),
    pickle.MARK: _U.mark,
    pickle.LONG4: _U.long4,
    pickle.BYTEARRAY8: _U.bytearray8,
    **dict.fromkeys((pickle.PERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4), _U.refuse),
    **dict.fromkeys((pickle.NEXT_BUFFER, pickle.READONLY_BUFFER), _U.refuse),
}


def _last_two(unpickler: _RecordUnpickler) -> tuple[Any, Any]:
    last = unpickler.stack.pop()
    return unpickler.stack.pop(), last


_U.dispatch.update({code[0]: operation for code, operation in _OPERATIONS.items()})
_U.dispatch.update({code[0]: _charged(_U.dispatch[code[0]], size) for code, size in _CHARGES.items()})
_U.dispatch.update({code[0]: _short(_U.dispatch[code[0]]) for code in _NUMBERS_AS_TEXT})

OPERATIONS: Mapping[int, Callable[[Any], None]] = _U.dispatch
"""What each code of a pickle does here."""


@dataclass(frozen=True)
class Unpickled:
    """What one pickle holds."""

    value: Any  # the tree; tensors over the file's storages, plain containers and inert records
    stubbed: tuple[str, ...]  # dotted names of the foreign classes and functions in it, sorted
    known: tuple[str, ...]  # dotted names of the allowed ones, sorted
    end: int  # where in the data the pickle ends
    lossy: bool  # whether something was dropped that writing the tree again would not bring back


def unpickle(data: memoryview | bytes, start: int = 0, load_storage: LoadStorage | None = None) -> Unpickled:
    """Read one pickle without running any of it."""
    machine = _RecordUnpickler(memoryview(data), start, load_storage)
    try:
        value = machine.load()
    except RefusedError:
        raise
    except IndexError as error:
        raise RefusedError("a damaged pickle (an operation without operands)") from error
    except (
        pickle.UnpicklingError,
        struct.error,
        UnicodeError,
        ValueError,
        TypeError,
        OverflowError,
        KeyError,
        AttributeError,
    ) as error:
        raise RefusedError(f"a damaged pickle ({type(error).__name__}: {str(error)[:200]})") from error
    except (RecursionError, MemoryError) as error:
        raise RefusedError("a pickle that needs excessive memory") from error
    check_tree(value)
    names = machine.names.values()
    return Unpickled(
        value=value,
        stubbed=tuple(
            sorted({_shown(str(name)) for name in names if not allowlist.is_known(name)} | machine.foreign_uses)
        ),
        known=tuple(sorted(str(name) for name in names if allowlist.is_known(name))),
        end=machine.at,
        lossy=machine.lossy,
    )


def _shown(name: str) -> str:
    """A name for people: a file can put terminal commands, or a megabyte of letters, into the name of a class."""
    printable = name if name.isprintable() else ascii(name)[1:-1]
    return printable if len(printable) <= 200 else f"{printable[:200]}..."


def check_tree(root: Any) -> None:
    """Refuse a tree too deep, or one whose shared containers write out to an astronomical size.

    A depth-first walk without recursion. ``size[id]`` counts the values under a container as if nothing were shared;
    what is still open is an ancestor, and counts as one (a cycle).
    """
    if not isinstance(root, (*CONTAINERS, ForeignObject)):
        return
    sizes: dict[int, int] = {id(root): 1}
    stack = [(root, iter(list(children_of(root))))]
    while stack:
        value, children = stack[-1]
        for child in children:
            if not isinstance(child, (*CONTAINERS, ForeignObject)):
                sizes[id(value)] += 1
                continue
            known = sizes.get(id(child))
            if known is None:
                sizes[id(child)] = 1
                stack.append((child, iter(list(children_of(child)))))
                break
            sizes[id(value)] += known
        else:
            stack.pop()
            size = sizes[id(value)]
            if size > MAX_EXPANSION:
                raise RefusedError("containers nested in each other to an astronomical size")
            if isinstance(value, ForeignObject):
                sizes[id(value)] = 1  # walks treat a record as one value
            if stack:
                sizes[id(stack[-1][0])] += sizes[id(value)]
        if len(stack) > MAX_DEPTH:
            raise RefusedError(f"containers nested more than {MAX_DEPTH} deep")
