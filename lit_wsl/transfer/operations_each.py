"""Operations on each tensor alone: its axes in another order, another shape, another data type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_wsl.errors import PlanError
from lit_wsl.transfer.operation import Operation, Shape


@dataclass(frozen=True)
class Permute(Operation):
    """Reorder the axes of each tensor, as ``Tensor.permute``."""

    dims: tuple[int, ...]
    name: ClassVar[str] = "permute"

    def __post_init__(self) -> None:
        if sorted(self.dims) != list(range(len(self.dims))):
            raise PlanError(f"permute: dims must name each axis from 0 once, got {self.dims}.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:  # noqa: D102
        if any(len(s) != len(self.dims) for s in inputs):
            raise self._misfit(inputs, f"the order {self.dims} is for {len(self.dims)} axes")
        return [tuple(s[d] for d in self.dims) for s in inputs]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:  # noqa: D102
        self._check(inputs)
        return [t.permute(self.dims) for t in inputs]

    def reverse(self) -> Operation:  # noqa: D102
        return Permute(tuple(self.dims.index(i) for i in range(len(self.dims))))


@dataclass(frozen=True)
class Transpose(Operation):
    """Swap two axes of each tensor: ``Conv1D`` of GPT-2 against ``nn.Linear``."""

    dim0: int = 0
    dim1: int = 1
    name: ClassVar[str] = "transpose"

    def __post_init__(self) -> None:
        self._at_least(0, dim0=self.dim0, dim1=self.dim1)

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:  # noqa: D102
        if any(len(s) <= max(self.dim0, self.dim1) for s in inputs):
            raise self._misfit(inputs, f"axes {self.dim0} and {self.dim1} are needed")
        out = []
        for s in inputs:
            t = list(s)
            t[self.dim0], t[self.dim1] = t[self.dim1], t[self.dim0]
            out.append(tuple(t))
        return out

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:  # noqa: D102
        self._check(inputs)
        return [t.transpose(self.dim0, self.dim1) for t in inputs]

    def reverse(self) -> Operation:  # noqa: D102
        return self


@dataclass(frozen=True)
class Reshape(Operation):
    """Give each tensor another shape of as many elements: Linear <-> 1x1 conv, ``(C, 1, 1)`` <-> ``(C,)``.

    Each shape may leave one size open as ``-1``, for tensors that differ along that axis: the parts of a fused
    projection have the same heads and unequal numbers of them.

    >>> Reshape((2, -1, 4), (-1, 4)).shapes([(2, 3, 4), (2, 1, 4)])
    [(6, 4), (2, 4)]
    """

    source: Shape
    target: Shape
    name: ClassVar[str] = "reshape"

    def __post_init__(self) -> None:
        self._at_least(-1, source=self.source, target=self.target)
        is_open = [shape.count(-1) for shape in (self.source, self.target)]
        if max(is_open) > 1 or is_open[0] != is_open[1]:
            raise PlanError(f"reshape from {self.source} to {self.target}: both shapes or none may have one open size.")
        if not is_open[0] and math.prod(self.source) != math.prod(self.target):
            raise PlanError(f"reshape from {self.source} to {self.target} changes the number of elements.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:  # noqa: D102
        return [self._shape(tuple(s), inputs) for s in inputs]

    def _shape(self, shape: Shape, inputs: Sequence[Shape]) -> Shape:
        fits = len(shape) == len(self.source) and all(want in (-1, got) for got, want in zip(shape, self.source))
        if not fits:
            raise self._misfit(inputs, f"it was planned for shape {self.source}")
        if -1 not in self.target:
            return tuple(self.target)
        known = math.prod(size for size in self.target if size != -1)
        if known == 0 or math.prod(shape) % known:
            raise self._misfit(inputs, f"no size takes the open axis of {self.target}")
        return tuple(math.prod(shape) // known if size == -1 else size for size in self.target)

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:  # noqa: D102
        self._check(inputs)
        shapes = self.shapes([tuple(t.shape) for t in inputs])
        return [t.reshape(shape) for t, shape in zip(inputs, shapes)]

    def reverse(self) -> Operation:  # noqa: D102
        return Reshape(self.target, self.source)


@dataclass(frozen=True)
class Cast(Operation):
    """Convert each tensor from one data type to another, e.g. ``float16`` -> ``float32``.

    Only a cast to a type that holds every value of the first can be reversed: rounding cannot be undone.
    """

    source: str
    target: str
    name: ClassVar[str] = "cast"

    def __post_init__(self) -> None:
        for dtype in (self.source, self.target):
            if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
                raise PlanError(f"cast: {dtype!r} is not a torch data type such as 'float32' or 'bfloat16'.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:  # noqa: D102
        return [tuple(s) for s in inputs]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:  # noqa: D102
        return [t.to(getattr(torch, self.target)) for t in inputs]

    def reverse(self) -> Operation:  # noqa: D102
        if not _holds(getattr(torch, self.source), getattr(torch, self.target)):
            raise PlanError(
                f"cast: {self.source} -> {self.target} rounds, which cannot be undone. To go back all the same, remove "
                "the cast from the plan's entry first."
            )
        return Cast(self.target, self.source)


def _holds(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of one data type has an exact counterpart in another."""
    if source == target or source == torch.bool:
        return True
    if source.is_floating_point or source.is_complex:
        try:
            return torch.promote_types(source, target) == target
        except RuntimeError:  # torch promotes no 8-bit floating-point types
            return target in (torch.float32, torch.float64)
    low, high = torch.iinfo(source).min, torch.iinfo(source).max
    if target.is_floating_point or target.is_complex:
        return high <= 2 / torch.finfo(target).eps
    return target != torch.bool and torch.iinfo(target).min <= low and high <= torch.iinfo(target).max
