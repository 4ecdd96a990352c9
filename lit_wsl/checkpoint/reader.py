"""Opening a checkpoint of any format: :func:`open_checkpoint` and :class:`Checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.document import Document, LazyTensor
from lit_wsl.checkpoint.folder import read_folder
from lit_wsl.checkpoint.inert import ForeignObject, as_mapping
from lit_wsl.checkpoint.rebuild import RefusedError
from lit_wsl.checkpoint.safetensors_file import is_safetensors, read_safetensors
from lit_wsl.checkpoint.sniff import looks_like, read_head
from lit_wsl.checkpoint.torch_file import read_torch_file, verify_checksums
from lit_wsl.checkpoint.weights import Selection, Weights, select_weights
from lit_wsl.errors import CheckpointError
from lit_wsl.structure.describe import memory_of


class Checkpoint(Mapping[str, Tensor]):
    """The weights of one checkpoint as a mapping of names to tensors, each read when asked for.

    The order is the file's (for files of ``torch.save``: the order of registration). Tensors lie over the mapped file:
    their pages are read when touched, and writing to them never reaches the file.

    Attributes:
        path: the file or folder.
        format: what it is: ``"lightning"``, ``"torch"``, ``"safetensors"``, ``"safetensors-sharded"``,
            ``"torch-sharded"``, ``"dcp"``, ``"deepspeed"``, ``"pickled-module"``, ``"pickle"``.
        stubbed: dotted names of foreign classes and functions that became inert records.
        weights: which weights were taken: ``"state_dict"``, ``"model"``, ``"ema:state_dict_ema"``, ...
        prefix: the keys that lead to the state dict inside the file; ``()`` where the file is the state dict.
        notes: remarks for the report.
        metadata: the ``__metadata__`` of a safetensors file, else None.
        extra: the state dict's entries that are no tensors, such as ``_extra_state``.
    """

    def __init__(self, path: Path, document: Document, selection: Selection) -> None:
        nest = selection.nest
        self.path = path
        self.format = "pickled-module" if nest.module else document.format
        self.stubbed = document.stubbed
        self.weights = selection.label
        self.prefix = nest.path
        self.notes = document.notes + selection.notes + _notes_on_extra(nest.extra)
        self.metadata = document.metadata
        self.extra: Mapping[Any, Any] = nest.extra
        self._document = document
        self._tensors = nest.tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if isinstance(tensor, LazyTensor):
            with _errors_of(self.path, f"tensor {name!r} of shape {tuple(tensor.shape)}"):
                return tensor.read()
        if tensor.is_meta:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {tuple(tensor.shape)} was saved without data."
            )
        return tensor.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def meta(self, name: str) -> Tensor:
        """Give a tensor of the same shape and dtype on the meta device; no data is read."""
        tensor = self._tensors[name]
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def meta_items(self) -> Iterator[tuple[str, Tensor]]:
        """Go over names and meta tensors in the file's order.

        Names that the file ties (formats of ``torch.save`` keep which tensors shared their memory) give one and the
        same meta tensor. No data is read: what lies over the mapped file is told by its place there.
        """
        made: dict[object, Tensor] = {}
        for name, tensor in self._tensors.items():
            memory = memory_of(tensor) if isinstance(tensor, Tensor) else None
            yield name, self.meta(name) if memory is None else made.setdefault(memory, self.meta(name))

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """Everything else in the file: epoch, hyper_parameters, optimizer_states, callbacks, ...

        Objects of foreign classes are inert records (:class:`lit_wsl.checkpoint.inert.ForeignObject`).
        """
        return _LazyContent(self.unread, self.path, self._document) if self.lazy else self.unread

    @cached_property
    def unread(self) -> Mapping[str, Any]:
        """:attr:`content` with the tensors that are read on request left as records of their shapes and dtypes."""
        tree = as_mapping(self._document.tree)
        if tree is None or not self.prefix:
            return {}
        return {key: value for key, value in tree.items() if key != self.prefix[0]}

    @property
    def lazy(self) -> bool:
        """Whether every request for a tensor reads it anew, instead of giving a view of the mapped file."""
        return self._document.lazy

    def document(self) -> Any:
        """Give the whole content as one tree, tensors included, as the file has it."""
        return self._document.read(self._document.tree)

    def verify(self) -> int:
        """Read the whole file and compare its checksums (CRC-32), which ``torch.save`` writes and ``load`` ignores.

        Files up to 64 MiB are always verified when they are opened. safetensors has no checksums.

        Returns:
            The number of bytes compared; 0 where there are no checksums.

        Raises:
            CheckpointError: naming the part that is damaged.
        """
        files = [self.path] if self.path.is_file() else sorted(file for file in self.path.iterdir() if file.is_file())
        with _errors_of(self.path):
            return sum(verify_checksums(file) for file in files if read_head(file, 4)[:4] == b"PK\x03\x04")

    @property
    def lossy(self) -> bool:
        """Whether writing :meth:`document` again would lose something of the file."""
        return self._document.lossy

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, {len(self)} tensors, weights={self.weights!r})"


class _LazyContent(Mapping[str, Any]):
    """The rest of a checkpoint whose tensors are put together when asked for: one entry is read, not all of them."""

    def __init__(self, entries: Mapping[str, Any], path: Path, document: Document) -> None:
        self._entries = entries
        self._path = path
        self._document = document

    def __getitem__(self, key: str) -> Any:
        with _errors_of(self._path, f"entry {key!r}"):
            return self._document.read(self._entries[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<content of {self._path}: {', '.join(map(str, self._entries))}>"


class _errors_of:  # noqa: N801 - reads as a statement
    """Turn what readers raise into a CheckpointError that names the file and the remedy."""

    def __init__(self, path: Path, what: str = "") -> None:
        self.path = path
        self.what = f" ({what})" if what else ""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RefusedError):
            raise CheckpointError(
                f"{self.path}{self.what} cannot be read as a checkpoint: {error}. "
                "If it was copied or downloaded, copy it again and compare its size; nothing in it was run."
            ) from error
        if isinstance(error, CheckpointError) and str(self.path) not in str(error):
            raise CheckpointError(f"{self.path}{self.what} {error}.") from error
        if isinstance(error, PermissionError):
            raise CheckpointError(f"{self.path}{self.what} cannot be read: no permission.") from error
        if isinstance(error, OSError):
            raise CheckpointError(f"{self.path}{self.what} cannot be read: {error.strerror or error}.") from error
        if isinstance(error, (MemoryError, RecursionError)):
            raise CheckpointError(f"{self.path}{self.what} needs more memory than there is to be read.") from error


def _notes_on_extra(extra: Mapping[Any, Any]) -> tuple[str, ...]:
    """Say which entries of the state dict could not be read as tensors: a silent gap is worse than a loud one."""
    wrapped = {str(key): value for key, value in extra.items() if isinstance(value, ForeignObject)}
    tensors = {
        key: value
        for key, value in wrapped.items()
        if "_rebuild" in str(value.func) or value.type_name.startswith(("torch.", "torchao."))
    }
    if not tensors:
        return ()
    listed = ", ".join(f"{key} ({_class_of(value)})" for key, value in sorted(tensors.items())[:3])
    return (f"{len(tensors)} tensors of foreign classes were not read: {listed}",)


def _class_of(value: ForeignObject) -> str:
    return str(value.args[1]) if len(value.args) > 1 else value.type_name


def read_document(path: Path) -> Document:
    """Read a file or folder by its content, whatever its name says, without running any code in it.

    Raises:
        CheckpointError: naming the file, what it looks like, and the remedy.
    """
    with _errors_of(path):
        if path.is_dir():
            return read_folder(path, read_document)
        if "://" in str(path) or str(path).startswith(("http:/", "https:/", "s3:/", "gs:/", "hf:/")):
            raise CheckpointError(f"{path} is a web address. Download the file, and give its path.")
        if not path.exists():
            near = sorted(path.parent.glob(f"{path.stem}*"))[:3] if path.parent.is_dir() else []
            hint = f" Did you mean {', '.join(map(str, near))}?" if near else " Check the path."
            raise CheckpointError(f"{path} does not exist.{hint}")
        if not path.is_file():
            raise CheckpointError(f"{path} is neither a file nor a folder (a device or pipe?).")
        head = read_head(path)
        words = looks_like(head)
        if words is not None and path.name.endswith(".index.json"):
            return read_folder(path, read_document)
        if words is not None:
            raise CheckpointError(f"{path} is not a checkpoint: it is {words}.")
        if is_safetensors(head, path):
            return read_safetensors(path)
        try:
            return read_torch_file(path)
        except RefusedError as error:
            if head.isascii() and head.decode("ascii").replace("\n", " ").replace("\r", " ").isprintable():
                raise CheckpointError(f"{path} is not a checkpoint: it is a text file, or {error}.") from error
            raise


def open_checkpoint(path: str | os.PathLike[str], *, weights: Weights = "auto") -> Checkpoint:
    """Open a checkpoint of any format, told by its content, without running any code that may be in it.

    Args:
        path: a file (Lightning ``.ckpt``, ``torch.save`` in both forms, safetensors, a pickled module) or a folder
            (sharded Hugging Face, ``torch.distributed.checkpoint`` with Lightning's ``meta.pt``, DeepSpeed).
        weights: ``"auto"`` takes the weights that the file's own framework would load, ``"model"`` never an average of
            them, ``"ema"`` their running average.

    Returns:
        A mapping of names to tensors; nothing but names, shapes and dtypes has been read.

    Raises:
        CheckpointError: naming the file, what it looks like, and the remedy.

    Example:
        >>> import tempfile, torch
        >>> file = tempfile.mkdtemp() + "/a.ckpt"
        >>> torch.save({"state_dict": {"layer.weight": torch.ones(2)}, "epoch": 3}, file)
        >>> checkpoint = open_checkpoint(file)
        >>> checkpoint["layer.weight"], checkpoint.content
        (tensor([1., 1.]), {'epoch': 3})
    """
    path = Path(path).expanduser()
    document = read_document(path)
    with _errors_of(path):
        checkpoint = Checkpoint(path, document, select_weights(document.tree, weights))
        for name, value in checkpoint.extra.items():
            if isinstance(value, ForeignObject) and "DTensor" in _class_of(value):
                raise CheckpointError(
                    f"{path}: tensor {name!r} is a DTensor, of which a plain file holds one rank's part only. Save a "
                    "full state dict instead (Lightning: ModelParallelStrategy(save_distributed_checkpoint=False)), or "
                    "a distributed checkpoint folder."
                )
        return checkpoint


def load_checkpoint_as_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the whole content of a checkpoint as one dict, tensors included, without running any code in it.

    Args:
        path: a file or folder of any format that :func:`open_checkpoint` reads.

    Returns:
        The file's own top-level dict; for a pickled module its state dict, for safetensors names and tensors. Objects
        of foreign classes are inert records.

    Raises:
        CheckpointError: naming the file, what it looks like, and the remedy.
    """
    path = Path(path).expanduser()
    document = read_document(path)
    with _errors_of(path):
        mapping = as_mapping(document.tree)
        if mapping is None:
            mapping = select_weights(document.tree).nest.tensors
        return {key: document.read(value) for key, value in mapping.items()}
