"""Llama and Mixtral: the original style, the fused style of training repositories, experts one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, interleaved: bool, base: float = 10000.0) -> Tensor:
    """Rotary embedding of (batch, heads, time, head width); pairs are neighbours or halves apart."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequency)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv: int, interleaved: bool):
        super().__init__()
        self.n_heads, self.n_kv, self.interleaved = n_heads, n_kv, interleaved
        size = dim // n_heads
        self.wq = nn.Linear(dim, n_heads * size, bias=False)
        self.wk = nn.Linear(dim, n_kv * size, bias=False)
        self.wv = nn.Linear(dim, n_kv * size, bias=False)
        self.wo = nn.Linear(n_heads * size, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = rotate(heads(self.wq(x), self.n_heads), self.interleaved)
        k = rotate(heads(self.wk(x), self.n_kv), self.interleaved)
        return self.wo(attend(q, k, heads(self.wv(x), self.n_kv)))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """The top two experts of each token, weighted by a softmax over their two logits."""

    def __init__(self, dim: int, hidden: int, count: int):
        super().__init__()
        self.experts = nn.ModuleList(FeedForward(dim, hidden) for _ in range(count))
        self.gate = nn.Linear(dim, count, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.gate(x).topk(2, -1)
        weight = weight.softmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weight * (index == number)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return out


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int, n_heads: int, n_kv: int, interleaved: bool, experts: int):
        super().__init__()
        self.attention = Attention(dim, n_heads, n_kv, interleaved)
        if experts:
            self.block_sparse_moe = MoE(dim, hidden, experts)
        else:
            self.feed_forward = FeedForward(dim, hidden)
        self.attention_norm = RMSNorm(dim)
        self.ffn_norm = RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        feed = self.feed_forward if hasattr(self, "feed_forward") else self.block_sparse_moe
        return x + feed(self.ffn_norm(x))


class MetaLlama(nn.Module):
    """As the original release: wq, w1, attention_norm; neighbours are rotated together there (``interleaved``)."""

    def __init__(
        self,
        vocab: int = 96,
        dim: int = 32,
        hidden: int = 56,
        n_layers: int = 3,
        n_heads: int = 4,
        n_kv: int = 2,
        interleaved: bool = False,
        experts: int = 0,
    ):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(Block(dim, hidden, n_heads, n_kv, interleaved, experts) for _ in range(n_layers))
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


class FusedAttention(nn.Module):
    """One projection for q, k and v: three blocks, or (``grouped``) q, k, v of one key head after the other."""

    def __init__(self, dim: int, n_heads: int, n_kv: int, grouped: bool):
        super().__init__()
        self.n_heads, self.n_kv, self.size, self.grouped = n_heads, n_kv, dim // n_heads, grouped
        self.attn = nn.Linear(dim, (n_heads + 2 * n_kv) * self.size, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn(x)
        if self.grouped:
            per = self.n_heads // self.n_kv
            qkv = qkv.unflatten(-1, (self.n_kv, per + 2, self.size))
            q = qkv[..., :per, :].flatten(2)
            k, v = qkv[..., per, :].flatten(2), qkv[..., per + 1, :].flatten(2)
        else:
            q, k, v = qkv.split([self.n_heads * self.size, self.n_kv * self.size, self.n_kv * self.size], -1)
        q, k = rotate(heads(q, self.n_heads), False), rotate(heads(k, self.n_kv), False)
        return self.proj(attend(q, k, heads(v, self.n_kv)))


class FusedMLP(nn.Module):
    def __init__(self, dim: int, hidden: int, fused: bool):
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        else:
            self.fc_1 = nn.Linear(dim, hidden, bias=False)
            self.fc_2 = nn.Linear(dim, hidden, bias=False)
        self.proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.fused else (self.fc_1(x), self.fc_2(x))
        return self.proj(F.silu(gate) * up)


class FusedBlock(nn.Module):
    def __init__(self, dim: int, hidden: int, n_heads: int, n_kv: int, grouped: bool, fused: bool):
        super().__init__()
        self.norm_1 = RMSNorm(dim)
        self.attn = FusedAttention(dim, n_heads, n_kv, grouped)
        self.norm_2 = RMSNorm(dim)
        self.mlp = FusedMLP(dim, hidden, fused)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class FusedLlama(nn.Module):
    """As training repositories write it: a head registered first, one attention projection, optional fused gate."""

    def __init__(
        self,
        vocab: int = 96,
        dim: int = 32,
        hidden: int = 56,
        n_layers: int = 3,
        n_heads: int = 4,
        n_kv: int = 2,
        grouped: bool = False,
        fused: bool = False,
    ):
        super().__init__()
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, dim),
                "h": nn.ModuleList(FusedBlock(dim, hidden, n_heads, n_kv, grouped, fused) for _ in range(n_layers)),
                "ln_f": RMSNorm(dim),
            }
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))
