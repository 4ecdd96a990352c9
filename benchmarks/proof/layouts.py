"""Decoders in the layouts of litgpt and torchtune, written anew: names that speak, but not all of what differs.

In litgpt one matrix holds queries, keys and values, group by group of the heads that share keys, and rotary rows stand
in halves. In torchtune they stand apart, in neighbouring pairs, and the feed-forward is ``w1`` (gate), ``w2`` (down)
and ``w3`` (up). Neither library is needed here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.gauntlet.truth import Tensors
from benchmarks.proof.text import Family, attend, to_pairs

FAMILY = Family(norm="rms", position=1.0, keys=2, bias=False, feed="silu")


class Scale(nn.Module):
    """RMSNorm with a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale, 1e-6)


def _linear(a: int, b: int) -> nn.Linear:
    return nn.Linear(a, b, bias=False)


class LitBlock(nn.Module):
    def __init__(self, f: Family) -> None:
        super().__init__()
        d, self.family = f.width, f
        self.norm_1, self.norm_2 = nn.RMSNorm(d, 1e-6), nn.RMSNorm(d, 1e-6)
        self.attn = nn.ModuleDict({"qkv": _linear(d, d + 2 * f.keys * f.head), "proj": _linear(d, d)})
        self.mlp = nn.ModuleDict(
            {"fc_1": _linear(d, f.inner), "fc_2": _linear(d, f.inner), "proj": _linear(f.inner, d)}
        )

    def forward(self, x: Tensor) -> Tensor:
        f, shape = self.family, x.shape[:2]
        parts = self.attn["qkv"](self.norm_1(x)).view(*shape, f.keys, -1, f.head)
        q, k, v = (y.reshape(*shape, -1) for y in parts.split((f.heads // f.keys, 1, 1), 3))
        x = x + self.attn["proj"](attend(f, q, k, v, pairs=False))
        y = self.norm_2(x)
        return x + self.mlp["proj"](F.silu(self.mlp["fc_1"](y)) * self.mlp["fc_2"](y))


class LitGPT(nn.Module):
    """The layout of litgpt."""

    def __init__(self, f: Family = FAMILY) -> None:
        super().__init__()
        self.lm_head = _linear(f.width, f.vocabulary)
        blocks = nn.ModuleList(LitBlock(f) for _ in range(f.blocks))
        parts = {"wte": nn.Embedding(f.vocabulary, f.width), "h": blocks, "ln_f": nn.RMSNorm(f.width, 1e-6)}
        self.transformer = nn.ModuleDict(parts)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class TuneBlock(nn.Module):
    def __init__(self, f: Family) -> None:
        super().__init__()
        d, kv, self.family = f.width, f.keys * f.head, f
        sizes = {"q_proj": d, "k_proj": kv, "v_proj": kv, "output_proj": d}
        self.attn = nn.ModuleDict({name: _linear(d, size) for name, size in sizes.items()})
        self.mlp = nn.ModuleDict({"w1": _linear(d, f.inner), "w2": _linear(f.inner, d), "w3": _linear(d, f.inner)})
        self.sa_norm, self.mlp_norm = Scale(d), Scale(d)

    def forward(self, x: Tensor) -> Tensor:
        y = self.sa_norm(x)
        q, k, v = (self.attn[f"{n}_proj"](y) for n in "qkv")
        x = x + self.attn["output_proj"](attend(self.family, q, k, v, pairs=True))
        y = self.mlp_norm(x)
        return x + self.mlp["w2"](F.silu(self.mlp["w1"](y)) * self.mlp["w3"](y))


class TorchTune(nn.Module):
    """The layout of torchtune."""

    def __init__(self, f: Family = FAMILY) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(f.vocabulary, f.width)
        self.layers = nn.ModuleList(TuneBlock(f) for _ in range(f.blocks))
        self.norm = Scale(f.width)
        self.output = _linear(f.width, f.vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def tune_state(state: Tensors) -> Tensors:
    """The truth from the layout of litgpt to that of torchtune."""
    f = FAMILY
    out = {"tok_embeddings.weight": state["transformer.wte.weight"], "output.weight": state["lm_head.weight"]}
    out["norm.scale"] = state["transformer.ln_f.weight"]
    for i in range(f.blocks):
        a, b = f"transformer.h.{i}", f"layers.{i}"
        parts = state[f"{a}.attn.qkv.weight"].view(f.keys, -1, f.head, f.width)
        q, k, v = (x.reshape(-1, f.width) for x in parts.split((f.heads // f.keys, 1, 1), 1))
        out |= {f"{b}.attn.q_proj.weight": to_pairs(q, f), f"{b}.attn.k_proj.weight": to_pairs(k, f)}
        out |= {f"{b}.attn.v_proj.weight": v, f"{b}.attn.output_proj.weight": state[f"{a}.attn.proj.weight"]}
        for theirs, ours in (("fc_1", "w1"), ("proj", "w2"), ("fc_2", "w3")):
            out[f"{b}.mlp.{ours}.weight"] = state[f"{a}.mlp.{theirs}.weight"]
        for theirs, ours in (("norm_1", "sa_norm"), ("norm_2", "mlp_norm")):
            out[f"{b}.{ours}.scale"] = state[f"{a}.{theirs}.weight"]
    return out


def lit_state(state: Tensors) -> Tensors:
    """The truth from the usual spelling to the layout of litgpt."""
    f = FAMILY
    out = {"transformer.wte.weight": state["embed_tokens.weight"], "lm_head.weight": state["lm_head.weight"]}
    out["transformer.ln_f.weight"] = state["final_norm.weight"]
    for i in range(f.blocks):
        a, b = f"layers.{i}", f"transformer.h.{i}"
        own = [state[f"{a}.attention.{n}_proj.weight"].view(f.keys, -1, f.head, f.width) for n in "qkv"]
        out[f"{b}.attn.qkv.weight"] = torch.cat(own, 1).reshape(-1, f.width)
        out[f"{b}.attn.proj.weight"] = state[f"{a}.attention.o_proj.weight"]
        for theirs, ours in (("gate_proj", "fc_1"), ("up_proj", "fc_2"), ("down_proj", "proj")):
            out[f"{b}.mlp.{ours}.weight"] = state[f"{a}.mlp.{theirs}.weight"]
        for theirs, ours in (("input_norm", "norm_1"), ("pre_mlp_norm", "norm_2")):
            out[f"{b}.{ours}.weight"] = state[f"{a}.{theirs}.weight"]
    return out
