"""Small language models, each in two spellings of one function: the usual one, and one that is hostile on purpose.

``Decoder`` is the usual spelling: names that speak, q, k and v apart, rotary halves. ``Hostile`` computes the same from
names that say nothing, other orders of registration, fused and turned matrices, rotary pairs and blocks counted from
the last. What each family of public models is known for (norms and where they stand, position, heads, feed-forward) is
an option of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.gauntlet.truth import Tensors


@dataclass(frozen=True)
class Family:
    """What tells the families of decoders apart.

    Attributes:
        norm: ``layer`` (with bias), ``rms`` or ``rms1`` (a scale of one plus the weight).
        places: Norms of a block: ``pre``, ``post`` (on what a branch puts out) or ``both``.
        parallel: Attention and feed-forward read the same norm and are added together.
        position: ``learned``, or the share of a head that is rotated.
        keys: Heads of keys and values.
        bias: Whether linear layers have one.
        feed: ``gelu``, ``silu`` or ``gelu_gated``, or ``experts``.
        query_norm: Whether queries and keys are normed over the whole width.
        inner: Width of the feed-forward.
        blocks, width, heads, vocabulary, context: Sizes.
    """

    norm: str = "layer"
    places: str = "pre"
    parallel: bool = False
    position: str | float = "learned"
    keys: int = 4
    bias: bool = True
    feed: str = "gelu"
    query_norm: bool = False
    inner: int = 80
    blocks: int = 3
    width: int = 64
    heads: int = 4
    vocabulary: int = 72
    context: int = 48

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads


FAMILIES = {
    "gpt2": Family(),
    "llama": Family(norm="rms", position=1.0, bias=False, feed="silu"),
    "neox": Family(position=0.25, parallel=True),
    "phi": Family(position=0.5, parallel=True, keys=4),
    "falcon": Family(position=1.0, parallel=True, keys=1, bias=False),
    "gemma2": Family(norm="rms1", places="both", position=1.0, keys=2, bias=False, feed="gelu_gated"),
    "olmo2": Family(norm="rms", places="post", position=1.0, bias=False, feed="silu", query_norm=True),
    "mixtral": Family(norm="rms", position=1.0, keys=2, bias=False, feed="experts", inner=64, blocks=2),
}


class Scale(nn.Module):
    """RMSNorm, with the weight as it is or as what is added to one."""

    def __init__(self, width: int, plus_one: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))
        self.plus = float(plus_one)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (self.weight + self.plus)


def norm(family: Family, width: int) -> nn.Module:
    """The family's norm."""
    return nn.LayerNorm(width) if family.norm == "layer" else Scale(width, family.norm == "rms1")


def rotate(x: Tensor, share: float, pairs: bool) -> Tensor:
    """Rotate the first part of each head, ``(B, H, T, D)``, in halves or in neighbouring pairs."""
    width = int(x.shape[-1] * share)
    turned, rest = x[..., :width], x[..., width:]
    speed = 1000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(x.shape[-2])[:, None] * speed
    c, s = angle.cos(), angle.sin()
    if pairs:
        a, b = turned[..., ::2], turned[..., 1::2]
        out = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * c - b * s, a * s + b * c), -1)
    return torch.cat((out, rest), -1)


def attend(family: Family, q: Tensor, k: Tensor, v: Tensor, pairs: bool, causal: bool = True) -> Tensor:
    """Attention over ``(B, T, heads * D)`` queries and as many or fewer heads of keys and values."""
    b, t, _ = q.shape
    q, k, v = (x.view(b, x.shape[1], -1, family.head).transpose(1, 2) for x in (q, k, v))
    if not isinstance(family.position, str):
        q, k = rotate(q, family.position, pairs), rotate(k, family.position, pairs)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(b, t, -1)


