"""Writing trees with inert records: each record becomes again the orders it was made from, nothing is imported.

So a checkpoint whose hyper-parameters are objects of classes that are not there (or not trusted) can be changed and
written again, with those objects untouched.
"""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any, cast

import torch

from lit_wsl.checkpoint.records import ForeignName, ForeignObject
from lit_wsl.errors import CheckpointError

_PythonPickler: Any = pickle._Pickler  # the C pickler cannot be taught new types' opcodes


class _RecordPickler(_PythonPickler):
    """A pickler that writes records as the orders they hold."""

    dispatch = _PythonPickler.dispatch.copy()

    def save_foreign_name(self, name: ForeignName) -> None:
        """Write a global without looking it up."""
        if "\n" in name.module + name.name:
            raise CheckpointError(f"{name!r} cannot be written: its name holds a line break.")
        self.write(pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode())
        self.memoize(name)

    dispatch[ForeignName] = save_foreign_name

    def save_foreign_object(self, record: ForeignObject) -> None:
        """Write the call, then appends, items and states in their order."""
        if record.kwargs:
            # __newobj_ex__ says the same as the NEWOBJ_EX operation, which needs protocol 4
            self.save(ForeignName("copyreg", "__newobj_ex__"))
            self.save((record.func, record.args, record.kwargs))
            self.write(pickle.REDUCE)
        else:
            self.save(record.func)
            self.save(record.args)
            self.write(pickle.NEWOBJ if record.how == "newobj" else pickle.REDUCE)
        self.memoize(record)
        for kind, *values in record.orders:
            for value in values:
                self.save(value)
            self.write({"append": pickle.APPEND, "setitem": pickle.SETITEM, "build": pickle.BUILD}[kind])

    dispatch[ForeignObject] = save_foreign_object


def save_with_records(obj: Any, file: Any) -> None:
    """``torch.save`` for trees that hold inert records.

    Raises:
        CheckpointError: if a record cannot be written.
    """
    module = cast(Any, SimpleNamespace(Pickler=_RecordPickler, __name__="pickle"))
    try:
        torch.save(obj, file, pickle_module=module)
    except RecursionError as error:
        raise CheckpointError("The checkpoint's objects are nested too deep to be written again.") from error
