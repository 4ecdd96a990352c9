"""What a leaf stores: which pieces each of its tensors is made of, and how they lie in it.

Every piece has canonical tensors (a linear map's ``weight`` is (out, in), as PyTorch has it), whose values are drawn
from their names. A form says how the stored tensors are made of them; both sides of a pair are made of the same ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.refactors.network import Leaf

Shape = tuple[int, ...]
Canonical = tuple[str, str, Shape]  # piece, tensor, shape
HEADS = 2


def drawn(key: str, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    """A value that depends on the key alone."""
    seed = zlib.crc32(key.encode())
    if not dtype.is_floating_point:
        return torch.full(shape, seed % 100_003 if dtype != torch.bool else seed % 2, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True)
class Slot:
    """One stored tensor.

    Attributes:
        suffix: What follows the leaf's name.
        of: The canonical tensors it is made of.
        make: How.
    """

    suffix: str
    of: tuple[Canonical, ...]
    make: Callable[[Sequence[Tensor]], Tensor] = joined
    dtype: torch.dtype = torch.float32

    def value(self) -> Tensor:
        return self.make([drawn(f"{p}:{t}", s, self.dtype) for p, t, s in self.of]).contiguous()


@dataclass(frozen=True)
class Form:
    """A leaf made real: a module, or bare tensors of the module above it (by suffix), and what they hold."""

    slots: tuple[Slot, ...]
    module: nn.Module | None = None
    bare: dict[str, Tensor] = field(default_factory=dict)
    run: Callable[[], Any] | None = None


class TransposedLinear(nn.Module):
    """A linear map that stores its matrix as (in, out)."""

    def __init__(self, size_in: int, size_out: int, bias: bool, name: str = "weight") -> None:
        super().__init__()
        self.matrix = name
        self.register_parameter(name, nn.Parameter(torch.zeros(size_in, size_out)))
        self.bias = nn.Parameter(torch.zeros(size_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ getattr(self, self.matrix)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """Scale without a shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class NamedAffine(nn.Module):
    """A scale and a shift (or a matrix and a shift) under names of their own."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        first, *shift = self.parameters()
        return (F.linear(x, first) if first.dim() == 2 else x * first) + sum(shift)


class MovingNorm(nn.Module):
    """Batch norm in the words of another framework."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("moving_mean", torch.zeros(width))
        self.register_buffer("moving_variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.moving_mean, self.moving_variance, self.gamma, self.beta)


class ChannelsLastConv(nn.Module):
    """A convolution that stores its kernel as (height, width, in, out)."""

    def __init__(self, out: int, inner: int, size: int, bias: bool) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(size, size, inner, out))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.permute(3, 2, 0, 1), self.bias)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose four vectors are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (
            x * self.weight[:, None, None] + self.bias[:, None, None] + 0 * (self.running_mean + self.running_var).sum()
        )


