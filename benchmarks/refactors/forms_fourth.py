"""What leaves store in the fourth part: more kinds of module, and more layouts of the known kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.refactors.forms import _RECURRENT, FORMS, Form, Slot
from benchmarks.refactors.forms_third import Kernel, _form, _slots

if TYPE_CHECKING:
    from benchmarks.refactors.network import Leaf


def _upconv(leaf: Leaf, dimensions: int) -> Form:
    out, inner, size = leaf.sizes[0]
    make = nn.ConvTranspose1d if dimensions == 1 else nn.ConvTranspose3d
    slots = _slots(leaf, lambda s: (s[1], s[0], *(s[2],) * dimensions))
    return _form(make(inner, out, size, bias=leaf.bias), slots, torch.zeros(1, inner, *(4,) * dimensions))


def _bilstm(leaf: Leaf, _: str) -> Form:
    """``nn.LSTM`` that reads both ways: a piece for each direction."""
    hidden, inner = leaf.sizes[0]
    slots = [
        Slot(f".{name}_l0{end}", ((piece, name, shape(4, *size)),))
        for piece, size, end in zip(leaf.pieces, leaf.sizes, ("", "_reverse"))
        for name, shape in _RECURRENT.items()
    ]
    return _form(nn.LSTM(inner, hidden, bidirectional=True), slots, torch.zeros(3, 1, inner))


def _bilinear(leaf: Leaf, _: str) -> Form:
    out, one, other = leaf.sizes[0]
    return _form(
        nn.Bilinear(one, other, out, bias=leaf.bias), _slots(leaf, lambda s: s), torch.zeros(1, one),
        torch.zeros(1, other),
    )  # fmt: skip


def _bilinear_bare(leaf: Leaf, _: str) -> Form:
    """One parameter (and one for the shift) of the module above."""
    out, one, other = leaf.sizes[0]
    bare: dict[str, Tensor] = {"": nn.Parameter(torch.zeros(out, one, other))}
    slots = [Slot("", ((leaf.pieces[0], "weight", leaf.sizes[0]),))]
    if leaf.bias:
        bare["_bias"] = nn.Parameter(torch.zeros(out))
        slots.append(Slot("_bias", ((leaf.pieces[0], "bias", (out,)),)))
    return Form(tuple(slots), bare=bare, run=lambda: bare[""].sum())


def _instance_norm(leaf: Leaf, style: str) -> Form:
    """With a scale and a shift, and perhaps with statistics that nobody asked for."""
    (width,) = leaf.sizes[0]
    slots = [Slot(f".{name}", ((leaf.pieces[0], name, (width,)),)) for name in ("weight", "bias")]
    if style:
        slots += [Slot(f".{name}", ((leaf.pieces[0], name, (width,)),)) for name in ("running_mean", "running_var")]
        slots.append(Slot(".num_batches_tracked", ((leaf.pieces[0], "batches", ()),), dtype=torch.int64))
    module = nn.InstanceNorm3d(width, affine=True, track_running_stats=bool(style))
    return _form(module, slots, torch.zeros(1, width, 4, 4, 4))


def _prelu(leaf: Leaf, _: str) -> Form:
    (width,) = leaf.sizes[0]
    return _form(nn.PReLU(width), _slots(leaf, lambda s: s)[:1], torch.zeros(1, max(width, 2), 4))


def _synchronised(leaf: Leaf, _: str) -> Form:
    """Batch norm over all processes, which runs on accelerators only while it trains."""
    form = FORMS["batch_norm", ""](leaf, "")
    module = nn.SyncBatchNorm(leaf.sizes[0][0])
    data = torch.zeros(2, leaf.sizes[0][0], 4, 4)

    def run() -> None:
        module.eval()(data)

    return Form(form.slots, module, run=run)


def _embedding_bare(leaf: Leaf, _: str) -> Form:
    """A table that is a parameter of the module above."""
    table = nn.Parameter(torch.zeros(leaf.sizes[0]))
    slot = Slot("", ((leaf.pieces[0], "weight", leaf.sizes[0]),))
    return Form((slot,), bare={"": table}, run=lambda: F.embedding(torch.zeros(1, dtype=torch.long), table))


def _table_inside(leaf: Leaf, name: str) -> Form:
    """A parameter in a module of its own: ``scale.gamma``."""
    slot = Slot(f".{name}", ((leaf.pieces[0], "", leaf.sizes[0]),))
    return _form(Kernel({name: leaf.sizes[0]}, {}, lambda m, x: x + getattr(m, name).sum()), (slot,), torch.zeros(1))


def _norm_over_channels(leaf: Leaf, _: str) -> Form:
    """Parameters of (channels, 1, 1), for pictures."""
    (width,) = leaf.sizes[0]
    slots = [Slot(slot.suffix, slot.of, lambda parts: parts[0][:, None, None]) for slot in _slots(leaf, lambda s: s)]
    shapes = {slot.suffix[1:]: (width, 1, 1) for slot in slots}
    module = Kernel(shapes, {}, lambda m, x: sum(m.parameters(), x))
    return _form(module, slots, torch.zeros(1, width, 4, 4))


def _norm_bare(leaf: Leaf, _: str) -> Form:
    """``norm_weight`` and ``norm_bias`` of the module above."""
    (width,) = leaf.sizes[0]
    names = ("weight", "bias") if leaf.bias else ("weight",)
    bare: dict[str, Tensor] = {f"_{name}": nn.Parameter(torch.zeros(width)) for name in names}
    slots = tuple(Slot(f"_{name}", ((leaf.pieces[0], name, (width,)),)) for name in names)
    return Form(slots, bare=bare, run=lambda: sum(bare.values(), torch.zeros(width)))


def _flat_1d(leaf: Leaf, _: str) -> Form:
    """A convolution of one step as a map."""
    out, inner, size = leaf.sizes[0]
    slots = _slots(leaf, lambda s: s, lambda parts: parts[0].flatten(1))
    return _form(nn.Linear(inner * size, out, bias=leaf.bias), slots, torch.zeros(1, inner * size))


FORMS |= {
    ("upconv1d", ""): lambda leaf, _: _upconv(leaf, 1),
    ("upconv3d", ""): lambda leaf, _: _upconv(leaf, 3),
    ("bilstm", ""): _bilstm,
    ("bilinear", ""): _bilinear,
    ("bilinear", "bare"): _bilinear_bare,
    ("instance_norm", ""): _instance_norm,
    ("instance_norm", "tracked"): lambda leaf, _: _instance_norm(leaf, "tracked"),
    ("prelu", ""): _prelu,
    ("batch_norm", "synchronised"): _synchronised,
    ("embedding", "bare"): _embedding_bare,
    ("table", "inside"): _table_inside,
    ("norm", "over_channels"): _norm_over_channels,
    ("norm", "bare"): _norm_bare,
    ("conv1d", "flat"): _flat_1d,
    **{(kind, "shared"): FORMS[kind, ""] for kind in ("linear", "norm", "conv2d", "embedding")},
}
