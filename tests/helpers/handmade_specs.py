"""Small networks as plain tensors, with specs written by hand: what matching must handle, without inference."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_wsl.rebasin import AxisSpec, PermutationGroup, PermutationSpec

Axes = dict[str, dict[int, AxisSpec]]


def plain(group: str, size: int, repeat: int = 1) -> AxisSpec:
    return AxisSpec((group,), torch.arange(size).repeat_interleave(repeat)[None])


def spec_of(
    groups: dict[str, tuple[int, str | None]], axes: Axes, shapes: dict[str, tuple[int, ...]]
) -> PermutationSpec:
    made = {name: PermutationGroup(name, size, parent) for name, (size, parent) in groups.items()}
    return PermutationSpec(made, axes, shapes, tuple(shapes))


def tensors(spec: PermutationSpec, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes.items()}


def mlp(width: int = 24) -> PermutationSpec:
    shapes = {"0.weight": (width, 6), "0.bias": (width,), "1.weight": (width, width), "2.weight": (5, width)}
    axes: Axes = {
        "0.weight": {0: plain("a", width)},
        "0.bias": {0: plain("a", width)},
        "1.weight": {0: plain("b", width), 1: plain("a", width)},
        "2.weight": {1: plain("b", width)},
    }
    return spec_of({"a": (width, None), "b": (width, None)}, axes, shapes)


def residual(width: int = 16, blocks: int = 3) -> PermutationSpec:
    """A stream that square matrices read and write: the objective is quadratic in its permutation."""
    shapes: dict[str, tuple[int, ...]] = {"in": (width, 7), "out": (4, width)}
    axes: Axes = {"in": {0: plain("s", width)}, "out": {1: plain("s", width)}}
    for i in range(blocks):
        shapes[f"{i}.w"] = (width, width)
        axes[f"{i}.w"] = {0: plain("s", width), 1: plain("s", width)}
    return spec_of({"s": (width, None)}, axes, shapes)


def conv_flatten(channels: int = 12, pixels: int = 9) -> PermutationSpec:
    shapes = {"conv": (channels, 3, 3, 3), "gain": (channels,), "fc": (5, channels * pixels)}
    axes: Axes = {
        "conv": {0: plain("c", channels)},
        "gain": {0: plain("c", channels)},
        "fc": {1: plain("c", channels, pixels)},
    }
    return spec_of({"c": (channels, None)}, axes, shapes)


def concatenation() -> PermutationSpec:
    both = AxisSpec(("a", "b"), torch.tensor([[*range(8), *[-1] * 5, -1], [*[-1] * 8, *range(5), -1]]))
    shapes = {"a.w": (8, 4), "b.w": (5, 8), "c.w": (6, 14), "d.w": (3, 6)}
    axes: Axes = {
        "a.w": {0: plain("a", 8)},
        "b.w": {0: plain("b", 5), 1: plain("a", 8)},
        "c.w": {0: plain("c", 6), 1: both},
        "d.w": {1: plain("c", 6)},
    }
    return spec_of({"a": (8, None), "b": (5, None), "c": (6, None)}, axes, shapes)


def _head_coords(heads: int, dim: int) -> Tensor:
    return torch.stack([torch.arange(heads).repeat_interleave(dim), torch.arange(dim).repeat(heads)])


def attention(heads: int = 4, dim: int = 6, width: int = 10) -> PermutationSpec:
    """Fused q, k, v; whole heads, and inside each head one permutation of q and k and one of v and o."""
    inner = _head_coords(heads, dim)
    none = torch.full((1, heads * dim), -1)
    qk = torch.cat([inner, none])
    v = torch.cat([inner[:1], none, inner[1:]])
    shapes = {"qkv": (3 * heads * dim, width), "o": (width, heads * dim), "emb": (20, width)}
    axes: Axes = {
        "qkv": {0: AxisSpec(("h", "qk", "v"), torch.cat([qk, qk, v], dim=1)), 1: plain("r", width)},
        "o": {0: plain("r", width), 1: AxisSpec(("h", "v"), inner)},
        "emb": {1: plain("r", width)},
    }
    groups = {"r": (width, None), "h": (heads, None), "qk": (dim, "h"), "v": (dim, "h")}
    return spec_of(groups, axes, shapes)


def grouped_queries(kv: int = 3, queries: int = 4, dim: int = 5, width: int = 9) -> PermutationSpec:
    """Query heads under key heads; on the axis that o reads they meet the units of v as a product."""
    rows = torch.arange(kv).repeat_interleave(queries * dim)
    query = torch.arange(queries).repeat_interleave(dim).repeat(kv)
    unit = torch.arange(dim).repeat(kv * queries)
    shapes = {"q": (kv * queries * dim, width), "k": (kv * dim, width), "v": (kv * dim, width)}
    shapes["o"] = (width, kv * queries * dim)
    axes: Axes = {
        "q": {0: AxisSpec(("kv", "query"), torch.stack([rows, query]))},
        "k": {0: AxisSpec(("kv",), _head_coords(kv, dim)[:1])},
        "v": {0: AxisSpec(("kv", "unit"), _head_coords(kv, dim))},
        "o": {1: AxisSpec(("kv", "query", "unit"), torch.stack([rows, query, unit]))},
    }
    return spec_of({"kv": (kv, None), "query": (queries, "kv"), "unit": (dim, "kv")}, axes, shapes)


def experts(count: int = 3, hidden: int = 6, width: int = 5) -> PermutationSpec:
    """Stacked experts: the units inside lie on another axis of the tensor than the experts."""
    inner = torch.arange(hidden)[None]
    shapes = {"router": (count, width), "up": (count, hidden, width), "down": (count, width, hidden)}
    axes: Axes = {
        "router": {0: plain("e", count)},
        "up": {0: plain("e", count), 1: AxisSpec(("h",), inner, outer_axis=0)},
        "down": {0: plain("e", count), 2: AxisSpec(("h",), inner, outer_axis=0)},
    }
    return spec_of({"e": (count, None), "h": (hidden, "e")}, axes, shapes)


def grouped_convolution(groups: int = 3, width: int = 4) -> PermutationSpec:
    """1x1, grouped 3x3, 1x1: groups move as wholes, channels inside on both sides of the grouped convolution."""
    inner = _head_coords(groups, width)
    total = groups * width
    shapes = {"in": (total, 7), "mid": (total, width, 3, 3), "out": (6, total)}
    axes: Axes = {
        "in": {0: AxisSpec(("g", "i"), inner)},
        "mid": {0: AxisSpec(("g", "o"), inner), 1: AxisSpec(("i",), torch.arange(width)[None], outer_axis=0)},
        "out": {1: AxisSpec(("g", "o"), inner)},
    }
    return spec_of({"g": (groups, None), "i": (width, "g"), "o": (width, "g")}, axes, shapes)


ALL = {
    "mlp": mlp(),
    "residual": residual(),
    "conv_flatten": conv_flatten(),
    "concatenation": concatenation(),
    "attention": attention(),
    "grouped_queries": grouped_queries(),
    "experts": experts(),
    "grouped_convolution": grouped_convolution(),
}
