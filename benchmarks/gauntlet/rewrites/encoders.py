"""BERT, T5 and Whisper written again: torch's own layers, fused projections, short names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.gauntlet.rewrites.gpt import heads
from benchmarks.gauntlet.rewrites.llama import RMSNorm


class TorchBert(nn.Module):
    """torch's own encoder, norm last; the pooler is a Sequential."""

    def __init__(self, vocab: int = 96, width: int = 32, hidden: int = 80, depth: int = 3, n_head: int = 4):
        super().__init__()
        self.tok = nn.Embedding(vocab, width)
        self.seg = nn.Embedding(2, width)
        self.pos = nn.Embedding(24, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        layer = nn.TransformerEncoderLayer(width, n_head, hidden, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.pool = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1])) + self.seg(torch.zeros_like(tokens))
        x = self.encoder(self.norm(x))
        return x, self.pool(x[:, 0])


class FusedLayer(nn.Module):
    """Registered in the order of a paper's figure: norms first, then the feed-forward, then attention."""

    def __init__(self, width: int, hidden: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.norm_after_attention = nn.LayerNorm(width, eps=1e-12)
        self.norm_after_ffn = nn.LayerNorm(width, eps=1e-12)
        self.ffn_in = nn.Linear(width, hidden)
        self.ffn_out = nn.Linear(hidden, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part, self.n_head) for part in self.qkv(x).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm_after_attention(x + self.attention_out(a))
        return self.norm_after_ffn(x + self.ffn_out(F.gelu(self.ffn_in(x))))


class FusedBert(nn.Module):
    """Fused q, k, v; another registration order in every layer; no pooler."""

    def __init__(self, vocab: int = 96, width: int = 32, hidden: int = 80, depth: int = 3, n_head: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(FusedLayer(width, hidden, n_head) for _ in range(depth))
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.segment_table = nn.Parameter(torch.zeros(2, width))
        self.position_table = nn.Parameter(torch.zeros(24, width))
        self.word_table = nn.Parameter(torch.zeros(vocab, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word_table[tokens] + self.position_table[: tokens.shape[1]] + self.segment_table[0]
        x = self.embedding_norm(x)
        for layer in self.layers:
            x = layer(x)
        return x


class T5Attention(nn.Module):
    """No scaling, no biases; the first layer of a stack owns the table of relative positions."""

    def __init__(self, width: int, n_head: int, buckets: int | None):
        super().__init__()
        self.n_head, self.buckets = n_head, buckets
        if buckets:
            self.rel_pos = nn.Embedding(buckets, n_head)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def bias(self, length: int, causal: bool) -> Tensor:
        distance = torch.arange(length)[None] - torch.arange(length)[:, None]
        count, start = (self.buckets, 0) if causal else (self.buckets // 2, (distance > 0).long() * (self.buckets // 2))
        distance = -distance.clamp(max=0) if causal else distance.abs()
        exact = count // 2
        far = exact + (torch.log(distance.clamp(min=1) / exact) / math.log(128 / exact) * (count - exact)).long()
        bucket = start + torch.where(distance < exact, distance, far.clamp(max=count - 1))
        return self.rel_pos(bucket).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None, causal: bool = False) -> Tensor:
        q = heads(self.to_q(x), self.n_head)
        k, v = (heads(part, self.n_head) for part in self.to_kv(memory).chunk(2, -1))
        score = q @ k.transpose(-1, -2)
        score = score if bias is None else score + bias
        if causal:
            score = score + torch.full(score.shape[-2:], float("-inf"), dtype=score.dtype).triu(1)
        return self.to_out((score.softmax(-1) @ v).transpose(1, 2).flatten(2))


class T5Gate(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w_gate = nn.Linear(width, hidden, bias=False)
        self.w_up = nn.Linear(width, hidden, bias=False)
        self.w_down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.gelu(self.w_gate(x), approximate="tanh") * self.w_up(x))


class T5Layer(nn.Module):
    def __init__(self, width: int, hidden: int, n_head: int, buckets: int | None, cross: bool):
        super().__init__()
        self.self_norm = RMSNorm(width)
        self.self_attn = T5Attention(width, n_head, buckets)
        if cross:
            self.cross_norm = RMSNorm(width)
            self.cross_attn = T5Attention(width, n_head, None)
        self.mlp_norm = RMSNorm(width)
        self.mlp = T5Gate(width, hidden)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None) -> Tensor:
        y = self.self_norm(x)
        x = x + self.self_attn(y, y, bias, causal=memory is not None)
        if memory is not None:
            x = x + self.cross_attn(self.cross_norm(x), memory, None)
        return x + self.mlp(self.mlp_norm(x))


class T5(nn.Module):
    """T5 v1.1 in one file: k and v fused, one embedding for both sides and, if tied, for the head."""

    def __init__(
        self, vocab: int = 96, width: int = 32, hidden: int = 80, depth: int = 2, n_head: int = 4, tied: bool = True
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.enc = nn.ModuleList(T5Layer(width, hidden, n_head, None if i else 32, False) for i in range(depth))
        self.enc_norm = RMSNorm(width)
        self.dec = nn.ModuleList(T5Layer(width, hidden, n_head, None if i else 32, True) for i in range(depth))
        self.dec_norm = RMSNorm(width)
        self.unembed = nn.Linear(width, vocab, bias=False)
        if tied:
            self.unembed.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        bias = self.enc[0].self_attn.bias(x.shape[1], False)
        for layer in self.enc:
            x = layer(x, bias, None)
        memory = self.enc_norm(x)
        x = self.embedding(decoder_input_ids)
        bias = self.dec[0].self_attn.bias(x.shape[1], True)
        for layer in self.dec:
            x = layer(x, bias, memory)
        return self.unembed(self.dec_norm(x))


class WhisperAttention(nn.Module):
    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor | None = None, causal: bool = False) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = (heads(y, self.n_head) for y in (self.query(x), self.key(memory), self.value(memory)))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class WhisperBlock(nn.Module):
    def __init__(self, width: int, hidden: int, n_head: int, cross: bool):
        super().__init__()
        self.attn = WhisperAttention(width, n_head)
        self.attn_ln = nn.LayerNorm(width)
        self.cross_attn = WhisperAttention(width, n_head) if cross else None
        self.cross_attn_ln = nn.LayerNorm(width) if cross else None
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.mlp_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), causal=memory is not None)
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.cross_attn_ln(x), memory)
        return x + self.mlp(self.mlp_ln(x))


class WhisperEncoder(nn.Module):
    def __init__(self, mels: int, context: int, width: int, hidden: int, n_head: int, depth: int):
        super().__init__()
        self.conv1 = nn.Conv1d(mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(WhisperBlock(width, hidden, n_head, False) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2) + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class WhisperDecoder(nn.Module):
    def __init__(self, vocab: int, context: int, width: int, hidden: int, n_head: int, depth: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(WhisperBlock(width, hidden, n_head, True) for _ in range(depth))
        self.ln = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, memory)
        return self.ln(x) @ self.token_embedding.weight.T


class Whisper(nn.Module):
    """The original release's names; the head is the embedding itself."""

    def __init__(self, vocab: int = 96, mels: int = 20, width: int = 32, hidden: int = 72, n_head: int = 4):
        super().__init__()
        self.encoder = WhisperEncoder(mels, 16, width, hidden, n_head, 2)
        self.decoder = WhisperDecoder(vocab, 12, width, hidden, n_head, 3)

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder(tokens, self.encoder(mel))
