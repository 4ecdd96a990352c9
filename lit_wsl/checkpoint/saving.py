"""Checkpoints written as ``torch.save`` and safetensors write them, atomically (:mod:`lit_wsl.files`).

Inert records become again the orders they were made from, nothing is imported: a checkpoint whose hyper-parameters are
objects of classes that are not there (or not trusted) can be changed and written again, with those objects untouched.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from lit_wsl.checkpoint.records import ForeignName, ForeignObject, as_mapping, contains_foreign, foreign_calls
from lit_wsl.errors import CheckpointError, listed
from lit_wsl.files import atomic


class _ErrorKeepingFile:
    """A file for ``torch.save`` that remembers the ``OSError`` behind torch's own, wordless ``RuntimeError``."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def atomic_save(obj: Any, path: str | os.PathLike[str], *, keep_foreign: bool = False) -> None:
    """Save ``obj`` with ``torch.save``, or a dict of tensors as safetensors where ``path`` says ``.safetensors``.

    Args:
        obj: anything ``torch.save`` takes, inert records of foreign objects included (they are written as the same
            orders that the original file had); for ``.safetensors`` a mapping of names to tensors.
        path: the file to write.
        keep_foreign: whether to write records that call something of the file's choice, too: code, for whoever loads
            the new file with ``weights_only=False``. Objects and plain values (:mod:`lit_wsl.checkpoint.records`) are
            always written.

    Raises:
        CheckpointError: if it cannot be written, safetensors cannot hold it, or a record would call something; the old
            file is intact.
    """
    if Path(path).suffix == ".safetensors":
        save_safetensors(obj, path)
        return
    foreign = contains_foreign(obj)
    if foreign and not keep_foreign:
        _refuse_calls(obj, path)
    with atomic(path) as temporary, open(temporary, "wb") as raw:
        file = _ErrorKeepingFile(raw)
        try:
            if foreign:
                save_with_records(obj, file)
            else:
                torch.save(obj, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            if file.error is not None:
                raise file.error from error
            raise


def _places_of_calls(tree: Any, path: tuple[str, ...] = ()) -> list[str]:
    """The innermost entries that hold calls, their keys joined with ``/`` as ``drop`` takes them (at most four)."""
    mapping = as_mapping(tree) if len(path) < 4 else None
    entries = ((k, v) for k, v in (mapping or {}).items() if foreign_calls(v))
    inner = [place for key, value in entries for place in _places_of_calls(value, (*path, str(key)))]
    return inner or (["/".join(path)] if path else [])


def _refuse_calls(obj: Any, path: str | os.PathLike[str]) -> None:
    calls = foreign_calls(obj)
    if not calls:
        return
    where = [repr(place) for place in _places_of_calls(obj)]
    inside = f" in {listed(where, 5)}" if where else ""
    shown = listed(calls, 5)
    raise CheckpointError(
        f"Cannot write {path}: the old file calls {shown}{inside}. Nothing of it was run, but whoever loads the new "
        "file with weights_only=False would run it. If you trust the file, keep the calls (keep_foreign=True, "
        f"--keep-foreign); if not, leave them out where you convert (drop=[{', '.join(where[:5]) or '...'}], "
        "--drop), or take the weights alone: write to .safetensors."
    )


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Save tensors as safetensors, all or nothing.

    Tensors that share memory are written once each (the format has no sharing), so tied weights load as two copies.

    Args:
        tensors: names and dense tensors.
        path: the file to write.
        metadata: the file's ``__metadata__``; ``{"format": "pt"}`` if not given.

    Raises:
        CheckpointError: if a value is not a dense tensor, or the file cannot be written; the old file is intact.
    """
    from safetensors.torch import save_file

    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise CheckpointError(
                f"Cannot write {path}: safetensors holds dense tensors only, but {name!r} is a {type(value).__name__}. "
                "Save it as .ckpt instead, or leave this entry out."
            )
    seen: dict[int, str] = {}
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        pointer = value.untyped_storage().data_ptr()
        shared = pointer in seen and value.numel() > 0
        own[name] = (
            value.detach().clone(memory_format=torch.contiguous_format) if shared else value.detach().contiguous()
        )
        seen.setdefault(pointer, name)
    with atomic(path) as temporary:
        try:
            save_file(own, str(temporary), metadata=dict(metadata) if metadata is not None else {"format": "pt"})
        except Exception as error:
            if isinstance(error, OSError):
                raise
            if system := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(system[1]), os.strerror(int(system[1]))) from error
            raise CheckpointError(f"Cannot write {path}: {error}") from error


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
