"""``lit-wsl inspect``: what is in a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_wsl.checkpoint import Checkpoint, open_checkpoint
from lit_wsl.checkpoint.records import ForeignName, ForeignObject, as_mapping
from lit_wsl.cli.console import fields, put_json, remark, say, size_text, table
from lit_wsl.structure.description import dtype_text, shape_text
from lit_wsl.structure.families import fold


def run(options: Any) -> int:
    """Run the command."""
    checkpoint = open_checkpoint(options.checkpoint, weights=options.checkpoint_weights)
    found = [(name, tensor) for name, tensor in checkpoint.meta_items() if not options.match or options.match in name]
    if options.json:
        put_json(_as_data(checkpoint, found), options.json)
        return 0
    _head(checkpoint)
    say()
    if not found:
        remark(f"no tensor's name holds {options.match!r}")
        return 1
    rows = _rows(found, unfolded=options.all)
    table(("tensor", "shape", "dtype", "tensors", "elements"), rows, right=(3, 4))
    return 0


def _head(checkpoint: Checkpoint) -> None:
    tensors = [tensor for _, tensor in checkpoint.meta_items()]
    dtypes = Counter(dtype_text(t.dtype) for t in tensors)
    version = checkpoint.content.get("pytorch-lightning_version")
    elements, size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
    pairs = [
        ("file", str(checkpoint.path)),
        ("format", checkpoint.format + (f" (Lightning {version})" if isinstance(version, str) else "")),
        ("weights", f"{checkpoint.weights}: {len(tensors)} tensors, {elements:,} elements, {size_text(size)}"),
        ("dtypes", ", ".join(f"{dtype} ({count})" for dtype, count in dtypes.most_common())),
    ]
    pairs += [("metadata", f"{key}: {_cut(str(value))}") for key, value in (checkpoint.metadata or {}).items()]
    pairs += [("other", f"{key}: {_cut(summary(value), 200)}") for key, value in checkpoint.content.items()]
    pairs += [("stubbed", f"{name} (not imported, not run)") for name in checkpoint.stubbed]
    pairs += [("note", note) for note in checkpoint.notes]
    fields(pairs)


def _rows(found: list[tuple[str, Tensor]], *, unfolded: bool) -> list[tuple[str, ...]]:
    keys = [(tuple(tensor.shape), dtype_text(tensor.dtype)) for _, tensor in found]
    if unfolded:
        return [
            (name, shape_text(shape), dtype, "1", f"{tensor.numel():,}")
            for (name, tensor), (shape, dtype) in zip(found, keys)
        ]
    rows: list[tuple[str, ...]] = []
    for family in fold([(name,) for name, _ in found], keys):
        shape, dtype = keys[family.members[0]]
        elements = sum(found[m][1].numel() for m in family.members)
        rows.append((family.patterns[0], shape_text(shape), dtype, str(len(family)), f"{elements:,}"))
    return rows


def summary(value: Any, depth: int = 0) -> str:
    """A value of a checkpoint in one line, without its contents.

    >>> summary({"a": 1, "b": [1, 2]}), summary(3)
    ('{a: 1, b: list of 2}', '3')
    """
    if isinstance(value, Tensor):
        return f"tensor {shape_text(tuple(value.shape))} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (ForeignObject, ForeignName)):
        return repr(value)
    entries = as_mapping(value)
    if entries is not None:
        if {"state", "param_groups"} <= set(entries):
            return _optimizer(entries)
        if depth > 1 or len(entries) > 12:
            return f"mapping of {len(entries)}"
        return "{" + ", ".join(f"{_cut(str(k), 40)}: {summary(v, depth + 1)}" for k, v in entries.items()) + "}"
    if isinstance(value, (list, tuple)):
        if len(value) <= 3 and depth == 0:
            return "[" + ", ".join(summary(v, depth + 1) for v in value) + "]"
        return f"{type(value).__name__} of {len(value)}"
    return _cut(repr(value))


def _optimizer(entries: Mapping[Any, Any]) -> str:
    state, groups = entries["state"], entries["param_groups"]
    keys: dict[str, None] = {}
    for one in state.values() if isinstance(state, Mapping) else ():
        keys.update(dict.fromkeys(map(str, one) if isinstance(one, Mapping) else ()))
    count = f"{len(groups)} parameter group{'s' if len(groups) != 1 else ''}"
    return f"optimizer: {count}, {len(state)} states" + (f" ({', '.join(list(keys)[:6])})" if keys else "")


def _cut(text: str, length: int = 100) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _as_data(checkpoint: Checkpoint, found: list[tuple[str, Tensor]]) -> dict[str, Any]:
    return {
        "file": str(checkpoint.path),
        "format": checkpoint.format,
        "weights": checkpoint.weights,
        "tensors": [
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": dtype_text(tensor.dtype),
                "elements": tensor.numel(),
            }
            for name, tensor in found
        ],
        "other": {str(key): summary(value) for key, value in checkpoint.content.items()},
        "metadata": dict(checkpoint.metadata) if checkpoint.metadata is not None else None,
        "stubbed": list(checkpoint.stubbed),
        "notes": list(checkpoint.notes),
    }
