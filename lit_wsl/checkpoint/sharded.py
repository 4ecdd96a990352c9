"""Checkpoints that are folders of shards, joined without the code that wrote them.

*torch.distributed.checkpoint*, as Lightning's FSDP and ModelParallel strategies write it: torch's own reader unpickles
the folder's ``.metadata`` file, which would run code. Here it is read into inert records, and the shards are cut out of
the ``.distcp`` files: each is a small ``torch.save`` archive at a known place.

*DeepSpeed ZeRO* (https://arxiv.org/abs/1910.02054): DeepSpeed's own converter unpickles whatever the files hold. Stages
1 and 2 flatten the fp32 copy of each optimizer group into one vector, cut evenly over the ranks; stage 3 cuts every
parameter by itself: each rank holds ``ceil(numel / ranks)`` of its elements, padded at the end; ``param_shapes`` names
the parameters of each group in order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.allowlist import RefusedError
from lit_wsl.checkpoint.document import Document, LazyTensor, with_ties
from lit_wsl.checkpoint.one_file import MappedFile, read_zip
from lit_wsl.checkpoint.records import ForeignObject, as_mapping
from lit_wsl.checkpoint.unpickler import unpickle
from lit_wsl.errors import CheckpointError

LIGHTNING_METADATA = "meta.pt"
MAX_ELEMENTS = 1 << 48
ReadFile = Callable[[Path], Document]


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


def read_distributed(path: Path, read_file: ReadFile) -> Document:
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
    if not (path / LIGHTNING_METADATA).is_file():
        return Document("dcp", tree, lazy=True)
    rest = read_file(path / LIGHTNING_METADATA)
    return Document("dcp", {**(as_mapping(rest.tree) or {}), **tree}, rest.stubbed, rest.notes, lazy=True)


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


Piece = tuple[Tensor, int, int]  # a flat vector, and the part of it that is meant


def read_deepspeed(path: Path, read_file: ReadFile) -> Document:
    """Read a ZeRO folder of any stage: fp32 weights where the optimizer's parts are there, else those of the module."""
    folder = _tagged(path)
    models = _by_rank(folder, "model_states.pt", path)
    optimizers = _by_rank(folder, "optim_states.pt", path)
    documents = [read_file(file) for file in models]
    trees = [dict(as_mapping(document.tree) or {}) for document in documents]
    module = as_mapping(trees[0].get("module"))
    if module is None:
        raise CheckpointError(_remedy(path, "it has no module's weights"))
    tops = [as_mapping(read_file(file).tree) or {} for file in optimizers]
    states = [as_mapping(top.get("optimizer_state_dict")) or {} for top in tops]
    missing: list[str] = []
    if not states or "param_shapes" not in trees[0]:
        weights, note = dict(module), "the module's weights, in the precision of training"
    elif any("fp32_flat_groups" in state for state in states):
        weights, missing = _join_stage_3(path, module, trees, states)
        note = "fp32 weights joined from the parts of ZeRO stage 3"
    else:
        weights = _join_stage_2(path, module, trees[0], states)
        note = "fp32 weights joined from the optimizer's parts"
    notes = [note for document in documents[:1] for note in document.notes] + [f"DeepSpeed: {note}"]
    if missing:
        notes.append(f"{len(missing)} names have no data of their own (tied to others?): {', '.join(missing[:5])}")
    stubbed = documents[0].stubbed
    tree = {key: value for key, value in trees[0].items() if key != "frozen_param_fragments"}
    return Document("deepspeed", {**tree, "module": weights}, stubbed, tuple(notes), lossy=True, lazy=True)


def _tagged(path: Path) -> Path:
    """The folder of the last saved step, which the file ``latest`` names."""
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if tag and Path(tag).name == tag and (path / tag).is_dir():
            return path / tag
    found = sorted({file.parent for file in path.glob("**/*model_states.pt")})
    if len(found) != 1:
        raise CheckpointError(
            f"{path} holds several steps ({[f.name for f in found[:5]]}). Give the folder of one of them."
        )
    return found[0]


def _by_rank(folder: Path, ending: str, path: Path) -> list[Path]:
    """The files of all ranks in order; refused where the model itself is cut, which needs the model to be joined."""
    files = sorted(folder.glob(f"*{ending}"))
    if any(re.search(r"mp_rank_(?!00)\d+|layer_\d|expert_\d", file.name) for file in files):
        raise CheckpointError(_remedy(path, "the model itself was cut (tensor or pipeline parallelism, or experts)"))
    ranks = {int(match[1]) if (match := re.search(r"zero_pp_rank_(\d+)", file.name)) else 0: file for file in files}
    if sorted(ranks) != list(range(len(files))):
        raise CheckpointError(_remedy(path, f"files of some ranks are missing ({ending}: ranks {sorted(ranks)})"))
    return [ranks[rank] for rank in sorted(ranks)]


