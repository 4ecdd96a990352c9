"""Checkpoints that are folders: sharded Hugging Face, ``torch.distributed.checkpoint``, DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_wsl.checkpoint.dcp import read_distributed
from lit_wsl.checkpoint.deepspeed import is_deepspeed, read_deepspeed
from lit_wsl.checkpoint.document import Document
from lit_wsl.errors import CheckpointError

ReadFile = Callable[[Path], Document]
MAX_INDEX = 256 << 20


def read_folder(path: Path, read_file: ReadFile) -> Document:
    """Read a folder by what lies in it.

    Args:
        path: the folder, or the ``*.index.json`` in it.
        read_file: reads one shard.

    Raises:
        CheckpointError: naming what the folder lacks.
    """
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
    return Document(f"{kind}-sharded", tree, stubbed, notes, metadata=_first_metadata(shards), lazy=True)


def _first_metadata(shards: dict[str, Document]) -> Any:
    found = [shard.metadata for shard in shards.values() if shard.metadata is not None]
    return found[0] if found else None


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