class Codebook(nn.Module):
    """Codes learned by moving averages: buffers only."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("inited", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embed", torch.zeros(codes, width))
        self.register_buffer("embed_avg", torch.zeros(codes, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.embed)


class RecurrentCell(nn.Module):
    """A hand-written cell whose gates stand in an order of its own."""

    def __init__(self, gates: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.w_x = nn.Parameter(torch.zeros(gates * hidden, inner))
        self.w_h = nn.Parameter(torch.zeros(gates * hidden, hidden))
        self.b_x = nn.Parameter(torch.zeros(gates * hidden))
        self.b_h = nn.Parameter(torch.zeros(gates * hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w_x, self.b_x) + F.linear(x[..., : self.w_h.shape[1]], self.w_h, self.b_h)


class LoraLinear(nn.Module):
    """A linear map with a low-rank update beside it."""

    def __init__(self, size_in: int, size_out: int, bias: bool, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = nn.Linear(size_in, size_out, bias=bias)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(size_in, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, size_out, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def form_of(leaf: Leaf) -> Form:
    """Make a leaf real."""
    layout, _, argument = leaf.layout.partition(":")
    maker = FORMS.get((leaf.kind, layout))
    if maker is None:
        raise ValueError(f"no form for {leaf.kind} as {leaf.layout!r}")
    return maker(leaf, argument)


def _of(leaf: Leaf, tensor: str, shape: Callable[[Shape], Shape]) -> tuple[Canonical, ...]:
    return tuple((piece, tensor, shape(size)) for piece, size in zip(leaf.pieces, leaf.sizes))


def _rows(leaf: Leaf) -> int:
    return sum(size[0] for size in leaf.sizes)


def _module(module: nn.Module, slots: Sequence[Slot], *inputs: Tensor) -> Form:
    return Form(tuple(slots), module, run=lambda: module(*inputs))


def _weight_and_bias(
    leaf: Leaf,
    shape: Callable[[Shape], Shape],
    make: Callable[[Sequence[Tensor]], Tensor] = joined,
    name: str = ".weight",
    bias_make: Callable[[Sequence[Tensor]], Tensor] = joined,
    bias_name: str = ".bias",
) -> list[Slot]:
    slots = [Slot(name, _of(leaf, "weight", shape), make)]
    if leaf.bias:
        slots.append(Slot(bias_name, _of(leaf, "bias", lambda s: s[:1]), bias_make))
    return slots


def _linear(leaf: Leaf, _: str) -> Form:
    inner = leaf.sizes[0][1]
    return _module(
        nn.Linear(inner, _rows(leaf), bias=leaf.bias), _weight_and_bias(leaf, lambda s: s), torch.zeros(1, inner)
    )


def _transposed(leaf: Leaf, name: str) -> Form:
    inner, name = leaf.sizes[0][1], name or "weight"
    module = TransposedLinear(inner, _rows(leaf), leaf.bias, name)
    slots = _weight_and_bias(leaf, lambda s: s, lambda parts: joined(parts).T, f".{name}")
    return _module(module, slots, torch.zeros(1, inner))


def _bare_matrix(leaf: Leaf, _: str) -> Form:
    """``self.w_q = nn.Parameter(...)``, multiplied from the right."""
    matrix = nn.Parameter(torch.zeros(leaf.sizes[0][1], _rows(leaf)))
    slots = [Slot("", _of(leaf, "weight", lambda s: s), lambda parts: joined(parts).T)]
    return Form(tuple(slots), bare={"": matrix}, run=lambda: torch.zeros(1, matrix.shape[0]) @ matrix)


def _bare_heads(leaf: Leaf, _: str) -> Form:
    """Projections by heads: (in, heads, width of a head)."""
    inner, rows = leaf.sizes[0][1], _rows(leaf)
    matrix = nn.Parameter(torch.zeros(inner, HEADS, rows // HEADS))
    slots = [Slot("", _of(leaf, "weight", lambda s: s), lambda parts: joined(parts).T.reshape(matrix.shape))]
    return Form(tuple(slots), bare={"": matrix}, run=lambda: torch.einsum("bd,dhk->bhk", torch.zeros(1, inner), matrix))


def _bare_linear(leaf: Leaf, _: str) -> Form:
    """``in_proj_weight`` and ``in_proj_bias`` of the module above."""
    inner = leaf.sizes[0][1]
    bare: dict[str, Tensor] = {"_weight": nn.Parameter(torch.zeros(_rows(leaf), inner))}
    if leaf.bias:
        bare["_bias"] = nn.Parameter(torch.zeros(_rows(leaf)))
    slots = _weight_and_bias(leaf, lambda s: s, name="_weight", bias_name="_bias")
    return Form(
        tuple(slots), bare=bare, run=lambda: F.linear(torch.zeros(1, inner), bare["_weight"], bare.get("_bias"))
    )


def _pointwise(leaf: Leaf, _: str) -> Form:
    inner = leaf.sizes[0][1]
    slots = _weight_and_bias(leaf, lambda s: s, lambda parts: joined(parts)[:, :, None, None])
    return _module(nn.Conv2d(inner, _rows(leaf), 1, bias=leaf.bias), slots, torch.zeros(1, inner, 2, 2))


def _by_head(parts: Sequence[Tensor]) -> Tensor:
    cut = [part.unflatten(0, (HEADS, -1)) for part in parts]
    return torch.cat(cut, 1).flatten(0, 1)


def _interleaved(leaf: Leaf, _: str) -> Form:
    """All parts of the first head, then all of the second."""
    inner = leaf.sizes[0][1]
    slots = _weight_and_bias(leaf, lambda s: s, _by_head, bias_make=_by_head)
    return _module(nn.Linear(inner, _rows(leaf), bias=leaf.bias), slots, torch.zeros(1, inner))


def _stacked(leaf: Leaf, argument: str) -> Form:
    """One parameter for all experts, ``argument`` pieces to an expert; ``t``: (in, out)."""
    turned, each = argument.endswith("t"), int(argument.rstrip("t") or 1)

    def make(parts: Sequence[Tensor]) -> Tensor:
        experts = [joined(parts[i : i + each]) for i in range(0, len(parts), each)]
        return torch.stack([e.T for e in experts] if turned else experts)

    slot = Slot("", _of(leaf, "weight", lambda s: s), make)
    tensor = nn.Parameter(torch.zeros_like(slot.value()))
    return Form((slot,), bare={"": tensor}, run=lambda: tensor.sum())


def _lora(leaf: Leaf, _: str) -> Form:
    size_out, size_in = leaf.sizes[0]
    piece = leaf.pieces[0]
    slots = _weight_and_bias(leaf, lambda s: s, name=".base_layer.weight", bias_name=".base_layer.bias")
    slots += [
        Slot(".lora_A.default.weight", ((f"lora {piece}", "a", (2, size_in)),)),
        Slot(".lora_B.default.weight", ((f"lora {piece}", "b", (size_out, 2)),)),
    ]
    return _module(LoraLinear(size_in, size_out, leaf.bias), slots, torch.zeros(1, size_in))


def _spectral(leaf: Leaf, style: str) -> Form:
    out, inner = leaf.sizes[0]
    old = style != "parametrized"
    wrap = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    names = (".weight_orig", ".weight_u", ".weight_v")
    if not old:
        names = (".parametrizations.weight.original", ".parametrizations.weight.0._u", ".parametrizations.weight.0._v")
    shapes: tuple[Callable[[Shape], Shape], ...] = (lambda s: s, lambda s: s[:1], lambda s: s[1:])
    slots = [Slot(name, _of(leaf, n, shape)) for name, n, shape in zip(names, "wuv", shapes)]
    if leaf.bias:
        slots.append(Slot(".bias", _of(leaf, "bias", lambda s: s[:1])))
    return _module(wrap(nn.Linear(inner, out, bias=leaf.bias)), slots, torch.zeros(1, inner))


def _weight_norm(leaf: Leaf, style: str) -> Form:
    out, inner, size = leaf.sizes[0]
    old = style != "parametrized"
    wrap = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    names = (".weight_g", ".weight_v")
    if not old:
        names = (".parametrizations.weight.original0", ".parametrizations.weight.original1")
    slots = [
        Slot(names[0], _of(leaf, "g", lambda s: (s[0], 1, 1))),
        Slot(names[1], _of(leaf, "v", lambda s: s)),
    ]
    if leaf.bias:
        slots.append(Slot(".bias", _of(leaf, "bias", lambda s: s[:1])))
    return _module(wrap(nn.Conv1d(inner, out, size, bias=leaf.bias)), slots, torch.zeros(1, inner, 8))


def _conv2d(leaf: Leaf, _: str) -> Form:
    _, inner, size = leaf.sizes[0]
    slots = _weight_and_bias(leaf, lambda s: (s[0], s[1], s[2], s[2]))
    return _module(nn.Conv2d(inner, _rows(leaf), size, bias=leaf.bias), slots, torch.zeros(1, inner, 8, 8))


def _conv2d_channels_last(leaf: Leaf, _: str) -> Form:
    out, inner, size = leaf.sizes[0]
    shape = lambda s: (s[0], s[1], s[2], s[2])  # noqa: E731
    slots = _weight_and_bias(leaf, shape, lambda parts: joined(parts).permute(2, 3, 1, 0), ".kernel")
    return _module(ChannelsLastConv(out, inner, size, leaf.bias), slots, torch.zeros(1, inner, 8, 8))


def _conv1d(leaf: Leaf, _: str) -> Form:
    out, inner, size = leaf.sizes[0]
    slots = _weight_and_bias(leaf, lambda s: s)
    module = nn.Conv1d(inner if inner > 1 else out, out, size, groups=1 if inner > 1 else out, bias=leaf.bias)
    return _module(module, slots, torch.zeros(1, module.in_channels, 8))


def _upconv2d(leaf: Leaf, _: str) -> Form:
    out, inner, size = leaf.sizes[0]
    slots = _weight_and_bias(leaf, lambda s: (s[1], s[0], s[2], s[2]))
    return _module(nn.ConvTranspose2d(inner, out, size, bias=leaf.bias), slots, torch.zeros(1, inner, 4, 4))


def _norm(leaf: Leaf, _: str) -> Form:
    width = leaf.sizes[0][0]
    if leaf.bias:
        return _module(nn.LayerNorm(width), _weight_and_bias(leaf, lambda s: s), torch.zeros(1, width))
    return _module(RMSNorm(width), _weight_and_bias(leaf, lambda s: s), torch.zeros(1, width))


def _named(leaf: Leaf, names: str) -> Form:
    """The same tensors under names such as ``gamma`` and ``beta``."""
    own = dict(zip(("weight", "bias"), names.split(",")))
    plain = _weight_and_bias(leaf, lambda s: s)
    slots = [replace(slot, suffix=f".{own[slot.suffix[1:]]}") for slot in plain]
    module = NamedAffine({slot.suffix[1:]: tuple(slot.value().shape) for slot in slots})
    return _module(module, slots, torch.zeros(1, leaf.sizes[0][-1]))


def _moving(leaf: Leaf, _: str) -> Form:
    names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    slots = [Slot(f".{own}", _of(leaf, name, lambda s: s)) for own, name in names.items()]
    return _module(MovingNorm(leaf.sizes[0][0]), slots, torch.zeros(1, leaf.sizes[0][0], 4, 4))


def _group_norm(leaf: Leaf, _: str) -> Form:
    width = leaf.sizes[0][0]
    slots = [Slot(f".{name}", _of(leaf, name, lambda s: s)) for name in ("weight", "bias")]
    return _module(nn.GroupNorm(2, width), slots, torch.zeros(1, width, 4, 4))


def _statistics(leaf: Leaf, names: Sequence[str]) -> list[Slot]:
    slots = [Slot(f".{name}", _of(leaf, name, lambda s: s)) for name in names]
    return [*slots, Slot(".num_batches_tracked", _of(leaf, "batches", lambda s: ()), dtype=torch.int64)]


def _batch_norm(leaf: Leaf, style: str) -> Form:
    width = leaf.sizes[0][0]
    names = ("running_mean", "running_var") if style == "plain" else ("weight", "bias", "running_mean", "running_var")
    module = nn.BatchNorm2d(width, affine=style != "plain")
    return _module(module, _statistics(leaf, names), torch.zeros(1, width, 4, 4))


def _frozen(leaf: Leaf, _: str) -> Form:
    width = leaf.sizes[0][0]
    slots = _statistics(leaf, ("weight", "bias", "running_mean", "running_var"))[:-1]
    return _module(FrozenBatchNorm2d(width), slots, torch.zeros(1, width, 4, 4))


def _embedding(leaf: Leaf, _: str) -> Form:
    slots = [Slot(".weight", _of(leaf, "weight", lambda s: s))]
    return _module(nn.Embedding(*leaf.sizes[0]), slots, torch.zeros(1, 1, dtype=torch.long))


def _table(leaf: Leaf, kind: str) -> Form:
    """A bare parameter (or buffer) of the module above."""
    zeros = torch.zeros(leaf.sizes[0])
    tensor = zeros if kind == "buffer" else nn.Parameter(zeros)
    return Form((Slot("", _of(leaf, "", lambda s: s)),), bare={"": tensor}, run=lambda: tensor + 0)


def _table_as_embedding(leaf: Leaf, _: str) -> Form:
    *_, codes, width = leaf.sizes[0]
    slots = [Slot(".weight", _of(leaf, "", lambda s: s), lambda parts: parts[0].reshape(codes, width))]
    return _module(nn.Embedding(codes, width), slots, torch.zeros(1, 1, dtype=torch.long))


def _codebook(leaf: Leaf, _: str) -> Form:
    shapes = {"inited": lambda s: (1,), "cluster_size": lambda s: s[:1], "embed": lambda s: s, "embed_avg": lambda s: s}
    slots = [Slot(f".{name}", _of(leaf, name, shape)) for name, shape in shapes.items()]
    return _module(Codebook(*leaf.sizes[0]), slots, torch.zeros(1, dtype=torch.long))


_GATES = {"lstm": 4, "gru": 3}
_GATE_ORDER = {"lstm": (0, 1, 3, 2), "gru": (1, 0, 2)}
_RECURRENT: dict[str, Callable[[int, int, int], Shape]] = {
    "weight_ih": lambda gates, hidden, inner: (gates * hidden, inner),
    "weight_hh": lambda gates, hidden, inner: (gates * hidden, hidden),
    "bias_ih": lambda gates, hidden, inner: (gates * hidden,),
    "bias_hh": lambda gates, hidden, inner: (gates * hidden,),
}


def _recurrent(leaf: Leaf, _: str) -> Form:
    """``nn.LSTM`` or ``nn.GRU``, a piece for each layer."""
    gates, (hidden, inner) = _GATES[leaf.kind], leaf.sizes[0]
    cls = nn.LSTM if leaf.kind == "lstm" else nn.GRU
    slots = [
        Slot(f".{name}_l{layer}", ((piece, name, shape(gates, *size)),))
        for layer, (piece, size) in enumerate(zip(leaf.pieces, leaf.sizes))
        for name, shape in _RECURRENT.items()
    ]
    return _module(cls(inner, hidden, len(leaf.pieces)), slots, torch.zeros(3, 1, inner))


def _cell(leaf: Leaf, _: str) -> Form:
    """``nn.LSTMCell`` or ``nn.GRUCell``."""
    gates, (hidden, inner) = _GATES[leaf.kind], leaf.sizes[0]
    cls = nn.LSTMCell if leaf.kind == "lstm" else nn.GRUCell
    slots = [Slot(f".{n}", ((leaf.pieces[0], n, shape(gates, hidden, inner)),)) for n, shape in _RECURRENT.items()]
    return _module(cls(inner, hidden), slots, torch.zeros(1, inner))


def _own_cell(leaf: Leaf, _: str) -> Form:
    """A hand-written cell with its own names and its own order of gates."""
    gates, (hidden, inner) = _GATES[leaf.kind], leaf.sizes[0]
    order = _GATE_ORDER[leaf.kind]

    def make(parts: Sequence[Tensor]) -> Tensor:
        cut = parts[0].chunk(gates)
        return torch.cat([cut[i] for i in order])

    slots = [
        Slot(f".{own}", ((leaf.pieces[0], name, shape(gates, hidden, inner)),), make)
        for (name, shape), own in zip(_RECURRENT.items(), ("w_x", "w_h", "b_x", "b_h"))
    ]
    return _module(RecurrentCell(gates, hidden, inner), slots, torch.zeros(1, max(inner, hidden))[:, :inner])


FORMS: dict[tuple[str, str], Callable[[Leaf, str], Form]] = {
    ("linear", ""): _linear,
    ("linear", "transposed"): _transposed,
    ("linear", "bare_matrix"): _bare_matrix,
    ("linear", "bare_heads"): _bare_heads,
    ("linear", "bare"): _bare_linear,
    ("linear", "pointwise"): _pointwise,
    ("linear", "interleaved"): _interleaved,
    ("linear", "stacked"): _stacked,
    ("linear", "lora"): _lora,
    ("spectral", ""): _spectral,
    ("spectral", "style"): _spectral,
    ("weight_norm", ""): _weight_norm,
    ("weight_norm", "style"): _weight_norm,
    ("conv2d", ""): _conv2d,
    ("conv2d", "channels_last"): _conv2d_channels_last,
    ("conv1d", ""): _conv1d,
    ("upconv2d", ""): _upconv2d,
    ("norm", ""): _norm,
    ("group_norm", ""): _group_norm,
    ("batch_norm", ""): _batch_norm,
    ("batch_norm", "frozen"): _frozen,
    ("batch_norm", "moving"): _moving,
    ("norm", "named"): _named,
    ("linear", "named"): _named,
    ("plain_batch_norm", ""): lambda leaf, _: _batch_norm(leaf, "plain"),
    ("embedding", ""): _embedding,
    ("table", ""): _table,
    ("table", "kind"): _table,
    ("table", "embedding"): _table_as_embedding,
    ("codebook", ""): _codebook,
    ("lstm", ""): _recurrent,
    ("lstm", "cell"): _cell,
    ("lstm", "own_cell"): _own_cell,
    ("gru", ""): _recurrent,
    ("gru", "cell"): _cell,
    ("gru", "own_cell"): _own_cell,
}
