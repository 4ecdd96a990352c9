"""Opening a checkpoint of any format: :func:`open_checkpoint` and :class:`Checkpoint`.

A checkpoint that lies elsewhere, at whatever address fsspec opens, is brought to a temporary folder.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.allowlist import RefusedError
from lit_wsl.checkpoint.document import Document, LazyTensor
from lit_wsl.checkpoint.one_file import is_safetensors, read_safetensors, read_torch_file, verify_checksums
from lit_wsl.checkpoint.records import ForeignObject, as_mapping
from lit_wsl.checkpoint.sharded import ReadFile, is_deepspeed, read_deepspeed, read_distributed
from lit_wsl.checkpoint.weights import Selection, Weights, select_weights
from lit_wsl.errors import CheckpointError
from lit_wsl.files import not_found
from lit_wsl.structure.description import memory_of, require_path

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(://|::)")
_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):/(?!/)")


@dataclass(frozen=True)
class Local:
    """Where the content of a path or an address can be read."""

    path: Path  # the file or folder on this machine
    shown: Path | str  # what to call it: the path, or the address, as it was given
    keep: Any = None  # what holds a temporary copy; the copy goes when this does

    @contextmanager
    def called_as_given(self) -> Iterator[None]:
        """Let errors speak of the path as it was given."""
        try:
            yield
        except CheckpointError as error:
            message = str(error).replace(str(self.path), str(self.shown))
            if message == str(error):
                raise
            raise type(error)(message) from error


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address for fsspec, ``scheme://...``; a colon in a local name makes none.

    >>> is_address("s3://bucket/old.ckpt"), is_address("model-abc:v3.ckpt"), is_address("hf:x/model.ckpt")
    (True, False, False)
    """
    return isinstance(path, str) and bool(_ADDRESS.match(path)) and not os.path.lexists(path)


def bring(path: str | os.PathLike[str]) -> Local:
    """The local form of a path; what an address names is fetched through fsspec, a folder with all that is in it."""
    if not is_address(path):
        local = Path(path).expanduser()
        collapsed = _COLLAPSED.match(os.fspath(path))
        if collapsed and isinstance(path, Path) and not local.exists():
            from fsspec import available_protocols  # type: ignore[import-untyped]

            if collapsed[1] in available_protocols():
                raise CheckpointError(
                    f"{path} looks like an address that went through pathlib.Path, which joins its slashes. Give the "
                    f"address as a string, {collapsed[1]}://..."
                )
        return Local(local, Path(path))
    assert isinstance(path, str)
    import fsspec
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    with _told(path):
        files, inside = fsspec.core.url_to_fs(path)
        if isinstance(files, LocalFileSystem):
            return Local(Path(inside), path)
        if not files.exists(inside):
            raise FileNotFoundError("there is nothing at this address")
        keep = tempfile.TemporaryDirectory(prefix="lit_wsl-", ignore_cleanup_errors=True)
        copy = Path(keep.name, posixpath.basename(inside.rstrip("/")) or "checkpoint")
        if copy.name.endswith(".index.json"):  # names its shards, which lie beside it
            files.get(posixpath.dirname(inside), keep.name + "/folder", recursive=True)
            return Local(Path(keep.name, "folder", copy.name), path, keep)
        files.get(inside, str(copy), recursive=files.isdir(inside))
        return Local(copy, path, keep)


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Turn whatever a file system raises into an error that has the address and the remedy."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        why = str(error) if isinstance(error, (ImportError, ValueError, FileNotFoundError)) else repr(error)
        raise CheckpointError(
            f"{address} cannot be fetched through fsspec: {why.rstrip('.')}. Check the address, what has to be "
            "installed for it, and your access to it; or download the file and give its path."
        ) from error


MAX_INDEX = 256 << 20


def read_folder(path: Path, read_file: ReadFile) -> Document:
    """Read a folder by what lies in it."""
    if path.is_file():
        return _read_sharded(path, read_file)
    if (path / ".metadata").is_file():
        return read_distributed(path, read_file)
    if is_deepspeed(path):
        return read_deepspeed(path, read_file)
    indices = sorted(path.glob("*.index.json"), key=lambda index: ("safetensors" not in index.name, len(index.name)))
    if indices:
        return _read_sharded(indices[0], read_file)
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return read_file(path / name)
    return _read_only_file(path, read_file)


