"""Operations that change values: resized position tables, partly copied heads, folded batch norm, new input channels.

None of them is ever chosen unasked: the user opts in by name (``adapt=["partial_head"]``), the report names every
tensor that went through one, and none can be reversed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lit_wsl.errors import PlanError
from lit_wsl.plan.operations import OPERATIONS, Operation, Shape

Layout = Literal["tokens", "channels_first", "channels_last"]


@dataclass(frozen=True)
class _Adaptation(Operation):
    """An operation that changes values, so that there is no way back."""

    lossless: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = False
    why_final: ClassVar[str] = ""

    def reverse(self) -> Operation:
        """Refuse: what was interpolated, summed or left out cannot be restored."""
        raise PlanError(f"{self.name} cannot be reversed: {self.why_final}.")


@dataclass(frozen=True)
class ResizePositionEmbedding(_Adaptation):
    """Resize tables over a grid of positions by bicubic interpolation with antialiasing, in single precision at least.

    Args:
        source: Height and width of the grid in the checkpoint.
        target: Height and width of the grid in the model.
        prefix: Rows before the grid that belong to no position (class and register tokens); kept as they are.
        layout: ``"tokens"`` for ``(prefix + h*w, C)`` and ``(1, prefix + h*w, C)``, row by row; ``"channels_first"``
            for ``(1, C, h, w)``; ``"channels_last"`` for ``(1, h, w, C)``.

    >>> ResizePositionEmbedding((14, 14), (16, 16), 1).shapes([(1, 197, 8)])
    [(1, 257, 8)]
    """

    source: tuple[int, int]
    target: tuple[int, int]
    prefix: int = 0
    layout: Layout = "tokens"
    name: ClassVar[str] = "resize_position_embedding"
    why_final: ClassVar[str] = "interpolation loses values; match the other way round with adapt to resize back"

    def __post_init__(self) -> None:
        self._at_least(1, source=self.source, target=self.target)
        self._at_least(0, prefix=self.prefix)
        if self.layout not in ("tokens", "channels_first", "channels_last"):
            raise PlanError(
                f"{self.name}: layout must be tokens, channels_first or channels_last, got {self.layout!r}."
            )
        if self.prefix and self.layout != "tokens":
            raise PlanError(f"{self.name}: only tables of tokens have a prefix.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        return [self._shape(tuple(s), inputs) for s in inputs]

    def _shape(self, shape: Shape, inputs: Sequence[Shape]) -> Shape:
        (h, w), target = self.source, self.target
        if self.layout == "tokens":
            if len(shape) not in (2, 3) or shape[-2] != self.prefix + h * w:
                raise self._misfit(inputs, f"it takes tables of {self.prefix} + {h}x{w} rows")
            return (*shape[:-2], self.prefix + target[0] * target[1], shape[-1])
        axis = 2 if self.layout == "channels_first" else 1
        if len(shape) != 4 or tuple(shape[axis : axis + 2]) != (h, w):
            raise self._misfit(inputs, f"it takes tables of 4 axes over a grid of {h}x{w}")
        return (*shape[:axis], *target, *shape[axis + 2 :])

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        return [self._resize(t) for t in inputs]

    def _resize(self, table: Tensor) -> Tensor:
        wide = table.detach().to(torch.promote_types(table.dtype, torch.float32))
        if self.layout == "channels_first":
            return self._interpolate(wide).to(table.dtype)
        if self.layout == "channels_last":
            return self._interpolate(wide.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(table.dtype)
        kept, grid = table.narrow(-2, 0, self.prefix), wide.narrow(-2, self.prefix, wide.shape[-2] - self.prefix)
        image = grid.reshape(-1, *self.source, grid.shape[-1]).permute(0, 3, 1, 2)
        rows = self._interpolate(image).permute(0, 2, 3, 1).reshape(*grid.shape[:-2], -1, grid.shape[-1])
        return torch.cat([kept.detach(), rows.to(table.dtype)], dim=-2)

    def _interpolate(self, image: Tensor) -> Tensor:
        return interpolate(image, size=self.target, mode="bicubic", antialias=True, align_corners=False)


@dataclass(frozen=True)
class PartialHead(_Adaptation):
    """Copy the first ``min(source, target)`` rows of each tensor; the model keeps its remaining rows bit for bit.

    Args:
        source: Rows (classes) in the checkpoint.
        target: Rows (classes) in the model.

    >>> PartialHead(10, 3).shapes([(10, 8)])
    [(3, 8)]
    """

    source: int
    target: int
    name: ClassVar[str] = "partial_head"
    needs_target: ClassVar[bool] = True
    why_final: ClassVar[str] = "the rows that were left out are not in the model"

    def __post_init__(self) -> None:
        self._at_least(1, source=self.source, target=self.target)

    @property
    def shares(self) -> tuple[Fraction, Fraction]:
        rows = min(self.source, self.target)
        return Fraction(rows, self.source), Fraction(rows, self.target)

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        if any(not s or s[0] != self.source for s in inputs):
            raise self._misfit(inputs, f"it takes tensors of {self.source} rows")
        return [(self.target, *s[1:]) for s in inputs]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        wanted = self._check(inputs)
        if [tuple(t.shape) for t in targets] != wanted:
            raise self._misfit([tuple(t.shape) for t in targets], f"the model's tensors must have the shapes {wanted}")
        rows = min(self.source, self.target)
        # in the model's data type: the rows that stay must not be rounded to the checkpoint's and back
        return [
            torch.cat([value[:rows].to(device=own.device, dtype=own.dtype), own[rows:]])
            for value, own in zip((t.detach() for t in inputs), (t.detach() for t in targets))
        ]


@dataclass(frozen=True)
class FoldBatchNorm(_Adaptation):
    """Fold a batch norm into the linear map before it: the same function in evaluation mode.

    ``W' = W * gamma / sqrt(var + eps)`` and ``b' = beta + (b - mean) * gamma / sqrt(var + eps)``, computed in double
    precision. Takes ``[weight, bias (if any), gamma, beta, running_mean, running_var]``, where the output channels are
    axis 0 of the weight, and gives ``[weight, bias]``.

    Args:
        bias: Whether the linear map has a bias of its own.
        affine: Whether the norm has ``gamma`` and ``beta``.
        eps: The norm's ``eps``, which checkpoints do not hold; 1e-5 is PyTorch's default.

    >>> FoldBatchNorm(bias=False).shapes([(8, 3, 3, 3), (8,), (8,), (8,), (8,)])
    [(8, 3, 3, 3), (8,)]
    """

    bias: bool
    affine: bool = True
    eps: float = 1e-5
    name: ClassVar[str] = "fold_batchnorm"
    keeps_function: ClassVar[bool] = True
    why_final: ClassVar[str] = "the statistics and scales of the batch norm are multiplied into the weights"

    def __post_init__(self) -> None:
        if not 0.0 <= self.eps < 1.0:
            raise PlanError(f"{self.name}: eps must be at least 0 and below 1, got {self.eps!r}.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        vectors = int(self.bias) + 2 * int(self.affine) + 2
        if len(inputs) != 1 + vectors:
            raise self._misfit(inputs, f"it takes a weight and {vectors} vectors")
        weight = tuple(inputs[0])
        if len(weight) < 2 or any(tuple(s) != weight[:1] for s in inputs[1:]):
            raise self._misfit(inputs, "every vector must have one value for each output channel, axis 0 of the weight")
        return [weight, weight[:1]]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        weight, *vectors = (t.detach().double() for t in inputs)
        bias = vectors.pop(0) if self.bias else torch.zeros_like(vectors[0])
        *affine, mean, var = vectors
        scale = torch.rsqrt(var + self.eps)
        shift = torch.zeros_like(mean)
        if self.affine:
            scale, shift = scale * affine[0], affine[1]
        dtype = inputs[0].dtype
        folded = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return [folded.to(dtype), (shift + (bias - mean) * scale).to(dtype)]


@dataclass(frozen=True)
class NewInputChannels(_Adaptation):
    """Give the first convolution another number of input channels (axis 1).

    To one channel the weights are summed, so that a grey picture gives what its colour copy gave. To more, they are
    repeated in turn and scaled by ``source / target``, so that the activations keep their size. A bias that comes along
    (of a convolution into which a norm was folded) stays as it is.

    Args:
        source: Input channels in the checkpoint.
        target: Input channels in the model.

    >>> NewInputChannels(3, 1).apply([torch.ones(2, 3, 1, 1)])[0].flatten()
    tensor([3., 3.])
    """

    source: int
    target: int
    name: ClassVar[str] = "new_input_channels"
    why_final: ClassVar[str] = "the weights of the old channels are summed or repeated"

    def __post_init__(self) -> None:
        self._at_least(1, source=self.source, target=self.target)

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        if any(len(s) != 1 and (len(s) < 3 or s[1] != self.source) for s in inputs):
            raise self._misfit(inputs, f"it takes the weights of convolutions with {self.source} input channels")
        return [(s[0], self.target, *s[2:]) if len(s) > 1 else tuple(s) for s in inputs]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        return [self._adapt(t.detach()) if t.ndim > 1 else t for t in inputs]

    def _adapt(self, weight: Tensor) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.target == 1:
            return wide.sum(1, keepdim=True).to(weight.dtype)
        turns = torch.arange(self.target, device=weight.device) % self.source
        return (wide[:, turns] * (self.source / self.target)).to(weight.dtype)


ADAPTATIONS: tuple[type[Operation], ...] = (ResizePositionEmbedding, PartialHead, FoldBatchNorm, NewInputChannels)
OPERATIONS.update({op.name: op for op in ADAPTATIONS})