def _join_stage_2(
    path: Path, module: Mapping[str, Any], tree: Mapping[str, Any], states: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Replace the module's trained weights by their fp32 copies; frozen ones and buffers stay."""
    key = "single_partition_of_fp32_groups"
    if all(state.get(key) is None for state in states):
        return dict(module)  # stage 0, or an optimizer without fp32 copies
    parts = [_vectors(path, state.get(key)) for state in states]
    groups = tree["param_shapes"]
    if not isinstance(groups, list) or any(len(part) != len(groups) for part in parts):
        raise CheckpointError(_remedy(path, "its optimizer's parts are of an unknown form"))
    _check_ranks(path, states)
    joined: dict[str, Any] = {}
    for number, shapes in enumerate(groups):
        vectors = [part[number] for part in parts]
        at = 0
        for name, shape in _shapes(path, shapes).items():
            pieces = _cut(vectors, at, at + math.prod(shape))
            joined[name] = _lazy(name, shape, pieces, module.get(name))
            at += math.prod(shape)
        if not 0 <= sum(map(len, vectors)) - at <= 4096 * len(vectors):  # padding for alignment
            raise CheckpointError(_remedy(path, "its optimizer's parts do not add up to the parameters' sizes"))
    return with_ties(module, joined) | joined


def _join_stage_3(
    path: Path, module: Mapping[str, Any], trees: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Join every parameter from the ranks' parts; the names without data are listed."""
    vectors = [_vectors(path, state.get("fp32_flat_groups")) for state in states]
    if len(trees) != len(states):
        raise CheckpointError(_remedy(path, "files of some ranks are missing"))
    _check_ranks(path, states)
    ranks, at = len(states), 0
    joined: dict[str, Any] = {}
    for shapes in trees[0]["param_shapes"]:
        for name, shape in _shapes(path, shapes).items():
            numel = math.prod(shape)
            length = -(-numel // ranks)
            pieces = [piece for groups in vectors for piece in _cut(groups, at, at + length)]
            joined[name] = _lazy(name, shape, pieces, None)
            at += length
    if any(sum(map(len, groups)) != at for groups in vectors):
        raise CheckpointError(_remedy(path, "its parts do not add up to the parameters' sizes"))
    for name, shape in _shapes(path, trees[0].get("frozen_param_shapes") or {}).items():
        held = [(as_mapping(tree.get("frozen_param_fragments")) or {}).get(name) for tree in trees]
        fragments = _vectors(path, held)
        joined[name] = _lazy(name, shape, [(part, 0, len(part)) for part in fragments], None)
    for alias, name in (as_mapping(trees[0].get("shared_params")) or {}).items():
        if name in joined:
            joined[alias] = joined[name]
    buffers = set(map(str, trees[0].get("buffer_names") or ()))
    weights = {name: joined.get(name, value) for name, value in module.items()}
    missing = [
        name
        for name, value in module.items()
        if name not in joined and name not in buffers and isinstance(value, Tensor) and not value.numel()
    ]
    return {name: value for name, value in weights.items() if name not in missing}, missing


def _check_ranks(path: Path, states: Sequence[Mapping[str, Any]]) -> None:
    for state in states:
        count = state.get("partition_count")
        counts = {item for item in (count if isinstance(count, list) else [count]) if isinstance(item, int)}
        if counts - {len(states)}:
            raise CheckpointError(_remedy(path, f"{max(counts)} ranks wrote it, of which {len(states)} are there"))


def _vectors(path: Path, value: Any) -> list[Tensor]:
    if isinstance(value, list) and all(isinstance(item, Tensor) and item.dim() == 1 for item in value):
        return value
    raise CheckpointError(_remedy(path, "its parts are of an unknown form"))


def _shapes(path: Path, value: Any) -> dict[str, tuple[int, ...]]:
    found = as_mapping(value)
    if found is None or not all(isinstance(name, str) and isinstance(shape, tuple) for name, shape in found.items()):
        raise CheckpointError(_remedy(path, "its parameters' shapes are of an unknown form"))
    return {name: tuple(int(length) for length in shape) for name, shape in found.items()}


def _cut(vectors: Sequence[Tensor], start: int, end: int) -> list[Piece]:
    """The pieces of ``vectors``, thought of as one behind the other, between two places."""
    pieces: list[Piece] = []
    first = 0
    for vector in vectors:
        low, high = max(start, first) - first, min(end, first + len(vector)) - first
        if low < high:
            pieces.append((vector, low, high))
        first += len(vector)
    return pieces


def _lazy(name: str, shape: tuple[int, ...], pieces: list[Piece], trained: Any) -> LazyTensor:
    if sum(high - low for _, low, high in pieces) < math.prod(shape):
        raise RefusedError(f"the parts of {name!r} hold fewer than its {math.prod(shape)} elements")
    dtype = pieces[0][0].dtype if pieces else torch.float32
    return LazyTensor(torch.Size(shape), dtype, partial(_read, name, shape, pieces, trained))


def _read(name: str, shape: tuple[int, ...], pieces: list[Piece], trained: Any) -> Tensor:
    """Join a tensor, and compare it with the module's own in the precision of training where there is one."""
    flat = torch.cat([vector[low:high] for vector, low, high in pieces]) if pieces else torch.empty(0)
    result = flat[: math.prod(shape)].view(shape).detach()
    if isinstance(trained, Tensor):
        same = trained.shape == result.shape and torch.equal(
            torch.nan_to_num(result.to(trained.dtype)), torch.nan_to_num(trained.detach())
        )
        if not same:
            raise RefusedError(f"an optimizer whose fp32 copy of {name!r} is not the weight that the module has")
    return result


def is_deepspeed(path: Path) -> bool:
    """Whether a folder looks like one that DeepSpeed wrote."""
    return (path / "zero_to_fp32.py").is_file() or any(path.glob("**/*model_states.pt"))


def _remedy(path: Path, why: str) -> str:
    script = next(
        (file for file in (path / "zero_to_fp32.py", path.parent / "zero_to_fp32.py") if file.is_file()), None
    )
    how = (
        f"DeepSpeed put a script beside it for this: `python {script} {path} consolidated/` (needs deepspeed; it runs "
        "code from the folder and unpickles, so use it on folders you trust only)"
        if script is not None
        else "Consolidate it with DeepSpeed's zero_to_fp32.py where it was written"
    )
    return f"{path} is a DeepSpeed checkpoint that cannot be joined: {why}. {how}, then give the result."
