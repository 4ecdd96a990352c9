"""What leaves store in the third part: more kinds of module, and more layouts of the known kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.refactors.forms import FORMS, Form, Shape, Slot, joined

if TYPE_CHECKING:
    from benchmarks.refactors.network import Leaf

Make = Callable[[Sequence[Tensor]], Tensor]


Call = Callable[[Any, Tensor], Tensor]


class Kernel(nn.Module):
    """Parameters (and buffers) under names and in shapes of their own, and what is computed from them."""

    def __init__(self, parameters: dict[str, Shape], buffers: dict[str, Shape], call: Call) -> None:
        super().__init__()
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        for name, shape in buffers.items():
            self.register_buffer(name, torch.zeros(shape))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def _slots(leaf: Leaf, shape: Callable[[Shape], Shape], make: Make = joined, name: str = ".weight") -> list[Slot]:
    slots = [Slot(name, tuple((p, "weight", shape(s)) for p, s in zip(leaf.pieces, leaf.sizes)), make)]
    if leaf.bias:
        slots.append(Slot(".bias", tuple((p, "bias", s[:1]) for p, s in zip(leaf.pieces, leaf.sizes))))
    return slots


def _form(module: nn.Module, slots: Sequence[Slot], *inputs: Tensor) -> Form:
    return Form(tuple(slots), module, run=lambda: module(*inputs))


def _conv3d(leaf: Leaf, _: str) -> Form:
    out, inner, size = leaf.sizes[0]
    module = nn.Conv3d(inner, out, size, bias=leaf.bias)
    return _form(module, _slots(leaf, lambda s: (s[0], s[1], s[2], s[2], s[2])), torch.zeros(1, inner, 4, 4, 4))


def _depthwise(leaf: Leaf, _: str) -> Form:
    width, size = leaf.sizes[0]
    module = nn.Conv2d(width, width, size, groups=width, bias=leaf.bias)
    return _form(module, _slots(leaf, lambda s: (s[0], 1, s[1], s[1])), torch.zeros(1, width, 8, 8))


def _tied(leaf: Leaf, _: str) -> Form:
    """Its parameter is that of a table; the network ties them."""
    rows, inner = leaf.sizes[0]
    return _form(nn.Linear(inner, rows, bias=False), _slots(leaf, lambda s: s)[:1], torch.zeros(1, inner))


def _pointwise_1d(leaf: Leaf, _: str) -> Form:
    inner, rows = leaf.sizes[0][1], sum(size[0] for size in leaf.sizes)
    slots = _slots(leaf, lambda s: s, lambda parts: joined(parts)[:, :, None])
    return _form(nn.Conv1d(inner, rows, 1, bias=leaf.bias), slots, torch.zeros(1, inner, 2))


def _flat(leaf: Leaf, _: str) -> Form:
    """A convolution whose windows do not overlap, as a map of flattened patches."""
    out, inner, size = leaf.sizes[0]
    dimensions = 3 if leaf.kind == "conv3d" else 2
    many = inner * size**dimensions
    shape = lambda s: (s[0], s[1], *(s[2],) * dimensions)  # noqa: E731
    slots = _slots(leaf, shape, lambda parts: parts[0].flatten(1))
    return _form(nn.Linear(many, out, bias=leaf.bias), slots, torch.zeros(1, many))


def _channels_within(leaf: Leaf, _: str) -> Form:
    """The same with the channels of a pixel beside each other: what only the code shows."""
    out, inner, size = leaf.sizes[0]
    many = inner * size**2
    shape = lambda s: (s[0], s[1], s[2], s[2])  # noqa: E731
    slots = _slots(leaf, shape, lambda parts: parts[0].permute(0, 2, 3, 1).flatten(1))
    return _form(nn.Linear(many, out, bias=leaf.bias), slots, torch.zeros(1, many))


def _parts_apart(leaf: Leaf, _: str) -> Form:
    """Several maps of one size as one parameter: (maps, out, in)."""
    count, (out, inner) = len(leaf.pieces), leaf.sizes[0]
    slots = _slots(leaf, lambda s: s, torch.stack)
    if leaf.bias:
        slots[1] = Slot(".bias", slots[1].of, torch.stack)
    shapes: dict[str, Shape] = {"weight": (count, out, inner)} | ({"bias": (count, out)} if leaf.bias else {})
    module = Kernel(shapes, {}, lambda m, x: torch.einsum("bi,noi->nbo", x, m.weight))
    return _form(module, slots, torch.zeros(1, inner))


def _rows(leaf: Leaf, argument: str) -> Form:
    """Some rows of a map, for a head that is a module of its own: ``which/of``."""
    which, of = map(int, argument.split("/"))
    out, inner = leaf.sizes[0]
    take: Make = lambda parts: parts[0].chunk(of)[which]  # noqa: E731
    slots = _slots(leaf, lambda s: s, take)
    if leaf.bias:
        slots[1] = Slot(".bias", slots[1].of, take)
    return _form(nn.Linear(inner, out // of, bias=leaf.bias), slots, torch.zeros(1, inner))


def _conv1d_last(leaf: Leaf, _: str) -> Form:
    """A kernel as (size, in, out)."""
    out, inner, size = leaf.sizes[0]
    slots = _slots(leaf, lambda s: s, lambda parts: parts[0].permute(2, 1, 0), ".kernel")
    groups = out if inner == 1 else 1
    shapes: dict[str, Shape] = {"kernel": (size, inner, out)} | ({"bias": (out,)} if leaf.bias else {})
    data = torch.zeros(1, out if inner == 1 else inner, 8)
    call: Call = lambda m, x: F.conv1d(x, m.kernel.permute(2, 1, 0), getattr(m, "bias", None), groups=groups)  # noqa: E731
    return _form(Kernel(shapes, {}, call), slots, data)


def _conv1d_as_2d(leaf: Leaf, _: str) -> Form:
    """Over an image of one row."""
    out, inner, size = leaf.sizes[0]
    groups = out if inner == 1 else 1
    module = nn.Conv2d(inner * groups, out, (1, size), groups=groups, bias=leaf.bias)
    slots = _slots(leaf, lambda s: s, lambda parts: parts[0][:, :, None])
    return _form(module, slots, torch.zeros(1, inner * groups, 1, 8))


def _batch_norm_flax(leaf: Leaf, _: str) -> Form:
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    width = leaf.sizes[0]
    slots = [Slot(f".{own}", ((leaf.pieces[0], name, width),)) for own, name in names.items()]
    call: Call = lambda m, x: F.batch_norm(x, m.mean, m.var, m.scale, m.bias)  # noqa: E731
    module = Kernel({"scale": width, "bias": width}, {"mean": width, "var": width}, call)
    return _form(module, slots, torch.zeros(1, *width, 4))


def _batch_norm_uncounted(leaf: Leaf, _: str) -> Form:
    """As old files hold it: without the number of batches."""
    form = FORMS["batch_norm", ""](leaf, "")
    return Form(form.slots[:-1], form.module, run=form.run)


def _embedding_named(leaf: Leaf, name: str) -> Form:
    shape = leaf.sizes[0]
    slots = [Slot(f".{name}", ((leaf.pieces[0], "weight", shape),))]
    module = Kernel({name: shape}, {}, lambda m, x: F.embedding(x, getattr(m, name)))
    return _form(module, slots, torch.zeros(1, dtype=torch.long))


def _group_norm_named(leaf: Leaf, names: str) -> Form:
    width, own = leaf.sizes[0], names.split(",")
    slots = [Slot(f".{name}", ((leaf.pieces[0], of, width),)) for name, of in zip(own, ("weight", "bias"))]
    module = Kernel(dict.fromkeys(own, width), {}, lambda m, x: F.group_norm(x, 2, *m.parameters()))
    return _form(module, slots, torch.zeros(1, *width, 4))


def _table_in(leaf: Leaf, shape: Shape) -> Form:
    """A parameter of the module above in another shape."""
    slot = Slot(
        "", tuple((piece, "", size) for piece, size in zip(leaf.pieces, leaf.sizes)), lambda p: p[0].view(shape)
    )
    tensor = nn.Parameter(torch.zeros(shape))
    return Form((slot,), bare={"": tensor}, run=lambda: tensor + 0)


def _table_squeezed(leaf: Leaf, _: str) -> Form:
    return _table_in(leaf, tuple(n for n in leaf.sizes[0] if n > 1))


def _table_broadcast(leaf: Leaf, _: str) -> Form:
    size = leaf.sizes[0]
    return _table_in(leaf, (1, 1, *size) if len(size) < 2 else (1, *size) if len(size) == 2 else size)


FORMS |= {
    ("conv3d", ""): _conv3d,
    ("conv3d", "flat"): _flat,
    ("conv2d", "flat"): _flat,
    ("conv2d", "channels_within"): _channels_within,
    ("depthwise", ""): _depthwise,
    ("linear", "tied"): _tied,
    ("linear", "pointwise_1d"): _pointwise_1d,
    ("linear", "reordered"): FORMS["linear", ""],
    ("linear", "parts_apart"): _parts_apart,
    ("linear", "rows"): _rows,
    ("conv1d", "channels_last"): _conv1d_last,
    ("conv1d", "as_2d"): _conv1d_as_2d,
    ("batch_norm", "flax"): _batch_norm_flax,
    ("batch_norm", "uncounted"): _batch_norm_uncounted,
    ("embedding", "named"): _embedding_named,
    ("group_norm", "named"): _group_norm_named,
    ("table", "squeezed"): _table_squeezed,
    ("table", "broadcast"): _table_broadcast,
}