def gated(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU or GeGLU."""
    return (F.gelu(gate) if kind == "gelu_gated" else F.silu(gate)) * up


def mix(scores: Tensor, experts: list[Tensor]) -> Tensor:
    """The two best experts of four, weighted by their scores."""
    best = scores.topk(2, -1)
    weights = torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(-1))
    return sum(weights[..., i, None] * x for i, x in enumerate(experts))


# ---- the usual spelling ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, family: Family) -> None:
        super().__init__()
        d, kv, bias = family.width, family.keys * family.head, family.bias
        self.q_proj, self.k_proj = nn.Linear(d, d, bias=bias), nn.Linear(d, kv, bias=bias)
        self.v_proj, self.o_proj = nn.Linear(d, kv, bias=bias), nn.Linear(d, d, bias=bias)
        if family.query_norm:
            self.q_norm, self.k_norm = norm(family, d), norm(family, kv)
        self.family = family

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.family.query_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(self.family, q, k, v, pairs=False))


class Feed(nn.Module):
    def __init__(self, family: Family) -> None:
        super().__init__()
        d, f, bias, self.kind = family.width, family.inner, family.bias, family.feed
        if self.kind == "gelu":
            self.fc1, self.fc2 = nn.Linear(d, f, bias=bias), nn.Linear(f, d, bias=bias)
        else:
            self.gate_proj, self.up_proj = nn.Linear(d, f, bias=bias), nn.Linear(d, f, bias=bias)
            self.down_proj = nn.Linear(f, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "gelu":
            return self.fc2(F.gelu(self.fc1(x)))
        return self.down_proj(gated(self.kind, self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Module):
    def __init__(self, family: Family) -> None:
        super().__init__()
        self.router = nn.Linear(family.width, 4, bias=False)
        self.experts = nn.ModuleList(Feed(family) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return mix(self.router(x), [expert(x) for expert in self.experts])


class Block(nn.Module):
    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        if family.places != "post":
            self.input_norm = norm(family, family.width)
        self.attention = Attention(family)
        if family.places != "pre":
            self.post_attention_norm = norm(family, family.width)
        if family.places != "post" and not family.parallel:
            self.pre_mlp_norm = norm(family, family.width)
        self.mlp = Experts(family) if family.feed == "experts" else Feed(family)
        if family.places != "pre":
            self.post_mlp_norm = norm(family, family.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.family.parallel:
            y = self.input_norm(x)
            return x + self.attention(y) + self.mlp(y)
        before, after = self.family.places != "post", self.family.places != "pre"
        y = self.attention(self.input_norm(x) if before else x)
        x = x + (self.post_attention_norm(y) if after else y)
        y = self.mlp(self.pre_mlp_norm(x) if before else x)
        return x + (self.post_mlp_norm(y) if after else y)


class Decoder(nn.Module):
    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        self.embed_tokens = nn.Embedding(family.vocabulary, family.width)
        if family.position == "learned":
            self.embed_positions = nn.Embedding(family.context, family.width)
        self.layers = nn.ModuleList(Block(family) for _ in range(family.blocks))
        self.final_norm = norm(family, family.width)
        self.lm_head = nn.Linear(family.width, family.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        if self.family.position == "learned":
            x = x + self.embed_positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.final_norm(x))


# ---- the hostile spelling --------------------------------------------------------------------------------------------


class Matrix(nn.Module):
    """A linear layer whose weight stands the other way round."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        if bias:
            self.o = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.t
        return y + self.o if hasattr(self, "o") else y


class Unit(nn.Module):
    """A block: what stands where says only ``forward``. Fused heads of ``(q, k, v)`` group by group."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = f = family
        d, kv, bias = f.width, f.keys * f.head, f.bias
        if f.feed == "gelu":
            self.m1, self.m0 = Matrix(f.inner, d, bias), Matrix(d, f.inner, bias)
        elif f.feed == "experts":
            self.m = nn.ParameterList([torch.randn(4, d, f.inner) / 8, torch.randn(4, f.inner, d) / 8])
            self.m.append(torch.randn(4, d, f.inner) / 8)
            self.r = Matrix(d, 4, False)
        else:
            self.m1, self.m0 = Matrix(f.inner, d, bias), Matrix(d, 2 * f.inner, bias)
        norms = (1 if f.parallel else 2) * (2 if f.places == "both" else 1)
        self.n = nn.ModuleList(norm(f, d) for _ in range(norms))
        if f.query_norm:
            self.s = nn.ModuleList([norm(f, kv), norm(f, d)])
        self.a0, self.a1 = nn.Linear(d, d, bias=bias), nn.Linear(d, d + 2 * kv, bias=bias)

    def attend(self, x: Tensor) -> Tensor:
        f, shape = self.family, x.shape[:2]
        parts = self.a1(x).view(*shape, f.keys, f.heads // f.keys + 2, f.head)
        q, k, v = parts.split((f.heads // f.keys, 1, 1), 3)
        q, k, v = (y.reshape(*shape, -1) for y in (q, k, v))
        if f.query_norm:
            k, q = self.s[0](k), self.s[1](q)
        return self.a0(attend(f, q, k, v, pairs=True))

    def feed(self, x: Tensor) -> Tensor:
        f = self.family
        if f.feed == "gelu":
            return self.m1(F.gelu(self.m0(x)))
        if f.feed == "experts":
            return mix(self.r(x), [gated("silu", x @ self.m[2][i], x @ self.m[0][i]) @ self.m[1][i] for i in range(4)])
        up, gate = self.m0(x).chunk(2, -1)
        return self.m1(gated(f.feed, gate, up))

    def forward(self, x: Tensor) -> Tensor:
        places, n = self.family.places, list(self.n)
        if self.family.parallel:
            y = n[0](x)
            return x + self.attend(y) + self.feed(y)
        if places == "pre":
            x = x + self.attend(n[1](x))
            return x + self.feed(n[0](x))
        if places == "post":
            x = x + n[1](self.attend(x))
            return x + n[0](self.feed(x))
        x = x + n[3](self.attend(n[0](x)))
        return x + n[1](self.feed(n[2](x)))


class Hostile(nn.Module):
    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        self.z = nn.Linear(family.width, family.vocabulary, bias=False)
        self.y = norm(family, family.width)
        self.u = nn.ModuleList(Unit(family) for _ in range(family.blocks))
        if family.position == "learned":
            self.p = nn.Parameter(torch.randn(family.context, family.width) * 0.02)
        self.w = nn.Embedding(family.vocabulary, family.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.w(ids)
        if self.family.position == "learned":
            x = x + self.p[: ids.shape[1]]
        for unit in reversed(self.u):
            x = unit(x)
        return self.z(self.y(x))


def to_pairs(x: Tensor, family: Family) -> Tensor:
    """Rows of whole heads from rotary halves to rotary pairs."""
    if isinstance(family.position, str):
        return x
    heads = x.reshape(-1, family.head, *x.shape[1:])
    width = int(family.head * family.position)
    turned = heads[:, :width].reshape(heads.shape[0], 2, width // 2, *x.shape[1:]).transpose(1, 2)
    return torch.cat((turned.reshape(heads.shape[0], width, *x.shape[1:]), heads[:, width:]), 1).reshape(x.shape)


def hostile_state(family: Family, state: Tensors) -> Tensors:
    """The truth: the usual spelling's tensors in the hostile one."""
    out = {"z.weight": state["lm_head.weight"], "w.weight": state["embed_tokens.weight"]}
    if family.position == "learned":
        out["p"] = state["embed_positions.weight"]
    places = {
        "pre": ("pre_mlp_norm", "input_norm"),
        "post": ("post_mlp_norm", "post_attention_norm"),
        "both": ("input_norm", "post_mlp_norm", "pre_mlp_norm", "post_attention_norm"),
    }[family.places]
    places = ("input_norm",) if family.parallel else places
    suffixes = ("weight", "bias") if family.norm == "layer" else ("weight",)
    out |= {f"y.{s}": state[f"final_norm.{s}"] for s in suffixes}
    for i in range(family.blocks):
        a, b = f"layers.{i}", f"u.{family.blocks - 1 - i}"
        for k, name in enumerate(places):
            out |= {f"{b}.n.{k}.{s}": state[f"{a}.{name}.{s}"] for s in suffixes}
        if family.query_norm:
            out[f"{b}.s.0.weight"] = to_pairs(state[f"{a}.attention.k_norm.weight"], family)
            out[f"{b}.s.1.weight"] = to_pairs(state[f"{a}.attention.q_norm.weight"], family)
        for s, t in (("weight", "t"), ("bias", "o"))[: 1 + family.bias]:
            get = {n: state[f"{a}.attention.{n}_proj.{s}"] for n in "qkvo"}
            q, k, v = to_pairs(get["q"], family), to_pairs(get["k"], family), get["v"]
            grouped = [x.reshape(family.keys, -1, family.head, *x.shape[1:]) for x in (q, k, v)]
            out[f"{b}.a1.{s}"] = torch.cat(grouped, 1).reshape(-1, *q.shape[1:])
            out[f"{b}.a0.{s}"] = get["o"]
            if family.feed == "gelu":
                out[f"{b}.m0.{t}"] = state[f"{a}.mlp.fc1.{s}"].mT if s == "weight" else state[f"{a}.mlp.fc1.{s}"]
                out[f"{b}.m1.{t}"] = state[f"{a}.mlp.fc2.{s}"].mT if s == "weight" else state[f"{a}.mlp.fc2.{s}"]
            elif family.feed != "experts":
                both = torch.cat([state[f"{a}.mlp.{n}_proj.{s}"] for n in ("up", "gate")])
                out[f"{b}.m0.{t}"] = both.mT
                out[f"{b}.m1.{t}"] = state[f"{a}.mlp.down_proj.{s}"].mT
        if family.feed == "experts":
            out[f"{b}.r.t"] = state[f"{a}.mlp.router.weight"].mT
            for k, name in enumerate(("up", "down", "gate")):
                parts = [state[f"{a}.mlp.experts.{e}.{name}_proj.weight"].mT for e in range(4)]
                out[f"{b}.m.{k}"] = torch.stack(parts)
    return out