def _read_only_file(path: Path, read_file: ReadFile) -> Document:
    suffixes = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
    if len(files) == 1:
        return read_file(files[0])
    if any(path.glob("*.distcp")):
        raise CheckpointError(
            f"{path} holds shards of a distributed checkpoint (*.distcp) but not their index (.metadata). Copy the "
            "hidden file .metadata too, or save again: it is written last, so saving may have been interrupted."
        )
    if not files:
        raise CheckpointError(
            f"{path} is a folder without a checkpoint: neither *.index.json, model.safetensors, .metadata nor a single "
            "file is in it. Give the path of the file."
        )
    listed = ", ".join(file.name for file in files[:5])
    raise CheckpointError(f"{path} is a folder with several checkpoints ({listed}). Give the path of one of them.")


def _read_sharded(index: Path, read_file: ReadFile) -> Document:
    """Join the shards that a Hugging Face index lists, in the index's order."""
    weight_map = _weight_map(index)
    shards: dict[str, Document] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if Path(name).name != name or name in (".", ".."):
            raise CheckpointError(
                f"{index} names a shard outside its folder ({name!r}). The index is damaged or forged."
            )
        if not shard.is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is not in the folder. Copy it there.")
        shards[name] = read_file(shard)
    tree: dict[str, Any] = {}
    for key, name in weight_map.items():
        inner = shards[name].tree
        if not isinstance(inner, dict) or key not in inner:
            raise CheckpointError(
                f"{index} says that tensor {key!r} is in {name}, but it is not. Copy the shards again."
            )
        tree[key] = inner[key]
    unlisted = sorted(key for shard in shards.values() for key in shard.tree if key not in weight_map)
    notes = (f"{len(unlisted)} tensors of the shards are not in the index: {unlisted[:3]}",) if unlisted else ()
    kind = "safetensors" if all(shard.format == "safetensors" for shard in shards.values()) else "torch"
    stubbed = tuple(sorted({name for shard in shards.values() for name in shard.stubbed}))
    metadata = next((shard.metadata for shard in shards.values() if shard.metadata is not None), None)
    return Document(f"{kind}-sharded", tree, stubbed, notes, metadata=metadata, lazy=True)


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > MAX_INDEX:
        raise CheckpointError(f"{index} is too large for an index.")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not valid JSON ({error}). Copy it again.") from error
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{index} has no 'weight_map' of tensor names to shards. Copy it again.")
    return found


_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89HDF\r\n", "an HDF5 file (Keras?); convert it to safetensors first"),
    (0, b"GGUF", "a GGUF file (llama.cpp); load the original checkpoint it was made from"),
    (0, b"\x93NUMPY", "a NumPy array; wrap it as {name: torch.from_numpy(array)} and torch.save it"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"BZh", "a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (0, b"Rar!", "a RAR archive; unpack it first"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x7fELF", "a program (ELF)"),
    (0, b"SQLite format 3", "an SQLite database"),
    (257, b"ustar", "a tar archive (torch.save before version 0.1.10, or one made by hand); unpack it, or load and "
                    "save it again with the torch version that wrote it"),
)  # fmt: skip


def looks_like(head: bytes) -> str | None:
    """Say what a file is by its first bytes, if it is surely not a checkpoint.

    Example:
        >>> looks_like(b"")
        'empty (0 bytes); the writing was interrupted, or the download failed: copy it again'
    """
    if not head:
        return "empty (0 bytes); the writing was interrupted, or the download failed: copy it again"
    for offset, magic, words in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return words
    if not head.strip(b"\0"):
        return "filled with zeros; the disk or the download was interrupted: copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; run `git lfs pull` where it came from"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the file itself; the download was answered by a login or error page"
    if _is_text(head):
        return f"a text file (it begins with {head[:40].decode('utf-8', 'replace')!r})"
    return None


def _is_text(head: bytes) -> bool:
    if head.startswith((b"(", b"]", b"}", b"I", b"c")) and head.rstrip().endswith(b"."):
        return False  # could be a pickle of protocol 0, which is text
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # not only a character cut at the end
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)


