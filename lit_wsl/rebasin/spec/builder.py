"""Write a permutation spec by hand.

Inference does this for you; a hand-written spec is for what cannot be traced, or for a part of the freedom only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.spec.axis import AxisSpec, PermutationGroup, axis_from_segments
from lit_wsl.rebasin.spec.spec import PermutationSpec
from lit_wsl.structure.description import require_state_dict

DECLARED = "declared fixed"

Part: TypeAlias = "str | int | tuple[str | int, ...]"
"""One segment of an axis: a group, a number of fixed positions, or a row-major product of these."""

Layout: TypeAlias = "str | tuple[str | int, ...] | list[Part] | None"
"""What moves an axis: nothing, one part, or a list of parts one behind the other (concatenation, fused q, k, v)."""


class PermutationSpecBuilder:
    """Builds a :class:`PermutationSpec` from what the user knows of an architecture.

    Sizes of groups are read from the shapes; only what the shapes cannot tell (the number of heads) has to be said.

    >>> shapes = {"0.weight": (8, 3), "0.bias": (8,), "2.weight": (2, 8), "2.bias": (2,)}
    >>> spec = PermutationSpecBuilder(shapes).linear("0", "hidden", None).linear("2", None, "hidden").build()
    >>> spec.groups["hidden"].size
    8

    Args:
        source: The model, its state dict, or name -> shape.
        parameters: Names of the parameters among them; default: all tensors of a mapping, the parameters of a model.
    """

    def __init__(
        self,
        source: nn.Module | Mapping[str, Tensor] | Mapping[str, Sequence[int]],
        parameters: Sequence[str] | None = None,
    ) -> None:
        if isinstance(source, nn.Module):
            parameters = parameters or [name for name, _ in source.named_parameters()]
            source = source.state_dict()
        require_state_dict(source, "source")
        self.shapes = {n: tuple(t.shape if isinstance(t, Tensor) else t) for n, t in source.items()}
        self.parameters = tuple(self.shapes if parameters is None else parameters)
        self._groups: dict[str, PermutationGroup] = {}
        self._layouts: dict[str, dict[int, tuple[Layout, int | None]]] = {}
        self._known: dict[str, None] = {}

    def group(self, name: str, size: int, parent: str | None = None) -> PermutationSpecBuilder:
        """Declare a group; needed for nested groups and where the size cannot be read from an axis."""
        known = self._groups.get(name)
        if known is not None and known != PermutationGroup(name, size, parent):
            raise RebasinError(f"Group {name!r} was declared as {known}, now with size {size} and parent {parent!r}.")
        if parent is not None and parent not in self._groups:
            raise RebasinError(f"Declare group {parent!r} before {name!r}, which is nested in it.")
        self._groups[name] = PermutationGroup(name, size, parent)
        return self

    def axis(self, tensor: str, axis: int, layout: Layout, outer_axis: int | None = None) -> PermutationSpecBuilder:
        """Say what moves one axis.

        Args:
            tensor: Name of a parameter or buffer.
            axis: The axis.
            layout: ``"P"``; ``("heads", "inner")``, a product; ``["A", "B"]``, one behind the other;
                ``("channels", 49)``, where 49 positions stay together in their order.
            outer_axis: Where the parent groups lie on another axis, that axis.

        Raises:
            RebasinError: The tensor or the axis does not exist, or the lengths do not fit.
        """
        shape = self.shapes.get(tensor)
        if shape is None:
            raise RebasinError(
                f"There is no tensor {tensor!r}; the names begin with {', '.join(list(self.shapes)[:3])}."
            )
        if not 0 <= axis < len(shape):
            raise RebasinError(f"{tensor!r} has shape {shape} and no axis {axis}.")
        self._known[tensor] = None
        if isinstance(layout, str) and layout not in self._groups:
            self.group(layout, shape[axis])
        if layout is not None:
            self._layouts.setdefault(tensor, {})[axis] = (layout, outer_axis)
        return self

    def tensor(self, name: str, *layouts: Layout) -> PermutationSpecBuilder:
        """Say what moves the axes of a tensor, in order; axes that are not named stay."""
        for axis, layout in enumerate(layouts):
            self.axis(name, axis, layout)
        return self

    def linear(self, name: str, out: Layout, inp: Layout) -> PermutationSpecBuilder:
        """``{name}.weight`` ``(out, in, ...)`` and ``{name}.bias``; also convolutions."""
        self.tensor(f"{name}.weight", out, inp)
        return self.tensor(f"{name}.bias", out) if f"{name}.bias" in self.shapes else self

    conv = linear

    def norm(self, name: str, layout: Layout) -> PermutationSpecBuilder:
        """Gain, bias and statistics of a norm layer, whichever exist."""
        if f"{name}.num_batches_tracked" in self.shapes:
            self.fixed(f"{name}.num_batches_tracked")
        for part in ("weight", "bias", "running_mean", "running_var"):
            if f"{name}.{part}" in self.shapes:
                self.tensor(f"{name}.{part}", layout)
        return self

    def fixed(self, *tensors: str) -> PermutationSpecBuilder:
        """Say that nothing moves some tensors: a class bias, a counter, a scale."""
        for tensor in tensors:
            if tensor not in self.shapes:
                raise RebasinError(f"There is no tensor {tensor!r}.")
            self._known[tensor] = None
        return self

    def attention(
        self, name: str, heads: int, qkv: str | tuple[str, str, str], out: str, residual: Layout
    ) -> PermutationSpecBuilder:
        """Self-attention with an output projection.

        Args:
            name: Prefix of the new groups: ``{name}.heads``, ``{name}.qk`` and ``{name}.vo`` inside the heads.
            heads: Number of heads.
            qkv: Name of the fused weight, ``(3 * heads * head_dim, width)``, whose bias is found by the name
                (``_weight`` -> ``_bias``); or the names of three projections, without ``.weight``.
            out: Name of the output projection, without ``.weight``.
            residual: What moves the width.
        """
        rows = self.shapes[qkv][0] // 3 if isinstance(qkv, str) else self.shapes[f"{qkv[0]}.weight"][0]
        self.group(f"{name}.heads", heads)
        self.group(f"{name}.qk", rows // heads, f"{name}.heads").group(f"{name}.vo", rows // heads, f"{name}.heads")
        qk, vo = (f"{name}.heads", f"{name}.qk"), (f"{name}.heads", f"{name}.vo")
        if isinstance(qkv, str):
            fused: Layout = [qk, qk, vo]
            self.tensor(qkv, fused, residual)
            bias = qkv[: -len("weight")] + "bias"
            if bias in self.shapes:
                self.tensor(bias, fused)
        else:
            for projection, layout in zip(qkv, (qk, qk, vo), strict=True):
                self.linear(projection, layout, residual)
        return self.linear(out, residual, vo)

    def build(self) -> PermutationSpec:
        """The spec.

        Raises:
            RebasinError: The layouts do not fit the shapes.
        """
        groups = {
            name: group
            for name, group in self._groups.items()
            if group.size > 1 or any(other.parent == name for other in self._groups.values())
        }
        axes: dict[str, dict[int, AxisSpec]] = {}
        for tensor, by_axis in self._layouts.items():
            for axis, (layout, outer_axis) in by_axis.items():
                spec = self._axis(tensor, axis, layout, outer_axis)
                if spec.groups:
                    axes.setdefault(tensor, {})[axis] = spec
        used = {group for by_axis in axes.values() for spec in by_axis.values() for group in spec.groups}
        return PermutationSpec(
            {name: group for name, group in groups.items() if name in used},
            axes,
            shapes=self.shapes,
            parameters=self.parameters,
            frozen={
                tensor: {
                    axis: DECLARED
                    for axis, size in enumerate(self.shapes[tensor])
                    if size > 1 and axis not in axes.get(tensor, {})
                }
                for tensor in self._known
            },
        )

    def _axis(self, tensor: str, axis: int, layout: Layout, outer_axis: int | None) -> AxisSpec:
        segments: list[dict[str, object]] = []
        length = 0
        for part in layout if isinstance(layout, list) else [layout]:
            sides = part if isinstance(part, tuple) else (part,)
            names = [side if isinstance(side, str) and self._group(side).size > 1 else None for side in sides]
            shape = [self._group(side).size if isinstance(side, str) else int(side or 1) for side in sides]
            segments.append({"shape": shape, "groups": names})
            length += torch.Size(shape).numel()
        if length != self.shapes[tensor][axis]:
            raise RebasinError(
                f"Axis {axis} of {tensor!r}, shape {self.shapes[tensor]}: the layout {layout!r} has length {length}."
            )
        return axis_from_segments(segments, list(self._groups), outer_axis)

    def size(self, name: str) -> int:
        """Size of a declared group."""
        return self._group(name).size

    def _group(self, name: str) -> PermutationGroup:
        if name not in self._groups:
            raise RebasinError(f"Group {name!r} is not declared and no axis is moved by it alone: say .group(...).")
        return self._groups[name]
