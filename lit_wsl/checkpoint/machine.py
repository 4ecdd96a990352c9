# ruff: noqa: D102
"""The stack machine that pickles are programs for; it imports nothing, and calls the exact allowlist only."""

from __future__ import annotations

import codecs
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lit_wsl.checkpoint import rebuild
from lit_wsl.checkpoint.inert import ForeignName, ForeignObject
from lit_wsl.checkpoint.machine_core import MAX_DEPTH, MAX_INTEGER, Core
from lit_wsl.checkpoint.rebuild import RefusedError, check_key


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

    def storage(self, saved: Any) -> rebuild.Storage:
        """Resolve ``("storage", class, key, location, number of elements[, view])`` and nothing else."""
        if self.load_storage is None:
            raise RefusedError("a persistent id outside a torch file")
        if type(saved) is not tuple or len(saved) not in (5, 6) or saved[0] not in ("storage", b"storage"):
            raise RefusedError("a persistent id that is not one of torch's storages")
        kind, key, location, numel = saved[1:5]
        dtype = rebuild.STORAGE_DTYPES.get((kind.module, kind.name)) if isinstance(kind, ForeignName) else None
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
        return rebuild.Storage(f"{key}/{view[0]!r:.50}", dtype, found.data[first:last])

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
