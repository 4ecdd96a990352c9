"""Folders of ``torch.distributed.checkpoint``, as Lightning's FSDP and ModelParallel strategies write them.

torch's own reader unpickles the folder's ``.metadata`` file, which would run code. Here it is read into inert records,
and the shards are cut out of the ``.distcp`` files and joined by us: each shard is a small ``torch.save`` archive at a
known place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.allowlist import RefusedError
from lit_wsl.checkpoint.document import Document, LazyTensor
from lit_wsl.checkpoint.records import ForeignObject, as_mapping
from lit_wsl.checkpoint.torch_file import MappedFile, read_zip
from lit_wsl.checkpoint.unpickler import unpickle

LIGHTNING_METADATA = "meta.pt"
MAX_ELEMENTS = 1 << 48


@dataclass(frozen=True)
class Shard:
    """One part of a tensor: where it lies in the tensor, and in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class _Files:
    """The mapped ``.distcp`` files of a folder, each opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, MappedFile] = {}

    def check(self, name: Any, start: Any, length: Any) -> None:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise RefusedError(f"an index that names a file outside the folder ({name!r:.100})")
        path = self.folder / name
        if not path.is_file():
            raise RefusedError(f"an index that names {name}, which is not in the folder; copy it there")
        if type(start) is not int or type(length) is not int or start < 0 or length < 0:
            raise RefusedError("an index with a damaged place of a shard")
        if start + length > path.stat().st_size:
            raise RefusedError(f"an index that expects {start + length} bytes in {name} (truncated?)")

    def __getitem__(self, name: str) -> MappedFile:
        if name not in self._open:
            self._open[name] = MappedFile(self.folder / name)
        return self._open[name]


def read_distributed(path: Path, read_file: Callable[[Path], Document]) -> Document:
    """Read a distributed checkpoint's index; its tensors are joined when asked for."""
    found = unpickle(MappedFile(path / ".metadata").data)
    index = found.value.state if isinstance(found.value, ForeignObject) else {}
    entries, places = index.get("state_dict_metadata"), index.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise RefusedError("a .metadata file that is not an index of torch.distributed.checkpoint")
    files = _Files(path)
    shards = _shards(places, files)
    leaves = {name: _leaf(name, entry, shards.get(name, {}), files) for name, entry in entries.items()}
    planned = index.get("planner_data")
    tree = _nest(leaves, planned if isinstance(planned, dict) else {})
    rest, stubbed, notes = _lightning_metadata(path, read_file)
    return Document("dcp", {**rest, **tree}, stubbed, notes, lazy=True)


def _lightning_metadata(
    path: Path, read_file: Callable[[Path], Document]
) -> tuple[Mapping[str, Any], tuple[str, ...], tuple[str, ...]]:
    if not (path / LIGHTNING_METADATA).is_file():
        return {}, (), ()
    document = read_file(path / LIGHTNING_METADATA)
    return dict(as_mapping(document.tree) or {}), document.stubbed, document.notes


def _shards(places: Mapping[Any, Any], files: _Files) -> dict[str, dict[tuple[int, ...], tuple[str, int, int]]]:
    """Turn ``{MetadataIndex(fqn, offset): _StorageInfo(file, start, length)}`` into plain data, checked."""
    result: dict[str, dict[tuple[int, ...], tuple[str, int, int]]] = {}
    for key, value in places.items():
        index = key.state if isinstance(key, ForeignObject) else {}
        info = value.state if isinstance(value, ForeignObject) else {}
        if info.get("transform_descriptors"):
            raise RefusedError("shards compressed by a storage extension; save the checkpoint again without it")
        place = (info.get("relative_path"), info.get("offset"), info.get("length"))
        files.check(*place)
        name, offset = index.get("fqn"), index.get("offset")
        if not isinstance(name, str) or not isinstance(offset, (tuple, type(None))):
            raise RefusedError("an index with a damaged name of a shard")
        result.setdefault(name, {})[tuple(offset or ())] = place  # type: ignore[assignment]
    return result


