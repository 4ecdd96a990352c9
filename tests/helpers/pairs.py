"""Small models in two makes, with the truth of what belongs to what."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor values of its own, statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.5 if name.endswith("var") else 0.3 * noise + 0.1)
    return module.eval()


class Attention(nn.Module):
    """Separate projections, registered k, v, q, out as in the BART family."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Fused(nn.Module):
    """One projection for q, k and v; interleaved head by head on request."""

    def __init__(self, width: int, heads: int, interleaved: bool = False) -> None:
        super().__init__()
        self.heads, self.interleaved = heads, interleaved
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        y = self.qkv(x)
        if self.interleaved:
            q, k, v = y.view(b, n, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = y.view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class OldBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 3 * width)
        self.fc2 = nn.Linear(3 * width, width)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x))))


class NewBlock(nn.Module):
    def __init__(self, width: int, heads: int, interleaved: bool = False) -> None:
        super().__init__()
        self.norm_a = nn.LayerNorm(width)
        self.mixer = Fused(width, heads, interleaved)
        self.norm_b = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm_a(x))
        return x + self.ffn(self.norm_b(x))


class OldEncoder(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, depth: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(7, width)
        self.layers = nn.ModuleList(OldBlock(width, heads) for _ in range(depth))
        self.final_layer_norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.final_layer_norm(x).mean(1))


class NewEncoder(nn.Module):
    def __init__(
        self, width: int = 16, heads: int = 4, depth: int = 3, classes: int = 5, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = nn.Linear(7, width)
        self.backbone.blocks = nn.ModuleList(NewBlock(width, heads, interleaved) for _ in range(depth))
        self.backbone.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone.stem(x)
        for block in self.backbone.blocks:
            x = block(x)
        return self.head(self.backbone.norm(x).mean(1))


def sample() -> Tensor:
    return torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(1))
