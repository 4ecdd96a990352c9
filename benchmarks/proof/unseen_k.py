"""A set of pairs that was written before the code that was judged by it had seen any: vision, tables and sequences."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.proof.spelled import Made, Spelled, repeated

WIDTH = 32


def conv(a: int, b: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, stride, size // 2, groups=groups, bias=False)


class Vision(Spelled):
    """A classifier of digits."""

    task = "classify"

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Table(Vision):
    """A classifier of rows of thirty numbers."""

    task = "table"


class PlainNet(Vision):
    """Five convolutions, four of one shape, and a classifier of two layers."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {}
        for k in range(5):
            out |= {f"conv{k}": conv(16 if k else 1, 16), f"bn{k}": nn.BatchNorm2d(16)}
        return out | {"fc1": nn.Linear(64, 64), "fc2": nn.Linear(64, 10)}

    def forward(self, x: Tensor) -> Tensor:
        for k in range(5):
            x = F.relu(self.at(f"bn{k}", self.at(f"conv{k}", x)))
            x = F.max_pool2d(x, 2) if k in (1, 3) else x
        return self.at("fc2", F.relu(self.at("fc1", x.flatten(1))))

    other: ClassVar = {
        "z.0": "fc2", "z.1": "fc1|T", "n.0": "bn3", "c.0": "conv3", "n.1": "bn1", "c.1": "conv1", "n.2": "bn4",
        "n.3": "bn0", "c.2": "conv4", "first": "conv0", "c.3": "conv2", "n.4": "bn2",
    }  # fmt: skip


