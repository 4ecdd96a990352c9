"""Remarks on what a checkpoint holds that no model takes as it is: adapters, packed numbers, several fitting parts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from lit_wsl.matching.copies import COPIES
from lit_wsl.matching.tree import owner_path, shape_key
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, ParameterInfo

MAX_DEPTH = 6  # modules above a copy of the model


def hints(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> tuple[str, ...]:
    """Remarks on adapters that were not merged, packed weights, and several copies of what the model needs."""
    open_s = {u.name for u in plan.unmatched_source}
    if not open_s:
        return ()
    unsure = {s for a in plan.ambiguous for c in a.candidates for s in c.sources}
    copies = "" if any(note.startswith(COPIES) for note in plan.notes) else _copies(plan, source, target, open_s)
    found = (_adapters(source, open_s - unsure), _packed(plan, source, open_s), _scaled(source, open_s), copies)
    return tuple(text for text in found if text)


def _adapters(source: ModelDescription, open_s: set[str]) -> str:
    """Low-rank pairs: two matrices whose product has the shape of the weight that they stand beside."""
    beside: dict[str, list[ParameterInfo]] = defaultdict(list)
    for info in source.parameters:
        if len(info.shape) == 2:
            path = owner_path(info.name)
            for _ in range(3):
                path = path.rpartition(".")[0]
                beside[path].append(info)
                if not path:
                    break
    pairs = []
    for infos in beside.values():
        thin = [i for i in infos if i.name in open_s]
        if len(thin) == 2 and len(infos) <= 3:
            a, b = sorted(thin, key=lambda i: i.shape[0])
            rank = a.shape[0]
            whole = (b.shape[0], a.shape[1])
            base = [i for i in infos if i not in thin]
            if b.shape[1] == rank <= min(whole) // 2 and all(i.shape == whole for i in base):
                pairs.append((a, b))
    unique = list(dict.fromkeys((a.name, b.name) for a, b in pairs))
    if not unique:
        return ""
    return (
        f"the checkpoint holds {len(unique)} low-rank adapters (LoRA) that were not loaded, first {unique[0][0]} and "
        f"{unique[0][1]}: what it computes needs them; merge them into the base weights first (merge_and_unload)"
    )


def _packed(plan: TransferPlan, source: ModelDescription, open_s: set[str]) -> str:
    """Weights of four bits, two to a byte."""
    sizes = Counter(math.prod(u.shape) for u in plan.unmatched_target)
    packed = [
        i.name
        for i in source.parameters
        if i.name in open_s and i.dtype == torch.uint8 and i.numel > 1 and sizes[2 * i.numel]
    ]
    if not packed:
        return ""
    return (
        f"{len(packed)} tensors of the checkpoint are packed, two numbers of four bits to a byte, first {packed[0]}: "
        "dequantise the checkpoint first"
    )


def scaled_weights(infos: Sequence[ParameterInfo]) -> dict[str, str]:
    """Weights of eight bits that mean nothing without the scale beside them, and the name of that."""
    short = [i for i in infos if i.dtype.itemsize == 1 and i.dtype.is_floating_point]
    beside: dict[str, list[ParameterInfo]] = defaultdict(list)
    for info in infos if short else ():
        beside[info.module_path].append(info)
    return {
        i.name: scale.name for i in short for scale in beside[i.module_path] if scale is not i and "scale" in scale.leaf
    }


def _scaled(source: ModelDescription, open_s: set[str]) -> str:
    names = [(name, scale) for name, scale in scaled_weights(source.parameters).items() if name in open_s]
    if not names:
        return ""
    return (
        f"{len(names)} weights of the checkpoint are numbers of eight bits to be multiplied by a scale, first "
        f"{names[0][0]} by {names[0][1]}: dequantise the checkpoint first"
    )


def _copies(plan: TransferPlan, source: ModelDescription, target: ModelDescription, open_s: set[str]) -> str:
    """Several parts of the checkpoint that each hold all that the model needs."""
    wanted = Counter(shape_key(i.shape) for i in target.parameters if i.kind == "parameter")
    if len(open_s) < sum(wanted.values()) or not (plan.ambiguous or plan.unmatched_target):
        return ""
    held: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for info in source.parameters:
        path = info.name
        parts = path.split(".")[:-1]
        for k in range(1, min(len(parts), MAX_DEPTH) + 1):
            held[".".join(parts[:k])][shape_key(info.shape)] += 1
    fits = [path for path, shapes in held.items() if all(shapes[key] >= n for key, n in wanted.items())]
    lowest = [path for path in fits if not any(other.startswith(path + ".") for other in fits)]
    if len(lowest) < 2:
        return ""
    return (
        f"the model fits {' and '.join(lowest[:4])} of the checkpoint: choose with source_prefix={lowest[0]!r}, or "
        "let a proof decide"
    )
