"""Operations between one tensor and several: split and concat, stack and unstack, tie and fan out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_wsl.errors import PlanError
from lit_wsl.transfer.operation import Operation, Shape


@dataclass(frozen=True)
class Split(Operation):
    """Cut each tensor along an axis into parts of the given sizes: qkv -> q, k, v."""

    dim: int
    sizes: tuple[int, ...]
    name: ClassVar[str] = "split"

    def __post_init__(self) -> None:
        self._at_least(0, dim=self.dim, sizes=self.sizes)
        if not self.sizes:
            raise PlanError("split: sizes must give at least one size.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:  # noqa: D102
        out: list[Shape] = []
        self._bound(inputs, len(self.sizes))
        for s in inputs:
            if len(s) <= self.dim or s[self.dim] != sum(self.sizes):
                raise self._misfit(inputs, f"axis {self.dim} must have {sum(self.sizes)} entries")
            out += [(*s[: self.dim], size, *s[self.dim + 1 :]) for size in self.sizes]
        return out

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:  # noqa: D102
        self._check(inputs)
        return [part for t in inputs for part in t.split(list(self.sizes), dim=self.dim)]

    def reverse(self) -> Operation:  # noqa: D102
        return Concat(self.dim, self.sizes)


@dataclass(frozen=True)
class Concat(Operation):
    """Join consecutive runs of ``len(sizes)`` tensors along an axis: q, k, v -> qkv."""

    dim: int
    sizes: tuple[int, ...]
    name: ClassVar[str] = "concat"

    def __post_init__(self) -> None:
        self._at_least(0, dim=self.dim, sizes=self.sizes)
        if not self.sizes:
            raise PlanError("concat: sizes must give at least one size.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:  # noqa: D102
        n = len(self.sizes)
        if not inputs or len(inputs) % n:
            raise self._misfit(inputs, f"it joins runs of {n} tensors")
        out: list[Shape] = []
        for start in range(0, len(inputs), n):
            run = inputs[start : start + n]
            rest = {(*s[: self.dim], *s[self.dim + 1 :]) for s in run}
            if any(len(s) <= self.dim for s in run) or len(rest) != 1:
                raise self._misfit(inputs, f"the other axes must agree to join along axis {self.dim}")
            if tuple(s[self.dim] for s in run) != tuple(self.sizes):
                raise self._misfit(inputs, f"axis {self.dim} must have the sizes {self.sizes}")
            out.append((*run[0][: self.dim], sum(self.sizes), *run[0][self.dim + 1 :]))
        return out

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:  # noqa: D102
        self._check(inputs)
        n = len(self.sizes)
        return [torch.cat(list(inputs[i : i + n]), dim=self.dim) for i in range(0, len(inputs), n)]

    def reverse(self) -> Operation:  # noqa: D102
        return Split(self.dim, self.sizes)


@dataclass(frozen=True)
class Stack(Operation):
    """Stack consecutive runs of ``count`` tensors along a new axis: N experts -> one 3-D tensor."""

    dim: int
    count: int
    name: ClassVar[str] = "stack"

    def __post_init__(self) -> None:
        self._at_least(0, dim=self.dim)
        self._at_least(1, count=self.count)

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:  # noqa: D102
        if not inputs or len(inputs) % self.count:
            raise self._misfit(inputs, f"it stacks runs of {self.count} tensors")
        out: list[Shape] = []
        for start in range(0, len(inputs), self.count):
            run = inputs[start : start + self.count]
            if any(tuple(s) != tuple(run[0]) for s in run) or self.dim > len(run[0]):
                raise self._misfit(inputs, f"it stacks tensors of one shape, along a new axis {self.dim}")
            out.append((*run[0][: self.dim], self.count, *run[0][self.dim :]))
        return out

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:  # noqa: D102
        self._check(inputs)
        return [torch.stack(list(inputs[i : i + self.count]), dim=self.dim) for i in range(0, len(inputs), self.count)]

    def reverse(self) -> Operation:  # noqa: D102
        return Unstack(self.dim, self.count)


@dataclass(frozen=True)
class Unstack(Operation):
    """Take each tensor apart along an axis of ``count`` entries: one 3-D tensor -> N experts."""

    dim: int
    count: int
    name: ClassVar[str] = "unstack"

    def __post_init__(self) -> None:
        self._at_least(0, dim=self.dim)
        self._at_least(1, count=self.count)

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:  # noqa: D102
        out: list[Shape] = []
        self._bound(inputs, self.count)
        for s in inputs:
            if len(s) <= self.dim or s[self.dim] != self.count:
                raise self._misfit(inputs, f"axis {self.dim} must have {self.count} entries")
            out += [(*s[: self.dim], *s[self.dim + 1 :])] * self.count
        return out

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:  # noqa: D102
        self._check(inputs)
        return [part for t in inputs for part in t.unbind(self.dim)]

    def reverse(self) -> Operation:  # noqa: D102
        return Stack(self.dim, self.count)


@dataclass(frozen=True)
class FanOut(Operation):
    """Give one source to ``count`` targets that are tied in the source and separate in the target."""

    count: int
    name: ClassVar[str] = "fan_out"

    def __post_init__(self) -> None:
        self._at_least(1, count=self.count)

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:  # noqa: D102
        self._bound(inputs, self.count)
        return [tuple(s) for s in inputs for _ in range(self.count)]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:  # noqa: D102
        self._check(inputs)
        return [t for t in inputs for _ in range(self.count)]

    def reverse(self) -> Operation:  # noqa: D102
        return Tie(self.count)


@dataclass(frozen=True)
class Tie(Operation):
    """Take one of each run of ``count`` equal tensors; refuse if they differ, since then nothing is tied."""

    count: int
    name: ClassVar[str] = "tie"

    def __post_init__(self) -> None:
        self._at_least(1, count=self.count)

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:  # noqa: D102
        if not inputs or len(inputs) % self.count:
            raise self._misfit(inputs, f"it ties runs of {self.count} tensors")
        starts = range(0, len(inputs), self.count)
        if any(tuple(s) != tuple(inputs[i]) for i in starts for s in inputs[i : i + self.count]):
            raise self._misfit(inputs, "tensors that become one must have one shape")
        return [tuple(inputs[i]) for i in starts]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:  # noqa: D102
        self._check(inputs)
        out = []
        for i in range(0, len(inputs), self.count):
            first = inputs[i]
            if any(not _same_bits(first, other) for other in inputs[i + 1 : i + self.count]):
                raise PlanError(f"tie: the {self.count} tensors differ, so they cannot become one tensor.")
            out.append(first)
        return out

    def reverse(self) -> Operation:  # noqa: D102
        return FanOut(self.count)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal values, where NaN equals itself; tensors without data count as equal."""
    if first is second or first.is_meta or second.is_meta:
        return True
    return torch.equal(first, second) or (
        first.is_floating_point() and torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
    )