class ResNet(Vision):
    """Two stages of two blocks, the second with a shortcut."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": conv(1, 12), "stem_bn": nn.BatchNorm2d(12)}
        for s, (a, b) in enumerate(((12, 12), (12, 24))):
            for k in range(2):
                into = a if k == 0 else b
                out |= {f"{s}.{k}.conv1": conv(into, b, stride=1 + (s > k)), f"{s}.{k}.bn1": nn.BatchNorm2d(b)}
                out |= {f"{s}.{k}.conv2": conv(b, b), f"{s}.{k}.bn2": nn.BatchNorm2d(b)}
                if into != b:
                    out |= {f"{s}.{k}.down": conv(into, b, 1, 2), f"{s}.{k}.down_bn": nn.BatchNorm2d(b)}
        return out | {"fc": nn.Linear(24, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.at("stem_bn", self.at("stem", x)))
        for s, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
            y = F.relu(self.at(f"{s}.{k}.bn1", self.at(f"{s}.{k}.conv1", x)))
            y = self.at(f"{s}.{k}.bn2", self.at(f"{s}.{k}.conv2", y))
            x = F.relu(y + (self.at("1.0.down_bn", self.at("1.0.down", x)) if (s, k) == (1, 0) else x))
        return self.at("fc", x.mean((2, 3)))

    other: ClassVar = {
        f"p{k}": role
        for k, role in enumerate(
            (
                "1.1.bn2", "0.1.conv2", "0.0.bn1", "1.0.conv1", "1.0.down_bn", "0.1.bn1", "fc", "stem_bn", "1.0.bn1",
                "1.1.conv2", "0.0.conv2", "1.0.conv2", "0.1.bn2", "stem", "1.0.down", "1.1.bn1", "0.0.bn2", "1.1.conv1",
                "0.0.conv1", "1.0.bn2", "0.1.conv1",
            )
        )
    }  # fmt: skip


class MobileNet(Vision):
    """Inverted residuals with squeeze and excitation."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": conv(1, 12), "stem_bn": nn.BatchNorm2d(12)}
        for k in range(3):
            out |= {f"{k}.expand": conv(12, 36, 1), f"{k}.bn1": nn.BatchNorm2d(36)}
            out |= {f"{k}.depth": conv(36, 36, groups=36), f"{k}.bn2": nn.BatchNorm2d(36)}
            out |= {f"{k}.squeeze": nn.Linear(36, 9), f"{k}.excite": nn.Linear(9, 36)}
            out |= {f"{k}.project": conv(36, 12, 1), f"{k}.bn3": nn.BatchNorm2d(12)}
        return out | {"fc": nn.Linear(12, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.at("stem_bn", self.at("stem", x)))
        for k in range(3):
            y = F.relu6(self.at(f"{k}.bn1", self.at(f"{k}.expand", x)))
            y = F.relu6(self.at(f"{k}.bn2", self.at(f"{k}.depth", y)))
            y = y * self.at(f"{k}.excite", F.relu(self.at(f"{k}.squeeze", y.mean((2, 3))))).sigmoid()[..., None, None]
            x = x + self.at(f"{k}.bn3", self.at(f"{k}.project", y))
        return self.at("fc", x.mean((2, 3)))

    other: ClassVar = {
        "out": "fc",
        **repeated(
            3,
            "u.{}",
            {"a": "bn3", "b": "bn2", "c": "bn1", "d": "depth", "e": "project", "f": "expand", "g.1": "squeeze",
             "g.0": "excite"},
            backwards=True,
        ),
        "w": "stem_bn",
        "v": "stem",
    }  # fmt: skip


def block(k: int, *, bias: bool = True, inner: int = 48, width: int = WIDTH) -> dict[str, Made]:
    """The layers of a transformer's block."""
    out: dict[str, Made] = {f"{k}.norm1": nn.LayerNorm(width)}
    out |= {f"{k}.{n}": nn.Linear(width, width, bias) for n in ("query", "key", "value", "proj")}
    return out | {
        f"{k}.norm2": nn.LayerNorm(width),
        f"{k}.fc1": nn.Linear(width, inner, bias),
        f"{k}.fc2": nn.Linear(inner, width, bias),
    }


def run_block(net: Spelled, k: int, x: Tensor, **how: bool) -> Tensor:
    """A block of a transformer, norms first."""
    y = net.at(f"{k}.norm1", x)
    x = x + net.at(f"{k}.proj", net.attend(*(net.at(f"{k}.{n}", y) for n in ("query", "key", "value")), **how))
    return x + net.at(f"{k}.fc2", F.gelu(net.at(f"{k}.fc1", net.at(f"{k}.norm2", x))))


class ClassToken(Vision):
    """A vision transformer with a class token; parts that alternate by head on the other side."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {
            "cls": nn.Parameter(torch.randn(1, WIDTH) * 0.1),
            "pos": nn.Parameter(torch.randn(17, WIDTH) * 0.1),
            "patch": nn.Linear(4, WIDTH),
        }
        for k in range(3):
            out |= block(k)
        return out | {"norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("patch", x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(2, 3)[:, 0])
        x = torch.cat((self.at("cls").expand(len(x), 1, WIDTH), x), 1) + self.at("pos")
        for k in range(3):
            x = run_block(self, k, x)
        return self.at("head", self.at("norm", x)[:, 0])

    other: ClassVar = {
        "h": "head",
        "q": "norm",
        **repeated(
            3,
            "stage_x.{}",
            {"m.0": "norm2", "m.1": "norm1", "t.0": "proj|T", "t.1": "value+query+key|4", "s.1": "fc1", "s.0": "fc2"},
            backwards=True,
        ),
        "e2": "patch",
        "e1": "pos",
        "e0": "cls",
    }


class FeatureTokens(Table):
    """A transformer over a token for each column of a table, attention last."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {
            "scale": nn.Parameter(torch.randn(30, WIDTH) * 0.2),
            "shift": nn.Parameter(torch.randn(30, WIDTH) * 0.2),
            "token": nn.Parameter(torch.randn(WIDTH) * 0.2),
        }
        for k in range(2):
            out |= block(k)
        return out | {"norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 2)}

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None] * self.at("scale") + self.at("shift")
        x = torch.cat((self.at("token").expand(len(x), 1, WIDTH), x), 1)
        for k in range(2):
            x = run_block(self, k, x)
        return self.at("head", F.relu(self.at("norm", x[:, 0])))

    other: ClassVar = {
        "t0": "shift",
        "t1": "scale",
        **repeated(
            2, "r.{}", {"a0": "key", "a1": "proj", "a2": "query", "a3": "value", "b0": "norm2", "b1": "norm1",
                        "c0": "fc2|T", "c1": "fc1|T"}, backwards=True,
        ),
        "t2": "token",
        "t3": "head",
        "t4": "norm",
    }  # fmt: skip


