# ruff: noqa: D102
"""What the operations of a pickle share: reading, the stack, names, calls; all of it bounded and counted."""

from __future__ import annotations

import _compat_pickle
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lit_wsl.checkpoint import rebuild
from lit_wsl.checkpoint.inert import ForeignName, ForeignObject
from lit_wsl.checkpoint.rebuild import RefusedError

MAX_STEPS = 60_000_000  # a checkpoint of a million tensors with Adam's states takes about 50 million
MAX_MEMORY = 6 << 30  # bytes of Python objects, roughly; honest files take about 25 bytes for one byte of pickle
MEMORY_PER_BYTE = 64
MAX_DEPTH = 1000  # nested containers; Python's own pickler stops near here too
MAX_INTEGER = 1024  # bytes of one integer

CONTAINERS = (Mapping, list, tuple, set, frozenset)
LoadStorage = Callable[[torch.dtype, str, int], rebuild.Storage]


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
        return rebuild.CONSTANTS.get((module, name), found)

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
                return rebuild.build(func, args)
            except rebuild.ForeignUseError:
                self.foreign_uses.update({str(func)} if rebuild.is_known(func) else ())
        return ForeignObject(func, args, kwargs or {}, how)
