"""Small networks on digits, each in two spellings of one function: the usual one, and one that is hostile on purpose.

Each hostile class holds its truth: ``truth(state)`` takes the usual spelling's tensors to its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.gauntlet.truth import Tensors

WIDTH = 32


def _carry(state: Tensors, pairs: dict[str, str]) -> Tensors:
    """Rename modules, with all that is in them."""
    out = {}
    for name, value in state.items():
        for old, new in pairs.items():
            if name.startswith(f"{old}."):
                out[f"{new}.{name[len(old) + 1 :]}"] = value
    return out


# ---- a convolutional network with batch norm -------------------------------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        y = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        y = self.bn2(self.conv2(y)) + F.max_pool2d(x, 2)
        return self.fc(F.relu(y).mean((2, 3)))


class HostileConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Linear(16, 10)
        self.n = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.k = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.s = nn.Conv2d(1, 16, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n[2](self.s(x)))
        y = F.max_pool2d(F.relu(self.n[0](self.k[1](x))), 2)
        y = self.n[1](self.k[0](y)) + F.max_pool2d(x, 2)
        return self.g(F.relu(y).mean((2, 3)))

    @staticmethod
    def truth(state: Tensors) -> Tensors:
        pairs = {"fc": "g", "bn1": "n.0", "bn2": "n.1", "stem_bn": "n.2", "conv1": "k.1", "conv2": "k.0", "stem": "s"}
        return _carry(state, pairs)


# ---- a vision transformer --------------------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int = 4) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.proj(_attend(self.query(y), self.key(y), self.value(y)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, WIDTH, 2, 2)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class HostileLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList([nn.Linear(48, WIDTH), nn.Linear(WIDTH, 48)])
        self.a = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)])
        self.l = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        k, v, q = self.a[1](self.l[1](x)).chunk(3, -1)
        x = x + self.a[0](_attend(q, k, v))
        return x + self.f[0](F.gelu(self.f[1](self.l[0](x))))


class HostileViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.ModuleList([nn.Linear(WIDTH, 10), nn.LayerNorm(WIDTH)])
        self.b = nn.ModuleList(HostileLayer() for _ in range(2))
        self.e = nn.Parameter(torch.randn(16, WIDTH) * 0.02)
        self.i = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(2, 3)[:, 0]
        x = self.i(x) + self.e
        for block in reversed(self.b):
            x = block(x)
        return self.c[0](self.c[1](x).mean(1))

    @staticmethod
    def truth(state: Tensors) -> Tensors:
        out = {"e": state["pos_embed"][0], "i.weight": state["patch_embed.weight"].flatten(1)}
        out["i.bias"] = state["patch_embed.bias"]
        out |= _carry(state, {"head": "c.0", "norm": "c.1"})
        for i in range(2):
            a, b = f"blocks.{i}", f"b.{1 - i}"
            pairs = {"fc2": "f.0", "fc1": "f.1", "proj": "a.0", "norm2": "l.0", "norm1": "l.1"}
            out |= _carry(state, {f"{a}.{s}": f"{b}.{t}" for s, t in pairs.items()})
            for s in ("weight", "bias"):
                out[f"{b}.a.1.{s}"] = torch.cat([state[f"{a}.{n}.{s}"] for n in ("key", "value", "query")])
        return out


# ---- an MLP mixer, all of whose matrices are square ------------------------------------------------------------------


class MixerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.token1, self.token2 = nn.Linear(16, 16), nn.Linear(16, 16)
        self.channel1, self.channel2 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token2(F.gelu(self.token1(self.norm1(x).mT))).mT
        return x + self.channel2(F.gelu(self.channel1(self.norm2(x))))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 2, 2)
        self.blocks = nn.ModuleList(MixerBlock() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class HostileMixerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.l = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.t = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.t[0](F.gelu(self.t[1](self.l[0](x))))
        return x + self.c[0](F.gelu(self.c[1](self.l[1](x))))


class HostileMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o, self.l = nn.Linear(16, 10), nn.LayerNorm(16)
        self.m = nn.ModuleList(HostileMixerBlock() for _ in range(2))
        self.i = nn.Conv2d(1, 16, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x).flatten(2).mT
        for block in reversed(self.m):
            x = block(x)
        return self.o(self.l(x).mean(1))

    @staticmethod
    def truth(state: Tensors) -> Tensors:
        out = _carry(state, {"head": "o", "norm": "l", "embed": "i"})
        for i in range(2):
            a, b = f"blocks.{i}", f"m.{1 - i}"
            pairs = {"channel2": "c.0", "channel1": "c.1", "norm1": "l.0", "norm2": "l.1", "token2": "t.0"}
            out |= _carry(state, {f"{a}.{s}": f"{b}.{t}" for s, t in (pairs | {"token1": "t.1"}).items()})
            for k in "01":
                out[f"{b}.t.{k}.weight"] = out[f"{b}.t.{k}.weight"][..., None]
        return out


# ---- a U-Net that finds the strokes under noise ----


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.mid1, self.mid2 = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.dec2, self.dec1 = nn.Conv2d(24, 12, 3, padding=1), nn.Conv2d(24, 12, 3, padding=1)
        self.up2, self.up1 = nn.ConvTranspose2d(12, 12, 2, 2), nn.ConvTranspose2d(12, 12, 2, 2)
        self.out = nn.Conv2d(12, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.enc1(x))
        b = F.relu(self.enc2(F.max_pool2d(a, 2)))
        c = F.relu(self.mid2(F.relu(self.mid1(F.max_pool2d(b, 2)))))
        b = F.relu(self.dec2(torch.cat((self.up2(c), b), 1)))
        return self.out(F.relu(self.dec1(torch.cat((self.up1(b), a), 1))))


class HostileUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.ModuleList(nn.ConvTranspose2d(12, 12, 2, 2) for _ in range(2))
        self.v = nn.ModuleList(nn.Conv2d(24, 12, 3, padding=1) for _ in range(2))
        self.w = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
        self.o = nn.Linear(12, 1)
        self.q = nn.Conv2d(1, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.q(x))
        b = F.relu(self.w[2](F.max_pool2d(a, 2)))
        c = F.relu(self.w[1](F.relu(self.w[0](F.max_pool2d(b, 2)))))
        b = F.relu(self.v[0](torch.cat((self.x[0](c), b), 1)))
        y = F.relu(self.v[1](torch.cat((self.x[1](b), a), 1)))
        return self.o(y.movedim(1, -1)).movedim(-1, 1)

    @staticmethod
    def truth(state: Tensors) -> Tensors:
        pairs = {"up2": "x.0", "up1": "x.1", "dec2": "v.0", "dec1": "v.1", "enc2": "w.2", "mid1": "w.0", "mid2": "w.1"}
        out = _carry(state, pairs | {"out": "o", "enc1": "q"})
        out["o.weight"] = out["o.weight"][:, :, 0, 0]
        return out


# ---- a variational autoencoder ---------------------------------------------------------------------------------------


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 48), nn.Linear(48, 48)
        self.fc_mu, self.fc_logvar = nn.Linear(48, 8), nn.Linear(48, 8)
        self.dec1, self.dec2, self.dec3 = nn.Linear(8, 48), nn.Linear(48, 48), nn.Linear(48, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.silu(self.fc2(F.silu(self.fc1(x.flatten(1)))))
        mean, spread = self.fc_mu(h), self.fc_logvar(h)
        z = mean + torch.randn_like(mean) * (spread / 2).exp()
        return self.dec3(F.silu(self.dec2(F.silu(self.dec1(z))))), mean, spread


class HostileVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.ModuleList([nn.Linear(48, 64), nn.Linear(48, 48), nn.Linear(48, 48)])
        self.b = nn.ModuleList([nn.Linear(8, 48), nn.Linear(48, 16)])
        self.a = nn.Linear(64, 48)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.silu(self.d[1](F.silu(self.a(x.flatten(1)))))
        spread, mean = self.b[1](h).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (spread / 2).exp()
        return self.d[0](F.silu(self.d[2](F.silu(self.b[0](z))))), mean, spread

    @staticmethod
    def truth(state: Tensors) -> Tensors:
        out = _carry(state, {"dec3": "d.0", "fc2": "d.1", "dec2": "d.2", "dec1": "b.0", "fc1": "a"})
        for s in ("weight", "bias"):
            out[f"b.1.{s}"] = torch.cat([state[f"fc_logvar.{s}"], state[f"fc_mu.{s}"]])
        return out


# ---- recurrent networks over the rows --------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = (nn.LSTM if kind == "lstm" else nn.GRU)(8, 24, 2, batch_first=True)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x[:, 0])[0][:, -1])


class HostileLSTM(nn.Module):
    """Gates in the order output, input, cell, forget; the upper layer first."""

    order = (3, 0, 2, 1)

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(24, 10)
        self.s = nn.ModuleList(nn.Linear(24, 24 * len(self.order)) for _ in range(2))
        self.i = nn.ModuleList([nn.Linear(24, 24 * len(self.order)), nn.Linear(8, 24 * len(self.order))])

    def cell(self, k: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        out, into, new, keep = (self.i[k](x) + self.s[k](h)).chunk(4, -1)
        c = keep.sigmoid() * c + into.sigmoid() * new.tanh()
        return out.sigmoid() * c.tanh(), c

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0].unbind(1)
        for k in (1, 0):
            h = c = torch.zeros(len(x), 24)
            outputs = []
            for row in rows:
                h, c = self.cell(k, row, h, c)
                outputs.append(h)
            rows = outputs
        return self.f(rows[-1])

    @classmethod
    def truth(cls, state: Tensors) -> Tensors:
        out = _carry(state, {"fc": "f"})
        for k in (0, 1):
            for own, theirs in (("i", "ih"), ("s", "hh")):
                for s in ("weight", "bias"):
                    parts = state[f"rnn.{s}_{theirs}_l{k}"].chunk(len(cls.order))
                    out[f"{own}.{1 - k}.{s}"] = torch.cat([parts[g] for g in cls.order])
        return out


class HostileGRU(HostileLSTM):
    """Gates in the order new, reset, update."""

    order = (2, 0, 1)

    def cell(self, k: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        new_x, reset_x, update_x = self.i[k](x).chunk(3, -1)
        new_h, reset_h, update_h = self.s[k](h).chunk(3, -1)
        new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
        update = (update_x + update_h).sigmoid()
        return (1 - update) * new + update * h, c


# ---- two towers, one for each half of the picture --------------------------------------------------------------------


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(256, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(F.relu(self.conv(x)).flatten(1)))
        return F.normalize(self.fc2(x), dim=-1)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.upper_encoder, self.lower_encoder = Tower(), Tower()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = x.chunk(2, 2)
        return self.upper_encoder(upper) @ self.lower_encoder(lower).mT * self.temperature.exp()


class HostileTwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.ModuleList(Tower() for _ in range(2))
        self.t = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = x.chunk(2, 2)
        return self.n[1](upper) @ self.n[0](lower).mT * self.t.exp()

    @staticmethod
    def truth(state: Tensors) -> Tensors:
        return _carry(state, {"upper_encoder": "n.1", "lower_encoder": "n.0"}) | {"t": state["temperature"]}
