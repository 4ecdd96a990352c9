"""DeepSpeed ZeRO folders, joined without DeepSpeed.

DeepSpeed's own converter unpickles whatever the files hold, so it is not called; its files are read like all others and
their parts are put together here (ZeRO, https://arxiv.org/abs/1910.02054):

* stages 1 and 2 flatten the fp32 copy of each optimizer group into one vector, cut evenly over the ranks;
* stage 3 cuts every parameter by itself: each rank holds ``ceil(numel / ranks)`` of its elements, padded at the end;
* ``param_shapes`` names the parameters of each group in order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.allowlist import RefusedError
from lit_wsl.checkpoint.document import Document, LazyTensor
from lit_wsl.checkpoint.records import as_mapping
from lit_wsl.errors import CheckpointError

ReadFile = Callable[[Path], Document]
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
    tied = {_place(module[name]): value for name, value in joined.items() if isinstance(module.get(name), Tensor)}
    return {name: joined.get(name, tied.get(_place(value), value)) for name, value in module.items()} | joined


def _place(value: Any) -> Any:
    """What two names of one tied weight have in common."""
    return (value.data_ptr(), value.shape) if isinstance(value, Tensor) and value.numel() else None


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
