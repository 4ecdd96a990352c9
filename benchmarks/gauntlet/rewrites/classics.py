"""Small classics in two styles each: the textbook's, and the one with lists, Sequentials or torch's own layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.gauntlet.rewrites.gpt import heads
from benchmarks.gauntlet.rewrites.llama import FeedForward, RMSNorm, attend, rotate


class NamedMLP(nn.Module):
    """All hidden layers of one width: only names and order tell them apart."""

    def __init__(self, width: int = 32, depth: int = 5):
        super().__init__()
        self.fc_in = nn.Linear(20, width)
        for i in range(1, depth + 1):
            self.add_module(f"fc{i}", nn.Linear(width, width))
        self.fc_out = nn.Linear(width, 4)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc_in(x))
        for i in range(1, self.depth + 1):
            x = F.relu(getattr(self, f"fc{i}")(x))
        return self.fc_out(x)


class SequentialMLP(nn.Module):
    def __init__(self, width: int = 32, depth: int = 5):
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(20, width), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class NamedAutoencoder(nn.Module):
    """The decoder's matrices have the encoder's shapes, turned around; decoder registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.dec1, self.dec2, self.dec3 = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 40)
        self.enc1, self.enc2, self.enc3 = nn.Linear(40, 24), nn.Linear(24, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.enc3(torch.tanh(self.enc2(torch.tanh(self.enc1(x)))))
        return self.dec3(torch.tanh(self.dec2(torch.tanh(self.dec1(z)))))


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 40))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class TextbookAttention(nn.Module):
    """Four equal projections in a list: queries, keys, values, output."""

    def __init__(self, width: int, h: int):
        super().__init__()
        self.h = h
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, q: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (heads(f(x), self.h) for f, x in zip(self.linears, (q, memory, memory), strict=False))
        return self.linears[3](F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class TextbookFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.relu(self.w_1(x)))


class Sublayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)


class TextbookLayer(nn.Module):
    def __init__(self, width: int, h: int, hidden: int, cross: bool):
        super().__init__()
        self.self_attn = TextbookAttention(width, h)
        if cross:
            self.src_attn = TextbookAttention(width, h)
        self.feed_forward = TextbookFeedForward(width, hidden)
        self.sublayer = nn.ModuleList(Sublayer(width) for _ in range(3 if cross else 2))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.sublayer[0].norm(x)
        x = x + self.self_attn(y, y, causal=memory is not None)
        if memory is not None:
            x = x + self.src_attn(self.sublayer[1].norm(x), memory)
        return x + self.feed_forward(self.sublayer[-1].norm(x))


