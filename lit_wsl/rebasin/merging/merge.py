"""Merge aligned models: average, interpolation, task arithmetic.

Nothing here aligns: give it state dicts whose units already stand in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_wsl.errors import RebasinError


def linear_combination(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum(w * t)`` accumulated in float64 and rounded once, to the dtype of the first tensor."""
    result = torch.zeros(tensors[0].shape, dtype=torch.float64, device=tensors[0].device)
    for tensor, weight in zip(tensors, weights):
        result.add_(tensor.detach().to(device=result.device, dtype=torch.float64), alpha=weight)
    return result.to(tensors[0].dtype)


def average(state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Weighted mean of aligned state dicts, buffers included.

    Args:
        state_dicts: at least one, with the same names and shapes.
        weights: one per state dict, used as given; by default all equal and summing to one.

    Returns:
        A new state dict. Entries that are not floating point (counters) come from the first one.

    Raises:
        RebasinError: names, shapes or the number of weights don't fit.
    """
    if not state_dicts:
        raise RebasinError("nothing to average: give at least one state dict")
    weights = [1.0 / len(state_dicts)] * len(state_dicts) if weights is None else list(weights)
    if len(weights) != len(state_dicts):
        raise RebasinError(f"{len(state_dicts)} state dicts but {len(weights)} weights")
    first = state_dicts[0]
    for number, other in enumerate(state_dicts[1:], start=1):
        _check_same_layout(first, other, f"state dict {number}")
    return {
        name: linear_combination([sd[name] for sd in state_dicts], weights)
        if tensor.is_floating_point()
        else tensor.detach().clone()
        for name, tensor in first.items()
    }


def interpolate(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``(1 - alpha) a + alpha b``.

    >>> interpolate({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, 0.25)
    {'w': tensor([1.])}
    """
    return average([a, b], [1.0 - alpha, alpha])


def task_arithmetic(
    pretrained: Mapping[str, Tensor], task_vectors: Sequence[Mapping[str, Tensor]], scale: float | Sequence[float] = 1.0
) -> dict[str, Tensor]:
    """``pretrained + sum(scale_i * task_vector_i)`` (Ilharco et al. 2023, "Editing Models with Task Arithmetic").

    Args:
        pretrained: the state dict that the task vectors were taken from.
        task_vectors: differences by name; a name without an entry is left as pretrained.
        scale: one for all, or one per task vector.

    Raises:
        RebasinError: a task vector has a name or shape that the pretrained model lacks, or the scales don't fit.
    """
    scales = [float(scale)] * len(task_vectors) if isinstance(scale, (int, float)) else [float(s) for s in scale]
    if len(scales) != len(task_vectors):
        raise RebasinError(f"{len(task_vectors)} task vectors but {len(scales)} scales")
    for number, vector in enumerate(task_vectors):
        for name, delta in vector.items():
            if name not in pretrained:
                raise RebasinError(f"task vector {number} has {name!r}, which the pretrained model lacks")
            if delta.shape != pretrained[name].shape:
                shapes = f"{tuple(delta.shape)}, pretrained {tuple(pretrained[name].shape)}"
                raise RebasinError(f"task vector {number}: {name!r} has shape {shapes}")
    merged = {}
    for name, tensor in pretrained.items():
        parts = [(vector[name], s) for vector, s in zip(task_vectors, scales) if name in vector]
        if parts and tensor.is_floating_point():
            merged[name] = linear_combination([tensor, *(p[0] for p in parts)], [1.0, *(p[1] for p in parts)])
        else:
            merged[name] = tensor.detach().clone()
    return merged


def _check_same_layout(first: Mapping[str, Tensor], other: Mapping[str, Tensor], which: str) -> None:
    apart = sorted(set(first) ^ set(other))
    if apart:
        raise RebasinError(f"{which} and the first differ in {len(apart)} names, such as {apart[0]!r}")
    for name, tensor in first.items():
        if tensor.shape != other[name].shape:
            shapes = f"{tuple(other[name].shape)}, in the first {tuple(tensor.shape)}"
            raise RebasinError(f"{name!r} has shape {shapes} in {which}")
