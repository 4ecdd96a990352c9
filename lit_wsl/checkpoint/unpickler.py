# ruff: noqa: D102
"""A pickle machine that runs no code: it imports nothing, calls only the allowlist, and is bounded.

A pickle is a program for a stack machine (see the standard library's ``pickletools``). This is such a machine for all
protocols (0 to 5), written for untrusted input:

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


MAX_INTEGER = 1024  # bytes of one integer


CONTAINERS = (Mapping, list, tuple, set, frozenset)


LoadStorage = Callable[[torch.dtype, str, int], allowlist.Storage]


class Core:
    """One run of a pickle; :meth:`run` gives its value.

    Attributes:
        table: The operations by their codes.
    """

    table: Mapping[int, Callable[[Any], Any]] = {}

    def __init__(self, data: memoryview, start: int, load_storage: LoadStorage | None) -> None:
        self.data = data
        self.at = start
        self.load_storage = load_storage
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], ForeignName] = {}
        self.foreign_uses: set[str] = set()
        self.memory = 0
        self.memory_limit = min(MAX_MEMORY, (256 << 20) + MEMORY_PER_BYTE * len(data))
        self.lossy = False

    def run(self) -> Any:
        table, stop = self.table, self.table[pickle.STOP[0]]
        data = self.data
        end = len(data)
        for _ in range(MAX_STEPS):
            at = self.at
            if at >= end:
                raise RefusedError("a pickle that ends before its STOP (the file is truncated or damaged)")
            self.at = at + 1
            operation = table.get(data[at])
            if operation is None:
                raise RefusedError(f"a damaged pickle (no operation has the code {data[at]:#04x})")
            if operation is stop:
                return stop(self)
            operation(self)
        raise RefusedError(f"a pickle of more than {MAX_STEPS} operations")

    # reading

    def take(self, length: int) -> memoryview:
        end = self.at + length
        if length < 0 or end > len(self.data):
            raise RefusedError("a pickle with a length beyond its end (the file is truncated or damaged)")
        part = self.data[self.at : end]
        self.at = end
        return part

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, form: str, size: int) -> Any:
        return struct.unpack(form, self.take(size))[0]

    def line(self) -> bytes:
        # bounded look-ahead: text operands are names and numbers; a long one is looked for in growing steps
        span = 256
        while True:
            chunk = bytes(self.data[self.at : self.at + span])
            found = chunk.find(b"\n")
            if found >= 0:
                self.at += found + 1
                return chunk[:found]
            if len(chunk) < span:
                raise RefusedError("a pickle with an unfinished text line (the file is truncated or damaged)")
            span *= 4

    # the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def made(self, value: Any, size: int = 100) -> None:
        self.charge(size)
        self.stack.append(value)

    def charge(self, size: int) -> None:
        """Count the approximate bytes of what is built; most operations cannot exceed the limit, copies could."""
        self.memory += size
        if self.memory > self.memory_limit:
            raise RefusedError("a pickle that builds far more objects than its size explains")

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.metastack.pop()
        return items

    def name(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedError("a global whose name is not text")
        # Python 2 names, as the standard library maps them
        if (module, name) in _compat_pickle.NAME_MAPPING:
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        elif module in _compat_pickle.IMPORT_MAPPING:
            module = _compat_pickle.IMPORT_MAPPING[module]
        found = self.names.get((module, name))
        if found is None:
            found = self.names[module, name] = ForeignName(module, name)
        return allowlist.CONSTANTS.get((module, name), found)

    def call(self, func: Any, args: Any, how: str, kwargs: dict[str, Any] | None = None) -> Any:
        if type(args) is not tuple:
            raise RefusedError("a call whose arguments are not a tuple")
        self.charge(700 + 8 * sum(len(arg) for arg in args if isinstance(arg, (*CONTAINERS, str, bytes, bytearray))))
        if not isinstance(func, (ForeignName, ForeignObject)):
            raise RefusedError(f"a call of a {type(func).__name__}, which is not a class or function")
        if isinstance(func, ForeignName) and not kwargs:
            try:
                if func.name in ("_rebuild_from_type_v2", "_rebuild_parameter_with_state"):
                    self.lossy = self.lossy or any(args[-1:])  # attributes set on a tensor are dropped
                return allowlist.build(func, args)
            except allowlist.ForeignUseError:
                self.foreign_uses.update({str(func)} if allowlist.is_known(func) else ())
        return ForeignObject(func, args, kwargs or {}, how)


class Machine(Core):
    """The operations, each a method; the standard library's ``pickletools`` describes them."""

    # operations: constants and text

    def stop(self) -> Any:
        return self.stack.pop()

    def proto(self) -> None:
        if self.byte() > pickle.HIGHEST_PROTOCOL:
            raise RefusedError("a pickle of an unknown protocol")

    def frame(self) -> None:
        self.take(8)  # frames are hints for buffering only

    def int_line(self) -> None:
        text = self.line()
        if text in (b"00", b"01"):
            self.push(text == b"01")
        else:
            self.push(_decimal(text))

    def long_line(self) -> None:
        self.push(_decimal(self.line().removesuffix(b"L")))

    def long(self, length: int) -> None:
        if not 0 <= length <= MAX_INTEGER:
            raise RefusedError("an integer of excessive size")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def float_line(self) -> None:
        text = self.line()
        if len(text) > 400:
            raise RefusedError("a number of excessive size")
        self.push(float(text))

    def string_line(self) -> None:
        text = self.line()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b'"', b"'"):
            raise RefusedError("a damaged pickle (a text without quotes)")
        self.push(_python2_text(codecs.escape_decode(text[1:-1])[0]))

    def text(self, length: int) -> None:
        self.push(str(self.take(length), "utf-8", "surrogatepass"))

    # operations: containers

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]
        self.charge(70)

    def fill_list(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, ForeignObject):
            self.charge(60 * len(items))
            target.orders.extend(("append", item) for item in items)
        else:
            raise RefusedError(f"an append to a {type(target).__name__}")

    def fill_dict(self, items: list[Any]) -> None:
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

    def fill_set(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise RefusedError(f"a member added to a {type(target).__name__}")
        target.update(check_key(item) for item in items)

    def dict_of_mark(self) -> None:
        items = self.pop_mark()
        self.made({})
        self.fill_dict(items)

    # operations: objects

    def reduce(self) -> None:
        args = self.stack.pop()
        self.made(self.call(self.stack.pop(), args, "reduce"))

    def new(self) -> None:
        args = self.stack.pop()
        self.made(self.call(self.stack.pop(), args, "newobj"))

    def new_ex(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        if type(kwargs) is not dict or not all(isinstance(key, str) for key in kwargs):
            raise RefusedError("a call whose keyword arguments are not a dict of names")
        self.made(self.call(self.stack.pop(), args, "newobj", kwargs))

    def inst(self) -> None:
        module, name = self.line().decode("ascii"), self.line().decode("utf-8")
        args = tuple(self.pop_mark())
        self.made(self.call(self.name(module, name), args, "reduce"))

    def obj(self) -> None:
        items = self.pop_mark()
        self.made(self.call(items[0], tuple(items[1:]), "reduce"))

    def build(self) -> None:
        state = self.stack.pop()
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

    def stack_global(self) -> None:
        name = self.stack.pop()
        self.push(self.name(self.stack.pop(), name))

    def global_lines(self) -> None:
        module = self.line().decode("utf-8")
        self.push(self.name(module, self.line().decode("utf-8")))

    def persistent(self) -> None:
        self.push(self.storage(self.stack.pop()))

    def storage(self, saved: Any) -> allowlist.Storage:
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

    # operations: stack and memo

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def mark(self) -> None:
        self.metastack.append(self.stack)
        self.stack = []
        self.charge(60)
        if len(self.metastack) > MAX_DEPTH * 4:
            raise RefusedError("marks nested too deep")

    def put(self, index: int) -> None:
        if index < 0:
            raise RefusedError("a damaged pickle (a negative memo index)")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise RefusedError("a damaged pickle (a memo that was never set)")
        self.push(self.memo[index])

    def forbidden(self) -> None:
        raise RefusedError("an operation that no checkpoint needs (extension registry, persistent text id or buffer)")


def _decimal(text: bytes) -> int:
    if len(text) > MAX_INTEGER:
        raise RefusedError("an integer of excessive size")
    return int(text)


def _python2_text(raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


_M = Machine


DISPATCH: dict[int, Callable[[Machine], Any]] = {
    operation[0]: action
    for operation, action in {
        pickle.STOP: _M.stop,
        pickle.PROTO: _M.proto,
        pickle.FRAME: _M.frame,
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.INT: _M.int_line,
        pickle.LONG: _M.long_line,
        pickle.BININT: lambda m: m.push(m.number("<i", 4)),
        pickle.BININT1: lambda m: m.push(m.byte()),
        pickle.BININT2: lambda m: m.push(m.number("<H", 2)),
        pickle.LONG1: lambda m: m.long(m.byte()),
        pickle.LONG4: lambda m: m.long(m.number("<i", 4)),
        pickle.FLOAT: _M.float_line,
        pickle.BINFLOAT: lambda m: m.push(m.number(">d", 8)),
        pickle.STRING: _M.string_line,
        pickle.BINSTRING: lambda m: m.push(_python2_text(bytes(m.take(m.number("<i", 4))))),
        pickle.SHORT_BINSTRING: lambda m: m.push(_python2_text(bytes(m.take(m.byte())))),
        pickle.UNICODE: lambda m: m.push(codecs.raw_unicode_escape_decode(m.line())[0]),
        pickle.BINUNICODE: lambda m: m.text(m.number("<I", 4)),
        pickle.SHORT_BINUNICODE: lambda m: m.text(m.byte()),
        pickle.BINUNICODE8: lambda m: m.text(m.number("<Q", 8)),
        pickle.BINBYTES: lambda m: m.push(bytes(m.take(m.number("<I", 4)))),
        pickle.SHORT_BINBYTES: lambda m: m.push(bytes(m.take(m.byte()))),
        pickle.BINBYTES8: lambda m: m.push(bytes(m.take(m.number("<Q", 8)))),
        pickle.BYTEARRAY8: lambda m: m.push(bytearray(m.take(m.number("<Q", 8)))),
        pickle.EMPTY_TUPLE: lambda m: m.push(()),
        pickle.EMPTY_LIST: lambda m: m.made([]),
        pickle.EMPTY_DICT: lambda m: m.made({}),
        pickle.EMPTY_SET: lambda m: m.made(set(), 220),
        pickle.TUPLE: lambda m: m.made(tuple(m.pop_mark())),
        pickle.TUPLE1: lambda m: m.tuple_of(1),
        pickle.TUPLE2: lambda m: m.tuple_of(2),
        pickle.TUPLE3: lambda m: m.tuple_of(3),
        pickle.LIST: lambda m: m.made(m.pop_mark()),
        pickle.DICT: _M.dict_of_mark,
        pickle.FROZENSET: lambda m: m.made(frozenset(check_key(item) for item in m.pop_mark())),
        pickle.APPEND: lambda m: m.fill_list([m.stack.pop()]),
        pickle.APPENDS: lambda m: m.fill_list(m.pop_mark()),
        pickle.SETITEM: lambda m: m.fill_dict([m.stack.pop(), m.stack.pop()][::-1]),
        pickle.SETITEMS: lambda m: m.fill_dict(m.pop_mark()),
        pickle.ADDITEMS: _M.fill_set,
        pickle.GLOBAL: _M.global_lines,
        pickle.STACK_GLOBAL: _M.stack_global,
        pickle.REDUCE: _M.reduce,
        pickle.NEWOBJ: _M.new,
        pickle.NEWOBJ_EX: _M.new_ex,
        pickle.INST: _M.inst,
        pickle.OBJ: _M.obj,
        pickle.BUILD: _M.build,
        pickle.BINPERSID: _M.persistent,
        pickle.POP: _M.pop,
        pickle.POP_MARK: _M.pop_mark,
        pickle.MARK: _M.mark,
        pickle.DUP: lambda m: m.push(m.stack[-1]),
        pickle.PUT: lambda m: m.put(_decimal(m.line())),
        pickle.BINPUT: lambda m: m.put(m.byte()),
        pickle.LONG_BINPUT: lambda m: m.put(m.number("<I", 4)),
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
        pickle.GET: lambda m: m.get(_decimal(m.line())),
        pickle.BINGET: lambda m: m.get(m.byte()),
        pickle.LONG_BINGET: lambda m: m.get(m.number("<I", 4)),
        pickle.PERSID: _M.forbidden,
        pickle.EXT1: _M.forbidden,
        pickle.EXT2: _M.forbidden,
        pickle.EXT4: _M.forbidden,
        pickle.NEXT_BUFFER: _M.forbidden,
        pickle.READONLY_BUFFER: _M.forbidden,
    }.items()
}


Machine.table = DISPATCH


MAX_EXPANSION = 100_000_000  # values if shared containers were written out: "billion laughs"


@dataclass(frozen=True)
class Unpickled:
    """What one pickle holds.

    Attributes:
        value: the tree; tensors over the file's storages, plain containers and inert records.
        stubbed: dotted names of the foreign classes and functions in it, sorted.
        known: dotted names of the allowed ones, sorted.
        end: where in the data the pickle ends.
        lossy: whether something was dropped that writing the tree again would not bring back.
    """

    value: Any
    stubbed: tuple[str, ...]
    known: tuple[str, ...]
    end: int
    lossy: bool


def unpickle(data: memoryview | bytes, start: int = 0, load_storage: LoadStorage | None = None) -> Unpickled:
    """Read one pickle without running any of it.

    Args:
        data: the bytes.
        start: where the pickle begins.
        load_storage: gives the storage of a torch persistent id from ``(dtype, key, number of elements)``;
            without it, persistent ids are refused.

    Raises:
        RefusedError: if the pickle is damaged, or does something that no honest checkpoint does.
    """
    machine = Machine(memoryview(data), start, load_storage)
    try:
        value = machine.run()
    except RefusedError:
        raise
    except IndexError as error:
        raise RefusedError("a damaged pickle (an operation without operands)") from error
    except (struct.error, UnicodeError, ValueError, TypeError, OverflowError, KeyError, AttributeError) as error:
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

    Raises:
        RefusedError: if a limit is passed.
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