def read_head(path: Path, size: int = 4096) -> bytes:
    """Read the first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(size)


class Checkpoint(Mapping[str, Tensor]):
    """The weights of one checkpoint as a mapping of names to tensors, each read when asked for.

    The order is the file's (for files of ``torch.save``: the order of registration). Tensors lie over the mapped file:
    their pages are read when touched, and writing to them never reaches the file.

    Attributes:
        path: the file or folder, or its address, as it was given.
        file: where it lies on this machine.
        format: what it is: ``"lightning"``, ``"torch"``, ``"safetensors"``, ``"safetensors-sharded"``,
            ``"torch-sharded"``, ``"dcp"``, ``"deepspeed"``, ``"pickled-module"``, ``"pickle"``.
        stubbed: dotted names of foreign classes and functions that became inert records.
        weights: which weights were taken: ``"state_dict"``, ``"model"``, ``"ema:state_dict_ema"``, ...
        prefix: the keys that lead to the state dict inside the file; ``()`` where the file is the state dict.
        notes: remarks for the report.
        metadata: the ``__metadata__`` of a safetensors file, else None.
        extra: the state dict's entries that are no tensors, such as ``_extra_state``.
    """

    def __init__(self, local: Local, document: Document, selection: Selection) -> None:
        nest = selection.nest
        self.path = local.shown
        self.file = local.path
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

        Objects of foreign classes are inert records (:class:`lit_wsl.checkpoint.records.ForeignObject`).
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
        files = [self.file] if self.file.is_file() else sorted(file for file in self.file.iterdir() if file.is_file())
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

    def __init__(self, entries: Mapping[str, Any], path: Path | str, document: Document) -> None:
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


@contextmanager
def _errors_of(path: Path | str, what: str = "") -> Iterator[None]:
    """Turn what readers raise into a CheckpointError that names the file and the remedy."""
    it = f"{path} ({what})" if what else str(path)
    try:
        yield
    except RefusedError as error:
        raise CheckpointError(
            f"{it} cannot be read as a checkpoint: {error}. "
            "If it was copied or downloaded, copy it again and compare its size; nothing in it was run."
        ) from error
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{it} {error}.") from error
    except PermissionError as error:
        raise CheckpointError(f"{it} cannot be read: no permission.") from error
    except OSError as error:
        raise CheckpointError(f"{it} cannot be read: {error.strerror or error}.") from error
    except (MemoryError, RecursionError) as error:
        raise CheckpointError(f"{it} needs more memory than there is to be read.") from error


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
    """Read a file or folder by its content, whatever its name says, without running any code in it."""
    with _errors_of(path):
        if path.is_dir():
            return read_folder(path, read_document)
        if not path.exists():
            raise not_found(path)
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
    """Open a checkpoint of any format, recognised by its content, without running any code in it.

    Args:
        path: a file (Lightning ``.ckpt``, ``torch.save`` in both forms, safetensors, a pickled module) or a folder
            (sharded Hugging Face, ``torch.distributed.checkpoint`` with Lightning's ``meta.pt``, DeepSpeed); or the
            address of one that fsspec can fetch, ``s3://...``, ``memory://...``.
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
    require_path(path, "path")
    local = bring(path)
    with local.called_as_given(), _errors_of(local.path):
        document = replace(read_document(local.path), keep=local.keep)
        checkpoint = Checkpoint(local, document, select_weights(document.tree, weights))
        for name, value in checkpoint.extra.items():
            if isinstance(value, ForeignObject) and "DTensor" in _class_of(value):
                raise CheckpointError(
                    f"{local.path}: tensor {name!r} is a DTensor, of which a plain file holds one rank's part only. "
                    "Save a full state dict instead (Lightning: ModelParallelStrategy(save_distributed_checkpoint="
                    "False)), or a distributed checkpoint folder."
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
    require_path(path, "path")
    local = bring(path)
    with local.called_as_given(), _errors_of(local.path):
        document = read_document(local.path)
        mapping = as_mapping(document.tree)
        if mapping is None:
            mapping = select_weights(document.tree).nest.tensors
        return {key: document.read(value) for key, value in mapping.items()}
