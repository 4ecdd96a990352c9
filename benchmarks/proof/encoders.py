"""Encoders and decoders: a T5-like network and a public ViT, against hostile spellings.

The T5-like network reads the left half of a picture with its encoder and the right half, row by row, with its decoder.
As in T5 (Raffel et al., 2020) there are no biases, norms only scale, the feed-forward is gated, and the first block of
each side holds the table of relative positions for all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.gauntlet.truth import Tensors
from benchmarks.proof.text import Scale
from benchmarks.proof.vision import WIDTH, HostileViT

ROWS, HEADS, INNER = 8, 4, 48


def _linear(a: int, b: int) -> nn.Linear:
    return nn.Linear(a, b, bias=False)


def _attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention without a scale, with a bias by relative position."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT
    if table is not None:
        place = torch.arange(ROWS)
        scores = scores + table[place[:, None] - place + ROWS - 1].permute(2, 0, 1)
    if causal:
        scores = scores.masked_fill(torch.ones(ROWS, ROWS).triu(1).bool(), -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (_linear(WIDTH, WIDTH) for _ in range(4))
        if table:
            self.relative_attention_bias = nn.Embedding(2 * ROWS - 1, HEADS)

    def forward(self, x: Tensor, memory: Tensor, table: Tensor | None = None, causal: bool = False) -> Tensor:
        return self.o(_attend(self.q(x), self.k(memory), self.v(memory), table, causal))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.wo = _linear(WIDTH, INNER), _linear(WIDTH, INNER), _linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x)) * self.wi_1(x))


class Block(nn.Module):
    def __init__(self, first: bool, decodes: bool) -> None:
        super().__init__()
        self.SelfAttention, self.layer_norm_0 = Attention(first), Scale(WIDTH, False)
        if decodes:
            self.EncDecAttention, self.layer_norm_1 = Attention(), Scale(WIDTH, False)
        self.DenseReluDense, self.layer_norm_2 = Feed(), Scale(WIDTH, False)

    def forward(self, x: Tensor, table: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.layer_norm_0(x)
        x = x + self.SelfAttention(y, y, table, causal=memory is not None)
        if memory is not None:
            x = x + self.EncDecAttention(self.layer_norm_1(x), memory)
        return x + self.DenseReluDense(self.layer_norm_2(x))


class Stack(nn.Module):
    def __init__(self, decodes: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(k == 0, decodes) for k in range(2))
        self.final_layer_norm = Scale(WIDTH, False)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        table = self.block[0].SelfAttention.relative_attention_bias.weight
        for block in self.block:
            x = block(x, table, memory)
        return self.final_layer_norm(x)


class T5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = _linear(4, WIDTH)
        self.encoder, self.decoder = Stack(False), Stack(True)
        self.lm_head = _linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        left, right = images[:, 0].chunk(2, -1)
        return self.lm_head(self.decoder(self.shared(right), self.encoder(self.shared(left))).mean(1))


class Unit(nn.Module):
    """A block of either side: fused queries, keys and values, fused feed-forward."""

    def __init__(self, decodes: bool) -> None:
        super().__init__()
        self.f = nn.ModuleList([_linear(INNER, WIDTH), _linear(WIDTH, 2 * INNER)])
        if decodes:
            self.c = nn.ModuleList([_linear(WIDTH, 2 * WIDTH), _linear(WIDTH, WIDTH), _linear(WIDTH, WIDTH)])
        self.n = nn.ModuleList(Scale(WIDTH, False) for _ in range(2 + decodes))
        self.a = nn.ModuleList([_linear(WIDTH, WIDTH), _linear(WIDTH, 3 * WIDTH)])

    def forward(self, x: Tensor, table: Tensor, memory: Tensor | None = None) -> Tensor:
        v, q, k = self.a[1](self.n[1](x)).chunk(3, -1)
        x = x + self.a[0](_attend(q, k, v, table, memory is not None))
        if memory is not None:
            k, v = self.c[0](memory).chunk(2, -1)
            x = x + self.c[1](_attend(self.c[2](self.n[2](x)), k, v))
        up, gate = self.f[1](self.n[0](x)).chunk(2, -1)
        return x + self.f[0](F.gelu(gate) * up)


class HostileT5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = _linear(WIDTH, 10)
        self.y = nn.ModuleList(Unit(True) for _ in range(2))
        self.x = nn.ModuleList(Unit(False) for _ in range(2))
        self.m = nn.ModuleList(Scale(WIDTH, False) for _ in range(2))
        self.t = nn.ParameterList(torch.randn(2 * ROWS - 1, HEADS) for _ in range(2))
        self.s = _linear(4, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        memory, x = (self.s(half) for half in images[:, 0].chunk(2, -1))
        for unit in self.x:
            memory = unit(memory, self.t[1])
        memory = self.m[1](memory)
        for unit in reversed(self.y):
            x = unit(x, self.t[0], memory)
        return self.h(self.m[0](x).mean(1))

    @staticmethod
    def truth(state: Tensors) -> Tensors:
        def w(name: str) -> Tensor:
            return state[f"{name}.weight"]

        out = {"h.weight": w("lm_head"), "s.weight": w("shared")}
        for k, side in enumerate(("decoder", "encoder")):
            out[f"m.{k}.weight"] = w(f"{side}.final_layer_norm")
            out[f"t.{k}"] = w(f"{side}.block.0.SelfAttention.relative_attention_bias")
            for i in range(2):
                a, b = f"{side}.block.{i}", f"y.{1 - i}" if side == "decoder" else f"x.{i}"
                own, cross, feed = f"{a}.SelfAttention", f"{a}.EncDecAttention", f"{a}.DenseReluDense"
                out[f"{b}.a.0.weight"] = w(f"{own}.o")
                out[f"{b}.a.1.weight"] = torch.cat([w(f"{own}.{n}") for n in "vqk"])
                out |= {f"{b}.n.1.weight": w(f"{a}.layer_norm_0"), f"{b}.n.0.weight": w(f"{a}.layer_norm_2")}
                out[f"{b}.f.0.weight"] = w(f"{feed}.wo")
                out[f"{b}.f.1.weight"] = torch.cat([w(f"{feed}.wi_1"), w(f"{feed}.wi_0")])
                if side == "decoder":
                    out[f"{b}.c.0.weight"] = torch.cat([w(f"{cross}.k"), w(f"{cross}.v")])
                    out |= {f"{b}.c.1.weight": w(f"{cross}.o"), f"{b}.c.2.weight": w(f"{cross}.q")}
                    out[f"{b}.n.2.weight"] = w(f"{a}.layer_norm_1")
        return out


def timm_vit() -> nn.Module:
    """The public ViT of ``timm``, of the sizes of the hostile one."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=WIDTH,
        depth=2,
        num_heads=4,
        mlp_ratio=1.5,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        norm_layer=nn.LayerNorm,
    )


def timm_state(state: Tensors) -> Tensors:
    """The truth: its tensors in the hostile spelling."""
    usual: Tensors = {}
    for public, value in state.items():
        name = public.replace("patch_embed.proj", "patch_embed").replace("attn.proj", "proj").replace("mlp.", "")
        if ".attn.qkv." in name:
            stem, _, leaf = name.partition(".attn.qkv.")
            usual |= {f"{stem}.{n}.{leaf}": part for n, part in zip(("query", "key", "value"), value.chunk(3))}
        else:
            usual[name] = value
    return HostileViT.truth(usual)