class Perceiver(Vision):
    """Latents read the rows of a picture by cross attention, then each other."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {
            "embed": nn.Linear(8, WIDTH),
            "pos": nn.Parameter(torch.randn(8, WIDTH) * 0.3),
            "latents": nn.Parameter(torch.randn(6, WIDTH) * 0.3),
        }
        for k in range(2):
            out |= {f"{k}.cross_{n}": nn.Linear(WIDTH, WIDTH) for n in ("query", "key", "value", "proj")}
            out |= {f"{k}.cross_norm": nn.LayerNorm(WIDTH)} | block(k)
        return out | {"head": nn.Linear(WIDTH, 10)}

    def forward(self, x: Tensor) -> Tensor:
        data = self.at("embed", x[:, 0]) + self.at("pos")
        x = self.at("latents").expand(len(x), 6, WIDTH)
        for k in range(2):
            y = self.at(f"{k}.cross_query", self.at(f"{k}.cross_norm", x))
            y = self.attend(y, self.at(f"{k}.cross_key", data), self.at(f"{k}.cross_value", data))
            x = run_block(self, k, x + self.at(f"{k}.cross_proj", y))
        return self.at("head", x.mean(1))

    other: ClassVar = {
        "o": "head",
        "l0": "latents",
        **repeated(
            2, "y.{}", {"a.q": "query", "a.k": "key", "a.v": "value", "a.o": "proj", "n0": "norm2", "n1": "cross_norm",
                        "n2": "norm1", "x.q": "cross_query", "x.kv": "cross_key+cross_value", "x.o": "cross_proj",
                        "f.0": "fc1", "f.1": "fc2"},
        ),
        "l1": "pos",
        "i": "embed",
    }  # fmt: skip


class Convolved(Vision):
    """Dilated causal convolutions over the rows of a picture, two in each residual block."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"inlet": nn.Conv1d(8, 24, 1)}
        for k in range(3):
            out |= {f"{k}.conv1": nn.Conv1d(24, 24, 2), f"{k}.norm1": nn.GroupNorm(4, 24)}
            out |= {f"{k}.conv2": nn.Conv1d(24, 24, 2), f"{k}.norm2": nn.GroupNorm(4, 24)}
        return out | {"head": nn.Linear(24, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("inlet", x[:, 0].mT)
        for k in range(3):
            y = F.pad(x, (2**k, 0))
            y = F.relu(
                self.at(
                    f"{k}.norm1", self.at(f"{k}.conv1", y.unfold(2, 2**k + 1, 1)[..., [0, -1]].flatten(2))[..., ::2]
                )
            )
            z = F.pad(y, (2**k, 0)).unfold(2, 2**k + 1, 1)[..., [0, -1]].flatten(2)
            x = x + F.relu(self.at(f"{k}.norm2", self.at(f"{k}.conv2", z)[..., ::2]))
        return self.at("head", x[..., -1])

    other: ClassVar = {
        **repeated(3, "levels.{}", {"g.0": "norm2", "g.1": "norm1", "k.0": "conv2", "k.1": "conv1"}, backwards=True),
        "top": "head",
        "base": "inlet",
    }


class Crossed(Table):
    """Cross layers, whose matrices are square, beside a deep net."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {f"cross{k}": nn.Linear(30, 30) for k in range(3)}
        out |= {"deep0": nn.Linear(30, 32), "deep1": nn.Linear(32, 32), "deep2": nn.Linear(32, 32)}
        out |= {"bn0": nn.BatchNorm1d(32), "bn1": nn.BatchNorm1d(32), "bn2": nn.BatchNorm1d(32)}
        return out | {"head": nn.Linear(62, 2)}

    def forward(self, x: Tensor) -> Tensor:
        y = z = x
        for k in range(3):
            y = x * self.at(f"cross{k}", y) + y
            z = F.relu(self.at(f"bn{k}", self.at(f"deep{k}", z)))
        return self.at("head", torch.cat((y, z), -1))

    other: ClassVar = {
        "k.0": "deep2", "k.1": "bn0", "k.2": "deep1", "k.3": "cross2|T", "k.4": "bn2", "k.5": "cross0|T",
        "k.6": "deep0", "k.7": "bn1", "k.8": "cross1|T", "k.9": "head",
    }  # fmt: skip


class GatedExperts(Vision):
    """Three experts with gate, up and down, mixed softly; stacked on the other side."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": nn.Linear(64, WIDTH)}
        for k in range(2):
            out |= {f"{k}.norm": nn.LayerNorm(WIDTH), f"{k}.router": nn.Linear(WIDTH, 3)}
            for e in range(3):
                out |= {f"{k}.{e}.{n}": nn.Linear(WIDTH, 40, bias=False) for n in ("gate", "up")}
                out |= {f"{k}.{e}.down": nn.Linear(40, WIDTH, bias=False)}
        return out | {"head": nn.Linear(WIDTH, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("stem", x.flatten(1))
        for k in range(2):
            y = self.at(f"{k}.norm", x)
            share = self.at(f"{k}.router", y).softmax(-1)
            for e in range(3):
                z = F.silu(self.at(f"{k}.{e}.gate", y)) * self.at(f"{k}.{e}.up", y)
                x = x + share[:, e, None] * self.at(f"{k}.{e}.down", z)
        return self.at("head", x)

    other: ClassVar = {
        "y": "head",
        **repeated(
            2, "g.{}", {"w1": "0.up+1.up+2.up|S", "w2": "0.gate+1.gate+2.gate|S", "w3": "0.down+1.down+2.down|ST",
                        "r": "router", "n": "norm"}, backwards=True,
        ),
        "x": "stem",
    }  # fmt: skip


class Grouped(Spelled):
    """A decoder with rotary rows and grouped queries; all of it fused on the other side."""

    task = "text"
    head = 16
    shared = 32  # rows of the keys and of the values

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Embedding(72, 64)}
        for k in range(2):
            out |= {f"{k}.norm1": nn.RMSNorm(64, 1e-6), f"{k}.norm2": nn.RMSNorm(64, 1e-6)}
            out |= {f"{k}.query": nn.Linear(64, 64, bias=False), f"{k}.key": nn.Linear(64, self.shared, bias=False)}
            out |= {f"{k}.value": nn.Linear(64, self.shared, bias=False), f"{k}.out": nn.Linear(64, 64, bias=False)}
            out |= {f"{k}.{n}": nn.Linear(64, 96, bias=False) for n in ("gate", "up")}
            out |= {f"{k}.down": nn.Linear(96, 64, bias=False)}
        return out | {"norm": nn.RMSNorm(64, 1e-6), "head": nn.Linear(64, 72, bias=False)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed", ids)
        for k in range(2):
            y = self.at(f"{k}.norm1", x)
            y = self.attend(*(self.at(f"{k}.{n}", y) for n in ("query", "key", "value")), causal=True, rotary=True)
            x = x + self.at(f"{k}.out", y)
            y = self.at(f"{k}.norm2", x)
            x = x + self.at(f"{k}.down", F.silu(self.at(f"{k}.gate", y)) * self.at(f"{k}.up", y))
        return self.at("head", self.at("norm", x))

    other: ClassVar = {
        "z0": "head",
        **repeated(
            2, "core.{}", {"p.0": "down", "p.1": "up+gate", "s.0": "out", "s.1": "query|R", "s.2": "value",
                         "s.3": "key|R",                           "r.0": "norm2", "r.1": "norm1"}, backwards=True,
        ),
        "z1": "norm",
        "z2": "embed",
    }  # fmt: skip


class ConvVAE(Spelled):
    """A variational autoencoder of convolutions with batch norms."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        return {
            "enc1": nn.Conv2d(1, 16, 3, 2, 1), "bn1": nn.BatchNorm2d(16), "enc2": nn.Conv2d(16, 16, 3, 2, 1),
            "bn2": nn.BatchNorm2d(16), "mu": nn.Linear(64, 8), "logvar": nn.Linear(64, 8), "lift": nn.Linear(8, 64),
            "dec1": nn.ConvTranspose2d(16, 16, 2, 2), "bn3": nn.BatchNorm2d(16),
            "dec2": nn.ConvTranspose2d(16, 16, 2, 2), "bn4": nn.BatchNorm2d(16),
            "out": nn.Conv2d(16, 1, 3, 1, 1),
        }  # fmt: skip

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0]
        h = F.relu(self.at("bn1", self.at("enc1", x)))
        h = F.relu(self.at("bn2", self.at("enc2", h))).flatten(1)
        mean, spread = self.at("mu", h), self.at("logvar", h)
        z = self.at("lift", mean + torch.randn_like(mean) * (spread / 2).exp()).unflatten(1, (16, 2, 2))
        z = F.relu(self.at("bn3", self.at("dec1", z)))
        z = self.at("out", F.relu(self.at("bn4", self.at("dec2", z))))
        likeness = F.binary_cross_entropy_with_logits(z, x, reduction="sum") / len(x)
        return likeness + 0.5 * (mean**2 + spread.exp() - 1 - spread).sum(1).mean()

    other: ClassVar = {
        "b.0": "bn4", "b.1": "bn2", "b.2": "bn3", "b.3": "bn1", "g": "out", "d.0": "dec2", "d.1": "dec1",
        "l.0": "logvar", "l.1": "lift", "l.2": "mu", "c.0": "enc2", "c.1": "enc1",
    }  # fmt: skip


class Summaries(Spelled):
    """A gated recurrent cell over rows, attention over its states, two tasks: the digit, and how much ink there is."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {f"into_{g}": nn.Linear(8, 24) for g in ("reset", "update", "new")}
        out |= {f"from_{g}": nn.Linear(24, 24) for g in ("reset", "update", "new")}
        out |= {"score1": nn.Linear(24, 24), "score2": nn.Linear(24, 1), "hidden": nn.Linear(24, 24)}
        return out | {"digit": nn.Linear(24, 10), "ink": nn.Linear(24, 1)}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, labels = batch
        h, states = x.new_zeros(len(x), 24), []
        for row in x[:, 0].unbind(1):
            reset, update = (
                (self.at(f"into_{g}", row) + self.at(f"from_{g}", h)).sigmoid() for g in ("reset", "update")
            )
            new = (self.at("into_new", row) + reset * self.at("from_new", h)).tanh()
            h = (1 - update) * new + update * h
            states.append(h)
        states = torch.stack(states, 1)
        share = self.at("score2", self.at("score1", states).tanh()).softmax(1)
        y = F.relu(self.at("hidden", (share * states).sum(1)))
        return F.cross_entropy(self.at("digit", y), labels) + F.mse_loss(self.at("ink", y)[:, 0], x.mean((1, 2, 3)) * 4)

    other: ClassVar = {
        "t2": "ink", "t1": "digit", "c.h": "from_new+from_reset+from_update", "c.i": "into_new+into_reset+into_update",
        "t0": "hidden", "a.1": "score1", "a.0": "score2",
    }  # fmt: skip


NETS = (
    PlainNet, ResNet, MobileNet, ClassToken, FeatureTokens, Perceiver, Convolved, Crossed, GatedExperts, Grouped,
    ConvVAE, Summaries,
)  # fmt: skip