class TextbookStack(nn.Module):
    def __init__(self, width: int, h: int, hidden: int, depth: int, cross: bool):
        super().__init__()
        self.layers = nn.ModuleList(TextbookLayer(width, h, hidden, cross) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return self.norm(x)


class TextbookTransformer(nn.Module):
    """The annotated style: linears.0 to 3, sublayers that own the norms, embeddings as lut."""

    def __init__(self, vocab: int = 96, width: int = 32, h: int = 4, hidden: int = 80, depth: int = 2):
        super().__init__()
        self.encoder = TextbookStack(width, h, hidden, depth, False)
        self.decoder = TextbookStack(width, h, hidden, depth, True)
        self.src_embed, self.tgt_embed = nn.Embedding(vocab, width), nn.Embedding(vocab + 4, width)
        self.generator = nn.Linear(width, vocab + 4)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        scale = math.sqrt(self.src_embed.embedding_dim)
        return self.generator(self.decoder(self.tgt_embed(tgt) * scale, self.encoder(self.src_embed(src) * scale)))


class TorchSeq2Seq(nn.Module):
    """The same with ``nn.Transformer``, norm first."""

    def __init__(self, vocab: int = 96, width: int = 32, h: int = 4, hidden: int = 80, depth: int = 2):
        super().__init__()
        self.source = nn.Embedding(vocab, width)
        self.target = nn.Embedding(vocab + 4, width)
        self.transformer = nn.Transformer(width, h, depth, depth, hidden, 0.0, batch_first=True, norm_first=True)
        self.out = nn.Linear(width, vocab + 4)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        scale = math.sqrt(self.source.embedding_dim)
        x, y = self.source(src) * scale, self.target(tgt) * scale
        mask = torch.full((y.shape[1], y.shape[1]), float("-inf"), dtype=y.dtype).triu(1)
        return self.out(self.transformer(x, y, tgt_mask=mask))


class TorchBart(nn.Module):
    """BART with torch's own layers, norm last; positions start at two as in the original."""

    def __init__(self, vocab: int = 96, width: int = 32, h: int = 4, hidden: int = 80, depth: int = 2):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.source_positions, self.target_positions = nn.Embedding(26, width), nn.Embedding(26, width)
        self.source_norm, self.target_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        make = {"dim_feedforward": hidden, "dropout": 0.0, "activation": "gelu", "batch_first": True}
        encoder = nn.TransformerEncoderLayer(width, h, **make)
        decoder = nn.TransformerDecoderLayer(width, h, **make)
        self.encoder = nn.TransformerEncoder(encoder, depth, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, depth)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        x = self.source_norm(self.tokens(src) + self.source_positions(torch.arange(src.shape[1]) + 2))
        y = self.target_norm(self.tokens(tgt) + self.target_positions(torch.arange(tgt.shape[1]) + 2))
        mask = torch.full((y.shape[1], y.shape[1]), float("-inf"), dtype=y.dtype).triu(1)
        return self.decoder(y, self.encoder(x), tgt_mask=mask)


class TorchOPT(nn.Module):
    """OPT with torch's own layers, norm first, ReLU."""

    def __init__(self, vocab: int = 96, width: int = 32, h: int = 4, hidden: int = 80, depth: int = 3):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, h, hidden, 0.0, "relu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.ln_out = nn.LayerNorm(width)
        self.words, self.places = nn.Embedding(vocab, width), nn.Embedding(26, width)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.words(tokens) + self.places(torch.arange(length) + 2)
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
        return self.ln_out(self.blocks(x, mask=mask)) @ self.words.weight.T


class TorchDistilBert(nn.Module):
    """No segments, no pooler."""

    def __init__(self, vocab: int = 96, width: int = 32, hidden: int = 80, depth: int = 3, h: int = 4):
        super().__init__()
        self.embed = nn.ModuleDict({"token": nn.Embedding(vocab, width), "position": nn.Embedding(24, width)})
        self.embed_norm = nn.LayerNorm(width, eps=1e-12)
        layer = nn.TransformerEncoderLayer(width, h, hidden, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True)
        self.layers = nn.ModuleList(
            nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).layers  # copies, equal at first
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed["token"](tokens) + self.embed["position"](torch.arange(tokens.shape[1]))
        x = self.embed_norm(x)
        for layer in self.layers:
            x = layer(x)
        return x


class MambaBlock(nn.Module):
    """The selective scan, step by step."""

    def __init__(self, d_model: int, d_inner: int, d_state: int, dt_rank: int, d_conv: int = 4):
        super().__init__()
        self.norm = RMSNorm(d_model, 1e-5)
        self.to_x_and_gate = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.depthwise = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
        self.to_dt_b_c = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt = nn.Linear(dt_rank, d_inner)
        self.log_a = nn.Parameter(torch.zeros(d_inner, d_state))
        self.skip = nn.Parameter(torch.zeros(d_inner))
        self.out = nn.Linear(d_inner, d_model, bias=False)
        self.sizes = [dt_rank, d_state, d_state]

    def forward(self, u: Tensor) -> Tensor:
        x, gate = self.to_x_and_gate(self.norm(u)).chunk(2, -1)
        x = F.silu(self.depthwise(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        dt, b, c = self.to_dt_b_c(x).split(self.sizes, -1)
        dt, a = F.softplus(self.dt(dt)), -self.log_a.exp()
        state, out = torch.zeros(*x.shape[::2], a.shape[1], dtype=x.dtype), []
        for t in range(x.shape[1]):
            step = dt[:, t, :, None]
            state = (step * a).exp() * state + step * b[:, t, None] * x[:, t, :, None]
            out.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(out, 1) + self.skip * x
        return u + self.out(y * F.silu(gate))


class Mamba(nn.Module):
    def __init__(self, vocab: int = 96, d_model: int = 24, depth: int = 3):
        super().__init__()
        self.embed = nn.Embedding(vocab, d_model)
        self.blocks = nn.ModuleList(MambaBlock(d_model, 2 * d_model, 8, 2) for _ in range(depth))
        self.norm = RMSNorm(d_model, 1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.weight.T


class NormedAttention(nn.Module):
    """Queries and keys are normalised per head; registered in the order of the diagram."""

    def __init__(self, dim: int, n_heads: int, n_kv: int):
        super().__init__()
        self.n_heads, self.n_kv = n_heads, n_kv
        size = dim // n_heads
        self.norm_q, self.norm_k = RMSNorm(size), RMSNorm(size)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * n_kv * size, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.to_kv(x).chunk(2, -1)
        q = rotate(self.norm_q(heads(self.to_q(x), self.n_heads)), False)
        k = rotate(self.norm_k(heads(k, self.n_kv)), False)
        return self.to_out(attend(q, k, heads(v, self.n_kv)))


class NormedBlock(nn.Module):
    def __init__(self, dim: int, hidden: int, n_heads: int, n_kv: int):
        super().__init__()
        self.ln_attn = RMSNorm(dim)
        self.attn = NormedAttention(dim, n_heads, n_kv)
        self.ln_mlp = RMSNorm(dim)
        self.mlp = FeedForward(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_attn(x))
        return x + self.mlp(self.ln_mlp(x))


class NormedLlama(nn.Module):
    """A decoder with normalised queries and keys, k and v fused."""

    def __init__(self, vocab: int = 96, dim: int = 32, hidden: int = 56, depth: int = 3, n_heads: int = 4):
        super().__init__()
        self.embedder = nn.Embedding(vocab, dim)
        self.stack = nn.Sequential(*(NormedBlock(dim, hidden, n_heads, 2) for _ in range(depth)))
        self.ln_out = RMSNorm(dim)
        self.unembedder = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembedder(self.ln_out(self.stack(self.embedder(tokens))))


class BloomBlock(nn.Module):
    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (heads(w(y), self.n_head) for w in (self.wq, self.wk, self.wv))
        length = x.shape[1]
        slope = 2.0 ** (-8.0 * torch.arange(1, self.n_head + 1, dtype=x.dtype) / self.n_head)
        bias = slope[:, None, None] * torch.arange(length, dtype=x.dtype)
        bias = bias + torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].expand(len(x), -1, -1, -1))
        x = x + self.wo(a.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x)), approximate="tanh"))


class SplitBloom(nn.Module):
    """BLOOM with q, k and v apart."""

    def __init__(self, vocab: int = 96, width: int = 32, depth: int = 2, n_head: int = 4):
        super().__init__()
        self.emb, self.emb_ln = nn.Embedding(vocab, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(BloomBlock(width, n_head) for _ in range(depth))
        self.ln = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb_ln(self.emb(tokens))
        for block in self.blocks:
            x = block(x)
        return self.ln(x) @ self.emb.weight.T


class MixerLayer(nn.Module):
    def __init__(self, places: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.across_channels = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])
        self.across_places = nn.ModuleList([nn.Conv1d(places, width // 2, 1), nn.Conv1d(width // 2, places, 1)])

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.across_places
        x = x + b(F.gelu(a(self.norms[0](x))))
        a, b = self.across_channels
        return x + b(F.gelu(a(self.norms[1](x))))


class ConvMixer(nn.Module):
    """MLP-Mixer whose mixing across places is a 1x1 convolution over the places."""

    def __init__(self, width: int = 24, depth: int = 3):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.layers = nn.Sequential(*(MixerLayer(16, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classify = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.embed(x).flatten(2).transpose(1, 2))
        return self.classify(self.norm(x).mean(1))
