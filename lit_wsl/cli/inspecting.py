"""``lit-wsl inspect`` and ``lit-wsl diff``: what is in a checkpoint, and how two of them differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint import Checkpoint, open_checkpoint
from lit_wsl.checkpoint.records import ForeignName, ForeignObject, as_mapping
from lit_wsl.cli.console import fields, on_terminal, progress, put_json, remark, say, size_text, table
from lit_wsl.structure.description import dtype_text, shape_text
from lit_wsl.structure.families import fold


def inspect(options: Any) -> int:
    """Run ``inspect``."""
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


CHUNK = 1 << 22  # elements compared at a time; bounds the memory


@dataclass(frozen=True)
class Difference:
    """How one tensor differs."""

    name: str
    kind: str  # ``"equal"``, ``"values"``, ``"shape"``, ``"dtype"``, ``"only in first"`` or ``"only in second"``
    detail: str = ""  # shapes or dtypes where these differ
    changed: int = 0  # number of elements that differ
    of: int = 0  # number of elements
    largest: float = 0.0  # largest absolute difference; infinite where only one side is finite
    relative: float = 0.0  # norm of the difference over the norm of the first


def diff(options: Any) -> int:
    """Run ``diff``."""
    first: Mapping[str, Tensor] = open_checkpoint(options.first, weights=options.checkpoint_weights)
    second = open_checkpoint(options.second, weights=options.checkpoint_weights)
    if options.plan:
        from lit_wsl.convert.weights import convert_tensors
        from lit_wsl.plan.plan import TransferPlan

        first = convert_tensors(first, TransferPlan.load(options.plan))
    with progress("comparing") as step:
        found = compare(first, second, tolerance=options.tolerance, step=step)
    differing = [d for d in found if d.kind != "equal"]
    if options.json:
        put_json({"equal": len(found) - len(differing), "different": [_plain(d) for d in differing]}, options.json)
    else:
        _show_differences(found, differing, options.limit)
    if found and not options.plan and all(d.kind.startswith("only") for d in found):
        remark("no name is in both: --plan plan.json compares across a refactoring")
    return 1 if differing else 0


def compare(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, tolerance: float = 0.0, step: Any = None
) -> list[Difference]:
    """Compare two state dicts, tensor by tensor, in the order of the first."""
    names = [*first, *(name for name in second if name not in first)]
    found = []
    for number, name in enumerate(names, 1):
        found.append(_compare(name, first, second, tolerance))
        if step is not None:
            step(number, len(names))
    return found


def _compare(name: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor], tolerance: float) -> Difference:
    if name not in second:
        return Difference(name, "only in first", shape_text(tuple(first[name].shape)))
    if name not in first:
        return Difference(name, "only in second", shape_text(tuple(second[name].shape)))
    a, b = first[name], second[name]
    if a.shape != b.shape:
        return Difference(name, "shape", f"{shape_text(tuple(a.shape))} against {shape_text(tuple(b.shape))}")
    changed, largest, square, base = 0, 0.0, 0.0, 0.0
    for x, y in zip(a.detach().reshape(-1).split(CHUNK), b.detach().reshape(-1).split(CHUNK)):
        if x.dtype == y.dtype and torch.equal(x, y):
            base += float(_wide(x).norm()) ** 2
            continue
        u, v = _wide(x), _wide(y)
        gap = torch.where((u == v) | (u.isnan() & v.isnan()), torch.zeros_like(u), u - v).abs()
        gap = gap.double().nan_to_num(nan=math.inf, posinf=math.inf)
        changed += int((gap > tolerance).sum())
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
        square += float(gap.square().sum())
        base += float(u.norm()) ** 2
    relative = math.sqrt(square / base) if base > 0 else (math.inf if square else 0.0)
    numbers = {"changed": changed, "of": a.numel(), "largest": largest, "relative": relative}
    if changed:
        return Difference(name, "values", "", **numbers)  # type: ignore[arg-type]
    if a.dtype != b.dtype:
        return Difference(name, "dtype", f"{a.dtype} against {b.dtype}".replace("torch.", ""), of=a.numel())
    return Difference(name, "equal", "", **numbers)  # type: ignore[arg-type]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _plain(difference: Difference) -> dict[str, Any]:
    data = asdict(difference)
    return {k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v) for k, v in data.items()}


def _show_differences(found: list[Difference], differing: list[Difference], limit: int) -> None:
    """Print families of tensors that differ in the same way, the largest difference first."""
    rows = []
    for family in fold([(d.name,) for d in differing], [(d.kind, d.detail, d.of) for d in differing]):
        members = [differing[m] for m in family.members]
        largest, relative = max(d.largest for d in members), max(d.relative for d in members)
        changed, total = sum(d.changed for d in members), sum(d.of for d in members)
        values = members[0].kind == "values"
        rows.append(
            (
                -relative if values else -math.inf,
                (
                    family.patterns[0],
                    members[0].kind if values or not members[0].detail else f"{members[0].kind}: {members[0].detail}",
                    str(len(members)),
                    f"{changed:,} of {total:,}" if values else "",
                    f"{largest:.3g}" if values else "",
                    f"{relative:.3g}" if values else "",
                ),
            )
        )
    rows.sort(key=lambda row: row[0])
    shown = [cells for _, cells in (rows if limit <= 0 else rows[:limit])]
    if shown and on_terminal():  # a line for the names, which may be long, and one for the numbers
        for name, kind, tensors, elements, most, share in shown:
            told = f": {elements} elements, largest {most}, relative {share}" if elements else ""
            say(f"{name}{f' (x{tensors})' if tensors != '1' else ''}")
            say(f"    {kind}{told}")
    elif shown:
        table(("tensor", "differs in", "tensors", "elements", "largest", "relative"), shown, right=(2, 3, 4, 5))
    if len(shown) < len(rows):
        remark(f"{len(rows) - len(shown)} more lines; --limit 0 shows all")
    say(f"{len(found) - len(differing)} tensors are equal, {len(differing)} differ")
