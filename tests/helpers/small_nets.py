"""Small networks, one for each structure that permutation specs must understand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Convolutions, batch norm, an addition, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.Conv2d(6, 8, 1)
        self.inner = nn.BatchNorm2d(6)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.stem(x)))
        x = x + self.b(F.hardswish(self.inner(self.a(x))))
        return self.head(x.flatten(1))


class Dense(nn.Module):
    """Concatenation: later layers read all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.layers = nn.ModuleList(nn.Conv2d(6 + 4 * k, 4, 3, padding=1) for k in range(3))
        self.norm, self.head = nn.BatchNorm2d(18), nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(F.relu(x))], dim=1)
        return self.head(self.norm(x).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped, depthwise and transposed convolutions, squeeze and excite, group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down, self.up = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.norm, self.wider = nn.GroupNorm(4, 12), nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.grouped(self.stem(x)).relu())
        gate = self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return self.head(self.wider(self.norm(x * gate)).relu())


class Shuffled(nn.Module):
    """Channel shuffle between split halves, pixel shuffle at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.last = nn.Conv2d(8, 12, 1), nn.Conv2d(3, 2, 1)

    @staticmethod
    def shuffle(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for layer in (self.one, self.two):
            keep, work = x.chunk(2, dim=1)
            x = self.shuffle(torch.cat([keep, layer(work).relu()], dim=1))
        return self.last(F.pixel_shuffle(self.head(x), 2))


class Attention(nn.Module):
    """Grouped queries with optional rotary embedding and gains for q and k, and a relative position table."""

    def __init__(self, width: int = 16, heads: int = 4, kv: int = 4, dim: int = 6, rotary: bool = False) -> None:
        super().__init__()
        self.heads, self.kv, self.dim, self.rotary = heads, kv, dim, rotary
        self.q, self.k = nn.Linear(width, heads * dim), nn.Linear(width, kv * dim)
        self.v, self.o = nn.Linear(width, kv * dim), nn.Linear(heads * dim, width)
        self.table = nn.Parameter(torch.randn(64, heads))

    def turn(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * 10.0 ** -torch.linspace(0, 1, self.dim // 2)
        angle = torch.cat([angle, angle], dim=-1)
        a, b = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-b, a], dim=-1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, self.dim).transpose(1, 2)
        k = self.k(x).view(n, t, self.kv, self.dim).transpose(1, 2)
        v = self.v(x).view(n, t, self.kv, self.dim).transpose(1, 2)
        if self.rotary:
            q, k = self.turn(q), self.turn(k)
        times = self.heads // self.kv
        if times > 1:
            k = k[:, :, None].expand(-1, -1, times, -1, -1).reshape(n, self.heads, t, self.dim)
            v = v[:, :, None].expand(-1, -1, times, -1, -1).reshape(n, self.heads, t, self.dim)
        place = torch.arange(t)
        bias = self.table[(place[:, None] - place[None, :] + t).reshape(-1)].view(t, t, -1).permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self.o(y.transpose(1, 2).reshape(n, t, -1))


class Transformer(nn.Module):
    """Token table tied to the output, class token, position table, layer scale, gated MLP, RMS norm."""

    def __init__(self, kv: int = 4, rotary: bool = False, vocabulary: int = 11, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 8, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attention, self.scale = Attention(width, kv=kv, rotary=rotary), nn.Parameter(torch.randn(width))
        self.up, self.down = nn.Linear(width, 2 * 20), nn.Linear(20, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(tokens), -1, -1), self.embed(tokens)], dim=1)
        x = x + self.place[:, : x.shape[1]]
        x = x + self.scale * self.attention(self.norm1(x))
        x = x + self.down(F.glu(self.up(self.norm2(x))))
        return self.head(x)


class Experts(nn.Module):
    """Routed experts as 3-D tensors, by a grouped product of sorted rows or by a batch of chosen matrices."""

    def __init__(self, batched: bool, experts: int = 4, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.batched, self.inp, self.router = batched, nn.Linear(5, width), nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, hidden, width))
        self.down = nn.Parameter(torch.randn(experts, width, hidden))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        weight, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        ids = chosen.reshape(-1)
        if self.batched:
            y = torch.bmm(self.up[ids], x.repeat_interleave(2, dim=0)[:, :, None]).relu()
            y = torch.bmm(self.down[ids], y)[:, :, 0]
        else:
            ordered, rows = torch.sort(ids)
            counts = torch.histc(ordered.float(), bins=len(self.up), min=0, max=len(self.up) - 1)
            ends = counts.cumsum(0, dtype=torch.int32)
            y = F.grouped_mm(x[rows // 2], self.up.transpose(1, 2), offs=ends).relu()
            y = F.grouped_mm(y, self.down.transpose(1, 2), offs=ends)
            back = torch.empty_like(rows)
            back[rows] = torch.arange(len(rows))
            y = y[back]
        y = (y * weight.reshape(-1)[:, None]).view(len(x), 2, -1).sum(1)
        return self.head(x + y)


class Recurrent(nn.Module):
    """LSTM and GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(3, 5, num_layers=2, bidirectional=True), nn.GRU(10, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0])


class CachedBias(nn.Module):
    """Keeps its attention bias from one call in evaluation mode to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.table, self.out = nn.Linear(4, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 2)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> CachedBias:
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table * 2
        if not self.training:
            bias = self.cache.setdefault("bias", bias)
        return self.out((self.inp(x) + bias).relu())


class Halves(nn.Module):
    """Two halves of one axis with different activations: they may not be mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.inp(x).chunk(2, dim=-1)
        return self.out(torch.cat([a.relu(), b.tanh()], dim=-1))


class Cumulative(nn.Module):
    """Depends on the order of its hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mid, self.out = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mid(self.inp(x).cumsum(-1)).relu())


class Unruled(nn.Module):
    """An operation that nobody wrote a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mid, self.out = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mid(torch.linalg.pinv(self.inp(x)).mT).relu())


class Standardised(nn.Module):
    """Weight standardisation: the weight is normalised in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, groups=2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            flat = layer.weight.reshape(1, layer.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True).reshape_as(layer.weight)
            x = F.relu(F.conv2d(x, weight, layer.bias, groups=layer.groups))
        return self.head(x.mean((2, 3)))


class Net(nn.Module):
    """Modules and parameters under names, and a function that uses them."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.run = forward

    def forward(self, *args):
        return self.run(self, *args)


class Tree(nn.Module):
    """Modules by dotted path, registered in the order given."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for path, module in modules.items():
            *above, own = path.split(".")
            node: nn.Module = self
            for part in above:
                if part not in dict(node.named_children()):
                    node.add_module(part, nn.Module())
                node = node.get_submodule(part)
            node.add_module(own, module)
