"""GPT-2 as tutorials write it: Linear instead of Conv1D, projections apart, grouped layers, torch's own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def causal(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    q, k, v = heads(q, count), heads(k, count), heads(v, count)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(causal(*self.c_attn(x).chunk(3, -1), self.n_head))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class NanoBlock(nn.Module):
    def __init__(self, width: int, hidden: int, n_head: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, n_head)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The names of the original, but Linear layers: every matrix is transposed. The head is tied to the embedding."""

    def __init__(self, vocab: int = 96, width: int = 32, hidden: int = 128, n_layer: int = 3, n_head: int = 4):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(24, width),
                "h": nn.ModuleList(NanoBlock(width, hidden, n_head) for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class SplitAttention(nn.Module):
    """A course's attention: the output first, then values, keys and queries."""

    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.out = nn.Linear(width, width)
        self.values = nn.Linear(width, width)
        self.keys = nn.Linear(width, width)
        self.queries = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(causal(self.queries(x), self.keys(x), self.values(x), self.n_head))


class GroupedGPT(nn.Module):
    """Layers grouped by kind: all attentions in one list, all feed-forwards in another, norms in a third."""

    def __init__(self, vocab: int = 96, width: int = 32, hidden: int = 128, n_layer: int = 3, n_head: int = 4):
        super().__init__()
        self.token_emb = nn.Embedding(vocab, width)
        self.position_emb = nn.Parameter(torch.zeros(1, 24, width))
        self.attentions = nn.ModuleList(SplitAttention(width, n_head) for _ in range(n_layer))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)) for _ in range(n_layer)
        )
        self.attention_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(n_layer))
        self.feed_forward_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(n_layer))
        self.final_norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_emb(tokens) + self.position_emb[:, : tokens.shape[1]]
        for attention, feed, norm_a, norm_f in zip(
            self.attentions, self.feed_forwards, self.attention_norms, self.feed_forward_norms, strict=True
        ):
            x = x + attention(norm_a(x))
            x = x + feed(norm_f(x))
        return self.to_logits(self.final_norm(x))


class TorchGPT(nn.Module):
    """torch's own encoder layers, norm first, with a causal mask."""

    def __init__(self, vocab: int = 96, width: int = 32, hidden: int = 128, n_layer: int = 3, n_head: int = 4):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.pos = nn.Embedding(24, width)
        layer = nn.TransformerEncoderLayer(
            width, n_head, hidden, 0.0, nn.GELU("tanh"), batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerEncoder(layer, n_layer, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embed(tokens) + self.pos(torch.arange(length))
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
        return self.head(self.decoder(x, mask=mask))


class NeoXAttention(nn.Module):
    def __init__(self, width: int, n_head: int, rotary: int):
        super().__init__()
        self.n_head, self.rotary = n_head, rotary
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        from benchmarks.gauntlet.rewrites.llama import rotate

        def turn(y: Tensor) -> Tensor:
            y = heads(y, self.n_head)
            return torch.cat([rotate(y[..., : self.rotary], False), y[..., self.rotary :]], -1)

        q, k, v = turn(self.q_proj(x)), turn(self.k_proj(x)), heads(self.v_proj(x), self.n_head)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class NeoXBlock(nn.Module):
    def __init__(self, width: int, hidden: int, n_head: int, rotary: int):
        super().__init__()
        self.attn_norm = nn.LayerNorm(width)
        self.attn = NeoXAttention(width, n_head, rotary)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.attn_norm(x)) + self.mlp(self.mlp_norm(x))


class SplitNeoX(nn.Module):
    """GPT-NeoX with q, k and v apart: the original interleaves them head by head."""

    def __init__(self, vocab: int = 96, width: int = 32, hidden: int = 80, n_layer: int = 2, n_head: int = 4):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(NeoXBlock(width, hidden, n_head, width // n_head // 4) for _ in range(n_layer))
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))
