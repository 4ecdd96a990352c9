"""A third set: names that lie, shared layers, stacks of bare parameters, more depth, short training."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.proof.spelled import Made, Spelled, repeated, under
from benchmarks.proof.unseen_k import WIDTH, Grouped, Table, Vision, block, conv, run_block


class Liars(Vision):
    """A vision transformer whose layers have each other's names in the other code."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Conv2d(1, WIDTH, 2, 2), "pos": nn.Parameter(torch.randn(16, WIDTH) * 0.1)}
        for k in range(2):
            out |= block(k)
        return out | {"norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("embed", x).flatten(2).mT + self.at("pos")
        for k in range(2):
            x = run_block(self, k, x)
        return self.at("head", self.at("norm", x).mean(1))

    other: ClassVar = {
        "embed": "embed", "pos": "pos",
        **repeated(2, "{}", {"norm1": "norm2", "query": "value", "key": "proj", "value": "query", "proj": "key",
                             "norm2": "norm1", "fc1": "fc1", "fc2": "fc2"}),
        "norm": "norm", "head": "head",
    }  # fmt: skip


class Shared(Spelled):
    """One block that is run three times, as in Albert, on a factored table of letters."""

    task = "text"
    head = 16

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"letter": nn.Embedding(72, 24), "widen": nn.Linear(24, 64)}
        out |= {"place": nn.Embedding(48, 64)} | block(0, width=64, inner=96)
        return out | {"norm": nn.LayerNorm(64), "head": nn.Linear(64, 72)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("widen", self.at("letter", ids)) + self.at("place", torch.arange(ids.shape[1]))
        for _ in range(3):
            x = run_block(self, 0, x, causal=True)
        return self.at("head", self.at("norm", x))

    other: ClassVar = {
        "m.0": "head", "m.1": "widen", "m.2": "0.fc2", "m.3": "0.fc1", "g.0": "norm", "g.1": "0.norm1",
        "g.2": "0.norm2", "s.0": "0.value", "s.1": "0.proj", "s.2": "0.key", "s.3": "0.query", "e.0": "place",
        "e.1": "letter",
    }  # fmt: skip


class Stacked(Vision):
    """Four experts of bare matrices, stacked on the other side together with the scales of their norms."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": nn.Linear(64, WIDTH)}
        for k in range(2):
            out |= {f"{k}.scale": nn.Parameter(torch.ones(WIDTH)), f"{k}.gain": nn.Parameter(torch.ones(WIDTH))}
            out |= {f"{k}.norm": nn.LayerNorm(WIDTH), f"{k}.router": nn.Linear(WIDTH, 4)}
            out |= {f"{k}.{e}.up": nn.Linear(WIDTH, 24, bias=False) for e in range(4)}
            out |= {f"{k}.{e}.down": nn.Linear(24, WIDTH, bias=False) for e in range(4)}
        return out | {"head": nn.Linear(WIDTH, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("stem", x.flatten(1))
        for k in range(2):
            y = self.at(f"{k}.norm", x) * self.at(f"{k}.scale")
            share = self.at(f"{k}.router", y).softmax(-1)
            z = sum(share[:, e, None] * self.at(f"{k}.{e}.down", F.relu(self.at(f"{k}.{e}.up", y))) for e in range(4))
            x = x + z * self.at(f"{k}.gain")
        return self.at("head", x)

    other: ClassVar = {
        "i": "stem",
        **repeated(2, "l.{}", {"a": "3.down+2.down+1.down+0.down|S", "b": "3.up+2.up+1.up+0.up|S", "v": "gain+scale",
                               "q": "router", "r": "norm"}, backwards=True),
        "j": "head",
    }  # fmt: skip


class Deep(Table):
    """Six residual blocks, counted from the end, their norms behind the branch."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"into": nn.Linear(30, 32)}
        for k in range(6):
            out |= {f"{k}.up": nn.Linear(32, 48), f"{k}.down": nn.Linear(48, 32), f"{k}.norm": nn.LayerNorm(32)}
        return out | {"head": nn.Linear(32, 2)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("into", x)
        for k in range(6):
            x = x + self.at(f"{k}.norm", self.at(f"{k}.down", F.gelu(self.at(f"{k}.up", x))))
        return self.at("head", x)

    other: ClassVar = {
        "outlet": "head",
        **repeated(6, "t.{}", {"z": "norm", "y": "down|T", "x": "up|T"}, backwards=True),
        "inlet": "into",
    }


class Scrambled(Vision):
    """Four blocks of two convolutions whose numbers are in no order on the other side."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": conv(1, 12)}
        for k in range(4):
            out |= {f"{k}.conv1": conv(12, 12), f"{k}.bn1": nn.BatchNorm2d(12)}
            out |= {f"{k}.conv2": conv(12, 12), f"{k}.bn2": nn.BatchNorm2d(12)}
        return out | {"head": nn.Linear(12, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("stem", x)
        for k in range(4):
            y = F.relu(self.at(f"{k}.bn1", self.at(f"{k}.conv1", x)))
            x = F.relu(x + self.at(f"{k}.bn2", self.at(f"{k}.conv2", y)))
        return self.at("head", x.mean((2, 3)))

    _own: ClassVar = {"c": "conv2", "d": "conv1", "m": "bn1", "n": "bn2"}
    other: ClassVar = {
        "o": "head", **under("k.0", "2", _own), **under("k.1", "0", _own), **under("k.2", "3", _own),
        **under("k.3", "1", _own), "i": "stem",
    }  # fmt: skip


class Brief(Grouped):
    """A decoder with gates that was trained for a few seconds only."""

    steps = 80
    shared = 64

    other: ClassVar = {
        **repeated(2, "w{}", {"k1": "up", "k2": "down", "k3": "gate", "s": "value+query+key|4", "t": "out",
                              "n0": "norm2",                              "n1": "norm1"}, backwards=True),
        "v2": "embed", "v1": "norm", "v0": "head",
    }  # fmt: skip


class Recall(Vision):
    """A minimal gated unit in two layers over the rows, gate and candidate in layers of their own."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {}
        for k, into in enumerate((8, 24)):
            out |= {f"{k}.{a}_{b}": nn.Linear(c, 24) for a, c in (("x", into), ("h", 24)) for b in ("gate", "new")}
        return out | {"norm": nn.LayerNorm(24), "head": nn.Linear(24, 10)}

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0].unbind(1)
        for k in range(2):
            h, states = x.new_zeros(len(x), 24), []
            for row in rows:
                gate = (self.at(f"{k}.x_gate", row) + self.at(f"{k}.h_gate", h)).sigmoid()
                h = (1 - gate) * h + gate * (self.at(f"{k}.x_new", row) + self.at(f"{k}.h_new", gate * h)).tanh()
                states.append(h)
            rows = tuple(states)
        return self.at("head", self.at("norm", h))

    other: ClassVar = {
        "u": "head", "r.1": "0.h_new", "r.2": "1.h_gate", "r.3": "0.h_gate", "r.4": "1.h_new",
        "i.2": "1.x_new+1.x_gate",        "i.1": "0.x_new+0.x_gate", "w": "norm",
    }  # fmt: skip


class Halves(Spelled):
    """Two towers that share nothing: the picture's rows, and its upper half as a flat vector."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {}
        for side in ("a", "b"):
            out |= {
                f"{side}.fc1": nn.Linear(32, 48),
                f"{side}.bn": nn.BatchNorm1d(48),
                f"{side}.fc2": nn.Linear(48, 48),
            }
            out |= {f"{side}.gate": nn.Linear(48, 48), f"{side}.fc3": nn.Linear(48, 12)}
        return out | {"scale": nn.Parameter(torch.tensor([2.0]))}

    def tower(self, side: str, x: Tensor) -> Tensor:
        x = F.relu(self.at(f"{side}.bn", self.at(f"{side}.fc1", x)))
        return F.normalize(
            self.at(f"{side}.fc3", self.at(f"{side}.fc2", x) * self.at(f"{side}.gate", x).sigmoid()), dim=-1
        )

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0][:, 0]
        scores = self.tower("a", x[:, ::2].flatten(1)) @ self.tower("b", x[:, 1::2].flatten(1)).mT
        scores, own = scores * self.at("scale").exp(), torch.arange(len(x))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2

    _own: ClassVar = {"l1": "fc3", "l2": "gate", "l3": "fc2", "l4": "bn", "l5": "fc1"}
    other: ClassVar = {**under("t0", "b", _own), "tau": "scale", **under("t1", "a", _own)}


class Squeezed(Vision):
    """A convolutional classifier with group norms, two branches of other kernels that are added, dropout."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": nn.Conv2d(1, 16, 3, padding=1)}
        for k in range(2):
            out |= {f"{k}.wide": nn.Conv2d(16, 16, 5, padding=2), f"{k}.near": nn.Conv2d(16, 16, 3, padding=1)}
            out |= {f"{k}.point": nn.Conv2d(16, 16, 1)}
            out |= {f"{k}.norm{j}": nn.GroupNorm(4, 16) for j in range(3)}
        return out | {"fc1": nn.Linear(16, 16), "fc2": nn.Linear(16, 16), "head": nn.Linear(16, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("stem", x)
        for k in range(2):
            parts = [self.at(f"{k}.norm{j}", self.at(f"{k}.{n}", x)) for j, n in enumerate(("wide", "near", "point"))]
            x = F.max_pool2d(F.relu(x + sum(parts)), 2)
        x = F.dropout(x.mean((2, 3)), 0.1, self.training)
        return self.at("head", x + self.at("fc2", F.silu(self.at("fc1", x))))

    other: ClassVar = {
        **repeated(2, "j{}", {"n0": "norm2", "n1": "norm0", "n2": "norm1", "c2": "point", "c1": "near", "c0": "wide"},
                   backwards=True),
        "f0": "fc2|T", "f1": "fc1|T", "f2": "head|T", "f3": "stem",
    }  # fmt: skip


class Noise(Spelled):
    """A denoiser that is told how much noise there is, which scales and shifts its hidden layers."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"into": nn.Linear(64, 48), "time1": nn.Linear(16, 48), "time2": nn.Linear(48, 48)}
        for k in range(2):
            out |= {f"{k}.{n}": nn.Linear(48, 48) for n in ("fc1", "fc2", "scale", "shift")}
            out |= {f"{k}.norm": nn.LayerNorm(48)}
        return out | {"out": nn.Linear(48, 64)}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0].flatten(1)
        level = torch.rand(len(x), 1)
        noise = torch.randn_like(x)
        waves = level * torch.arange(1, 9)
        told = self.at("time2", F.silu(self.at("time1", torch.cat((waves.sin(), waves.cos()), -1))))
        y = self.at("into", (1 - level) * x + level * noise)
        for k in range(2):
            z = self.at(f"{k}.norm", y) * (1 + self.at(f"{k}.scale", told)) + self.at(f"{k}.shift", told)
            y = y + self.at(f"{k}.fc2", F.silu(self.at(f"{k}.fc1", z)))
        return F.mse_loss(self.at("out", y), noise)

    other: ClassVar = {
        "p": "out",
        **repeated(2, "s.{}", {"m": "shift+scale", "w2": "fc1", "w1": "fc2", "n": "norm"}, backwards=True),
        "t.0": "time2", "t.1": "time1", "q": "into",
    }  # fmt: skip


class Wide(Spelled):
    """A decoder of four blocks with two norms around each branch, gates first in a fused matrix, grouped queries."""

    task = "text"
    head = 16
    steps = 200

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Embedding(72, 64)}
        for k in range(4):
            out |= {f"{k}.norm{j}": nn.RMSNorm(64, 1e-6) for j in range(4)}
            out |= {f"{k}.query": nn.Linear(64, 64, bias=False), f"{k}.out": nn.Linear(64, 64, bias=False)}
            out |= {f"{k}.{n}": nn.Linear(64, 16, bias=False) for n in ("key", "value")}
            out |= {f"{k}.{n}": nn.Linear(64, 96, bias=False) for n in ("gate", "up")}
            out |= {f"{k}.down": nn.Linear(96, 64, bias=False)}
        return out | {"norm": nn.RMSNorm(64, 1e-6), "head": nn.Linear(64, 72, bias=False)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed", ids)
        for k in range(4):
            y = self.at(f"{k}.norm0", x)
            y = self.attend(*(self.at(f"{k}.{n}", y) for n in ("query", "key", "value")), causal=True, rotary=True)
            x = x + self.at(f"{k}.norm1", self.at(f"{k}.out", y))
            y = self.at(f"{k}.norm2", x)
            y = self.at(f"{k}.down", F.gelu(self.at(f"{k}.gate", y)) * self.at(f"{k}.up", y))
            x = x + self.at(f"{k}.norm3", y)
        return self.at("head", self.at("norm", x))

    other: ClassVar = {
        "c": "embed",
        **repeated(4, "d.{}", {"h0": "norm3", "h1": "norm2", "h2": "norm1", "h3": "norm0", "w0": "gate+up",
                               "w1": "down",                               "w2": "key+value+query|1", "w3": "out"}),
        "b": "norm",
        "a": "head",
    }  # fmt: skip


NETS = (Liars, Shared, Stacked, Deep, Scrambled, Brief, Recall, Halves, Squeezed, Noise, Wide)
