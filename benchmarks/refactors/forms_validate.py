"""What leaves store in the part that validates: more kinds of module, and more layouts of the known kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.refactors.forms import _GATES, _RECURRENT, FORMS, HEADS, Form, Shape, Slot, joined
from benchmarks.refactors.forms_third import Kernel, Make, _form, _slots

if TYPE_CHECKING:
    from benchmarks.refactors.network import Leaf


def _spectral2d(leaf: Leaf, style: str) -> Form:
    """A convolution normed by its spectrum, with the vector of the power method."""
    out, inner, size = leaf.sizes[0]
    piece, conv = leaf.pieces[0], nn.Conv2d(inner, out, size, bias=leaf.bias)
    wrap = nn.utils.parametrizations.spectral_norm if style else nn.utils.spectral_norm
    above = ".parametrizations.weight." if style else ".weight_"
    names = ("original", "0._u", "0._v") if style else ("orig", "u", "v")
    shapes: tuple[Shape, ...] = ((out, inner, size, size), (out,), (inner * size * size,))
    slots = [Slot(above + name, ((piece, of, shape),)) for name, of, shape in zip(names, "wuv", shapes)]
    if leaf.bias:
        slots.append(Slot(".bias", ((piece, "bias", (out,)),)))
    return _form(wrap(conv).eval(), slots, torch.zeros(1, inner, 8, 8))


def _by_head(leaf: Leaf, style: str) -> Form:
    """Projections as (heads, in, width of a head), or of the output as (heads, width of a head, out)."""
    out, inner = leaf.sizes[0]
    if style == "out":
        make: Make = lambda parts: parts[0].T.reshape(HEADS, inner // HEADS, out)  # noqa: E731
        shape: Shape = (HEADS, inner // HEADS, out)
    else:
        make = lambda parts: parts[0].view(HEADS, out // HEADS, inner).transpose(1, 2)  # noqa: E731
        shape = (HEADS, inner, out // HEADS)
    weight = nn.Parameter(torch.zeros(shape))
    bare: dict[str, Tensor] = {"": weight}
    slots = [Slot("", ((leaf.pieces[0], "weight", (out, inner)),), make)]
    if leaf.bias:
        bare["_b"] = nn.Parameter(torch.zeros(out))
        slots.append(Slot("_b", ((leaf.pieces[0], "bias", (out,)),)))
    data = torch.zeros(1, inner)

    def run() -> Tensor:
        if style == "out":
            y = torch.einsum("bhd,hdo->bo", data.view(1, HEADS, -1), weight)
        else:
            y = torch.einsum("bi,hid->bhd", data, weight).flatten(1)
        return y + bare["_b"] if leaf.bias else y

    return Form(tuple(slots), bare=bare, run=run)


def _masked(leaf: Leaf, _: str) -> Form:
    """Prepared for pruning and not pruned: ``weight_orig`` and a mask of ones."""
    out, inner = leaf.sizes[0]
    plain = _slots(leaf, lambda s: s, name=".weight_orig")
    mask = Slot(".weight_mask", ((f"mask {leaf.pieces[0]}", "mask", (out, inner)),), lambda parts: parts[0] * 0 + 1)
    shapes: dict[str, Shape] = {"weight_orig": (out, inner)} | ({"bias": (out,)} if leaf.bias else {})
    call = lambda m, x: F.linear(x, m.weight_orig * m.weight_mask, getattr(m, "bias", None))  # noqa: E731
    return _form(Kernel(shapes, {"weight_mask": (out, inner)}, call), [*plain, mask], torch.zeros(1, inner))


def _low_rank(leaf: Leaf, _: str) -> Form:
    """A low-rank update as parameters of the map itself: ``weight``, ``lora_A``, ``lora_B``."""
    out, inner = leaf.sizes[0]
    piece = f"update {leaf.pieces[0]}"
    slots = _slots(leaf, lambda s: s)
    slots += [Slot(".lora_A", ((piece, "a", (2, inner)),)), Slot(".lora_B", ((piece, "b", (out, 2)),))]
    shapes = {slot.suffix[1:]: slot.of[0][2] for slot in slots}
    call = lambda m, x: F.linear(x, m.weight + m.lora_B @ m.lora_A, getattr(m, "bias", None))  # noqa: E731
    return _form(Kernel(shapes, {}, call), slots, torch.zeros(1, inner))


def _pointwise_3d(leaf: Leaf, _: str) -> Form:
    out, inner = leaf.sizes[0]
    slots = _slots(leaf, lambda s: s, lambda parts: parts[0][:, :, None, None, None])
    return _form(nn.Conv3d(inner, out, 1, bias=leaf.bias), slots, torch.zeros(1, inner, 2, 2, 2))


def _inflated(leaf: Leaf, _: str) -> Form:
    """A convolution of pictures as one of videos, over a single frame."""
    out, inner, size = leaf.sizes[0]
    slots = _slots(leaf, lambda s: (s[0], s[1], s[2], s[2]), lambda parts: parts[0][:, :, None])
    module = nn.Conv3d(inner, out, (1, size, size), bias=leaf.bias)
    return _form(module, slots, torch.zeros(1, inner, 1, 8, 8))


def _channels_behind(leaf: Leaf, _: str) -> Form:
    """A kernel as (out, height, width, in), or (out, size, in), still called ``weight``."""
    out, inner, size = leaf.sizes[0]
    flat = leaf.kind == "conv1d"
    shape: Callable[[Shape], Shape] = (lambda s: s) if flat else lambda s: (s[0], s[1], s[2], s[2])
    slots = _slots(leaf, shape, lambda parts: parts[0].movedim(1, -1))
    groups = out if flat and inner == 1 else 1
    stored: Shape = (out, size, inner) if flat else (out, size, size, inner)
    shapes: dict[str, Shape] = {"weight": stored} | ({"bias": (out,)} if leaf.bias else {})
    conv = F.conv1d if flat else F.conv2d
    call = lambda m, x: conv(x, m.weight.movedim(-1, 1), getattr(m, "bias", None), groups=groups)  # noqa: E731
    data = torch.zeros(1, inner * groups, 8) if flat else torch.zeros(1, inner, 8, 8)
    return _form(Kernel(shapes, {}, call), slots, data)


def _gates_apart(leaf: Leaf, _: str) -> Form:
    """A hand-written cell with a map for each gate, of the input and of the state."""
    (hidden, inner), gates = leaf.sizes[0], _GATES[leaf.kind]
    letters = "ifgo" if leaf.kind == "lstm" else "rzn"
    slots = []
    shapes: dict[str, Shape] = {}
    for (name, shape), (word, end) in zip(
        _RECURRENT.items(), (("W", "weight"), ("U", "weight"), ("W", "bias"), ("U", "bias"))
    ):
        whole = shape(gates, hidden, inner)
        for at, letter in enumerate(letters):
            own = f"{word}_{letter}_{end}"
            take: Make = lambda parts, at=at: parts[0].chunk(gates)[at]  # type: ignore[misc]  # noqa: E731
            slots.append(Slot(f".{own}", ((leaf.pieces[0], name, whole),), take))
            shapes[own] = (hidden, *whole[1:])

    def call(m: nn.Module, x: Tensor) -> Tensor:
        """The state after one step from a state of zeros."""
        parts = {g: F.linear(x, getattr(m, f"W_{g}_weight"), getattr(m, f"W_{g}_bias")) for g in letters}
        shifts = {g: getattr(m, f"U_{g}_bias") for g in letters}
        if leaf.kind == "gru":
            reset, update = ((parts[g] + shifts[g]).sigmoid() for g in "rz")
            return (1 - update) * (parts["n"] + reset * shifts["n"]).tanh()
        i, _, g, o = (parts[g] + shifts[g] for g in letters)
        return o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()

    return _form(Kernel(shapes, {}, call), slots, torch.zeros(1, inner))


def _norm_as_group(leaf: Leaf, _: str) -> Form:
    """One group of all channels, which is a norm over them."""
    (width,) = leaf.sizes[0]
    return _form(nn.GroupNorm(1, width), _slots(leaf, lambda s: s), torch.zeros(1, width, 4))


def _norm_as_column(leaf: Leaf, _: str) -> Form:
    """Parameters of (1, channels, 1), for signals."""
    (width,) = leaf.sizes[0]
    slots = [Slot(slot.suffix, slot.of, lambda parts: parts[0][None, :, None]) for slot in _slots(leaf, lambda s: s)]
    shapes: dict[str, Shape] = {slot.suffix[1:]: (1, width, 1) for slot in slots}

    def call(m: nn.Module, x: Tensor) -> Tensor:
        y = x - x.mean(1, keepdim=True) if leaf.bias else x
        y = y / (y.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() if leaf.bias else y
        return y * m.weight + m.bias if leaf.bias else y * m.weight  # type: ignore[operator]

    return _form(Kernel(shapes, {}, call), slots, torch.zeros(1, width, 4))


def _batch_norm_as(leaf: Leaf, names: Sequence[str]) -> Form:
    """The four vectors under other names: scale, shift, mean, variance."""
    width = leaf.sizes[0]
    of = ("weight", "bias", "running_mean", "running_var")
    slots = [Slot(f".{own}", ((leaf.pieces[0], name, width),)) for own, name in zip(names, of)]
    scale, shift, mean, variance = names
    call = lambda m, x: F.batch_norm(  # noqa: E731
        x, getattr(m, mean), getattr(m, variance), getattr(m, scale), getattr(m, shift)
    )
    return _form(
        Kernel({scale: width, shift: width}, {mean: width, variance: width}, call), slots, torch.zeros(1, *width, 4)
    )


def _codes(leaf: Leaf, _: str) -> Form:
    """A codebook in the words of another paper, without a flag for its first batch."""
    codes, width = leaf.sizes[0]
    kept: dict[str, tuple[str, Shape]] = {
        "N": ("cluster_size", (codes,)),
        "z_avg": ("embed_avg", (codes, width)),
        "embeddings": ("embed", (codes, width)),
    }
    slots = [Slot(f".{own}", ((leaf.pieces[0], name, shape),)) for own, (name, shape) in kept.items()]
    module = Kernel({}, {own: shape for own, (_, shape) in kept.items()}, lambda m, x: F.embedding(x, m.embeddings))
    return _form(module, slots, torch.zeros(1, dtype=torch.long))


def _weight_norm_own(leaf: Leaf, _: str) -> Form:
    """Direction and length as parameters ``v`` and ``g`` of a module of its own."""
    out, inner, size = leaf.sizes[0]
    slots = [
        Slot(".v", ((leaf.pieces[0], "v", (out, inner, size)),)),
        Slot(".g", ((leaf.pieces[0], "g", (out, 1, 1)),)),
    ]
    if leaf.bias:
        slots.append(Slot(".b", ((leaf.pieces[0], "bias", (out,)),)))
    shapes = {slot.suffix[1:]: slot.of[0][2] for slot in slots}
    call = lambda m, x: F.conv1d(x, m.g * m.v / m.v.flatten(1).norm(dim=1)[:, None, None], getattr(m, "b", None))  # noqa: E731
    return _form(Kernel(shapes, {}, call), slots, torch.zeros(1, inner, 8))


def _bag(leaf: Leaf, _: str) -> Form:
    slots = [Slot(".weight", ((leaf.pieces[0], "weight", leaf.sizes[0]),))]
    rows, width = leaf.sizes[0]
    return _form(nn.EmbeddingBag(rows, width), slots, torch.zeros(1, 1, dtype=torch.long))


def _trailing(leaf: Leaf, _: str) -> Form:
    """A vector as (n, 1, 1), to be used on pictures."""
    (width,) = leaf.sizes[0]
    tensor = nn.Parameter(torch.zeros(width, 1, 1))
    slot = Slot("", ((leaf.pieces[0], "", (width,)),), lambda parts: joined(parts)[:, None, None])
    return Form((slot,), bare={"": tensor}, run=lambda: tensor + 0)


FORMS |= {
    ("spectral2d", ""): _spectral2d,
    ("spectral2d", "style"): _spectral2d,
    ("linear", "by_head"): _by_head,
    ("linear", "masked"): _masked,
    ("linear", "low_rank"): _low_rank,
    ("linear", "pointwise_3d"): _pointwise_3d,
    ("conv2d", "inflated"): _inflated,
    ("conv2d", "channels_behind"): _channels_behind,
    ("conv1d", "channels_behind"): _channels_behind,
    ("lstm", "gates_apart"): _gates_apart,
    ("gru", "gates_apart"): _gates_apart,
    ("norm", "as_group"): _norm_as_group,
    ("norm", "as_column"): _norm_as_column,
    ("batch_norm", "named"): lambda leaf, names: _batch_norm_as(leaf, names.split(",")),
    ("codebook", "short"): _codes,
    ("weight_norm", "own"): _weight_norm_own,
    ("embedding", "bag"): _bag,
    ("table", "trailing"): _trailing,
}