def _leaf(name: Any, entry: Any, places: Mapping[tuple[int, ...], tuple[str, int, int]], files: _Files) -> Any:
    """Make one entry: a lazy tensor with its shards, or the object that a bytes entry holds."""
    kind = entry.type_name.rpartition(".")[2] if isinstance(entry, ForeignObject) else ""
    if kind == "BytesStorageMetadata":
        return read_zip(files[places[()][0]], *places[()][1:]).value if () in places else None
    if kind != "TensorStorageMetadata":
        raise RefusedError(f"an index whose entry {name!r:.200} is neither a tensor nor bytes")
    size, dtype = tuple(entry.state.get("size") or ()), _dtype(entry.state.get("properties"))
    if math.prod(size) > MAX_ELEMENTS:
        raise RefusedError(f"a tensor {name!r:.200} of shape {size}")
    shards = []
    for chunk in entry.state.get("chunks") or ():
        state = chunk.state if isinstance(chunk, ForeignObject) else {}
        offsets, sizes = tuple(state.get("offsets") or ()), tuple(state.get("sizes") or ())
        place = places.get(offsets) or (places.get(()) if not any(offsets) else None)
        if place is None:
            raise RefusedError(f"an index without the shard of {name!r:.200} at {offsets}")
        shards.append(Shard(offsets, sizes, *place))
    _check_cover(name, size, shards)
    return LazyTensor(torch.Size(size), dtype, partial(_join, name, size, dtype, tuple(shards), files))


def _dtype(properties: Any) -> torch.dtype:
    """The dtype is the first item of the state of ``TensorProperties`` (older torch: an attribute)."""
    if isinstance(properties, ForeignObject):
        for state in (order[1] for order in properties.orders if order[0] == "build"):
            found = state[0] if isinstance(state, tuple) and state else None
            found = state.get("dtype") if isinstance(state, dict) else found
            if isinstance(found, torch.dtype):
                return found
    raise RefusedError("an index with a tensor of unknown dtype")


def _check_cover(name: str, size: tuple[int, ...], shards: list[Shard]) -> None:
    """Shards have to tile their tensor exactly: inside it, without overlap, without holes."""
    for shard in shards:
        if not len(shard.offsets) == len(shard.sizes) == len(size):
            raise RefusedError(f"a shard of {name!r:.200} of other dimensions than the tensor's {size}")
        if any(a < 0 or n < 0 or a + n > whole for a, n, whole in zip(shard.offsets, shard.sizes, size)):
            raise RefusedError(f"a shard of {name!r:.200} beyond its tensor's shape {size}")
    full = [shard for shard in shards if math.prod(shard.sizes)]
    full.sort(key=lambda shard: shard.offsets)
    for at, shard in enumerate(full[:4096]):
        for other in full[at + 1 : 4096]:
            if size and other.offsets[0] >= shard.offsets[0] + shard.sizes[0]:
                break  # sorted by the first axis: no later one can overlap
            spans = zip(shard.offsets, shard.sizes, other.offsets, other.sizes)
            if all(a < b + m and b < a + n for a, n, b, m in spans):
                raise RefusedError(f"shards of {name!r:.200} that overlap")
    if len(full) > 4096 or sum(math.prod(shard.sizes) for shard in full) != math.prod(size):
        raise RefusedError(f"shards that leave holes in {name!r:.200} of shape {size}; was a rank's file lost?")


def _join(name: str, size: tuple[int, ...], dtype: torch.dtype, shards: tuple[Shard, ...], files: _Files) -> Tensor:
    """Read the shards and put them together; a tensor of one shard stays where it is, in the mapped file."""
    if len(shards) == 1:
        return _read_shard(name, shards[0], dtype, files)
    result = torch.empty(size, dtype=dtype)
    for shard in shards:
        part = result
        for axis, (offset, length) in enumerate(zip(shard.offsets, shard.sizes)):
            part = part.narrow(axis, offset, length)
        part.copy_(_read_shard(name, shard, dtype, files))
    return result


def _read_shard(name: str, shard: Shard, dtype: torch.dtype, files: _Files) -> Tensor:
    tensor = read_zip(files[shard.file], shard.start, shard.length).value
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shard.sizes or tensor.dtype != dtype:
        raise RefusedError(f"a shard of {name!r:.200} that is not a tensor of shape {shard.sizes} and dtype {dtype}")
    return tensor.detach()


def _nest(leaves: Mapping[str, Any], paths: Mapping[Any, Any]) -> dict[str, Any]:
    """Undo the flattening of nested dicts: the planner wrote down each flat name's path of keys."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        path = paths.get(name)
        keys: tuple[Any, ...] = path if isinstance(path, tuple) and path else (name,)
        if not all(isinstance(key, (str, int)) for key in keys):
            raise RefusedError(f"an index with a damaged path of {name!r:.200}")
        inner: Any = tree
        for key in keys[:-1]:
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            inner[keys[-1]] = leaf
    return {key: _lists(value) for key, value in tree.items()}


def _lists(value: Any) -> Any:
    """Make lists of dicts with the keys 0, 1, 2, ...: the planner writes integers for places in lists only."""
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(item) for key, item in value.items()}
    if inner and all(type(key) is int for key in inner) and sorted(inner) == list(range(len(inner))):
        return [inner[key] for key in sorted(inner)]
    return inner
