"""A second set of pairs that was written before the code that was judged by it had seen any: other structures."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.proof.spelled import Made, Spelled, repeated, under
from benchmarks.proof.unseen_k import WIDTH, Table, Vision, block, conv, run_block


class DenseNet(Vision):
    """Each layer reads what all before it have put out."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": conv(1, 16)}
        for k in range(4):
            out |= {f"bn{k}": nn.BatchNorm2d(16 + 8 * k), f"conv{k}": conv(16 + 8 * k, 8)}
        return out | {"norm": nn.BatchNorm2d(48), "fc1": nn.Linear(48, 48), "fc2": nn.Linear(48, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("stem", x)
        for k in range(4):
            x = torch.cat((x, self.at(f"conv{k}", F.relu(self.at(f"bn{k}", x)))), 1)
        x = F.relu(self.at("norm", x)).mean((2, 3))
        return self.at("fc2", F.silu(self.at("fc1", x)))

    other: ClassVar = {
        "w5": "fc2", "w4": "fc1|T", "u.3": "conv3", "u.1": "conv1", "v.2": "bn2", "v.0": "bn0", "w1": "stem",
        "u.2": "conv2", "u.0": "conv0", "v.3": "bn3", "v.1": "bn1", "w2": "norm",
    }  # fmt: skip


class PostNorm(Spelled):
    """A decoder with norms behind the branches and a position table."""

    task = "text"
    head = 16

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"word": nn.Embedding(72, 64), "place": nn.Embedding(48, 64)}
        for k in range(2):
            out |= block(k, width=64, inner=64)
        return out | {"head": nn.Linear(64, 72)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("word", ids) + self.at("place", torch.arange(ids.shape[1]))
        for k in range(2):
            y = self.attend(*(self.at(f"{k}.{n}", x) for n in ("query", "key", "value")), causal=True)
            x = self.at(f"{k}.norm1", x + self.at(f"{k}.proj", y))
            x = self.at(f"{k}.norm2", x + self.at(f"{k}.fc2", F.gelu(self.at(f"{k}.fc1", x))))
        return self.at("head", x)

    other: ClassVar = {
        **repeated(
            2, "u{}", {"c0": "fc1", "c1": "proj", "c2": "fc2", "c3": "key+query+value", "d0": "norm2", "d1": "norm1"},
            backwards=True,
        ),
        "e1": "place",
        "e0": "word",
        "e2": "head",
    }  # fmt: skip


class Translator(Spelled):
    """An encoder of the first half of a line, a decoder of the second that reads it by cross attention."""

    task = "text"
    head = 12

    def layers(self) -> dict[str, Made]:
        width = 48
        out: dict[str, Made] = {"word": nn.Embedding(72, width), "place": nn.Parameter(torch.randn(25, width) * 0.1)}
        for k in (0, 1, 2, 3):
            out |= block(k, width=width, inner=64, bias=False)
        for k in (2, 3):
            out |= {f"{k}.norm3": nn.LayerNorm(width)}
            out |= {f"{k}.cross_{n}": nn.Linear(width, width, False) for n in ("query", "key", "value", "proj")}
        return out | {"norm": nn.LayerNorm(width), "head": nn.Linear(width, 72)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("word", ids) + torch.cat((self.at("place"), self.at("place")))[: ids.shape[1]]
        memory, y = x[:, :24], x[:, 24:]
        for k in (0, 1):
            memory = run_block(self, k, memory)
        for k in (2, 3):
            z = self.at(f"{k}.norm3", y)
            z = self.attend(
                self.at(f"{k}.cross_query", z), self.at(f"{k}.cross_key", memory), self.at(f"{k}.cross_value", memory)
            )
            y = run_block(self, k, y + self.at(f"{k}.cross_proj", z), causal=True)
        return self.at("head", self.at("norm", y))

    def loss(self, batch: list[Tensor]) -> Tensor:
        ids = batch[0]
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 25:].flatten())

    _own: ClassVar = {"n.0": "norm2", "n.1": "norm1", "s.q": "query", "s.k": "key", "s.v": "value", "s.o": "proj",
                      "g.0": "fc1", "g.1": "fc2"}  # fmt: skip
    _crossed: ClassVar = {
        "n.2": "norm3",
        "x.q": "cross_query",
        "x.k": "cross_key",
        "x.v": "cross_value",
        "x.o": "cross_proj",
    }
    other: ClassVar = {
        "t": "head",
        **under("r.0", "0", _own),
        **under("r.1", "1", _own),
        **under("w.0", "2", _own | _crossed),
        **under("w.1", "3", _own | _crossed),
        "p": "place",
        "z": "norm",
        "y": "word",
    }


class DoubleUNet(Vision):
    """A U-Net of double convolutions with batch norms that finds the strokes under noise."""

    task = "segment"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {}
        for name, a, b in (("down1", 1, 8), ("down2", 8, 16), ("mid", 16, 16), ("up2", 32, 8), ("up1", 16, 8)):
            out |= {f"{name}.conv1": conv(a, b), f"{name}.bn1": nn.BatchNorm2d(b)}
            out |= {f"{name}.conv2": conv(b, b), f"{name}.bn2": nn.BatchNorm2d(b)}
        return out | {"out": nn.Conv2d(8, 1, 1)}

    def double(self, name: str, x: Tensor) -> Tensor:
        x = F.relu(self.at(f"{name}.bn1", self.at(f"{name}.conv1", x)))
        return F.relu(self.at(f"{name}.bn2", self.at(f"{name}.conv2", x)))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0]
        a = self.double("down1", x + 0.3 * torch.randn_like(x))
        b = self.double("down2", F.max_pool2d(a, 2))
        c = self.double("mid", F.max_pool2d(b, 2))
        b = self.double("up2", torch.cat((F.interpolate(c, scale_factor=2), b), 1))
        a = self.double("up1", torch.cat((a, F.interpolate(b, scale_factor=2)), 1))
        return F.binary_cross_entropy_with_logits(self.at("out", a), (x > 0.4).float())

    other: ClassVar = {
        "f0": "mid.conv2", "f1": "up1.bn2", "f2": "down2.bn1", "f3": "up2.conv1", "f4": "down1.conv2", "f5": "mid.bn1",
        "f6": "out", "f7": "up2.bn2", "f8": "down2.conv2", "f9": "up1.conv2", "f10": "down1.bn1", "f11": "up1.bn1",
        "f12": "mid.conv1", "f13": "down1.conv1", "f14": "up2.conv2", "f15": "down2.bn2", "f16": "up1.conv1",
        "f17": "down1.bn2", "f18": "mid.bn2", "f19": "down2.conv1", "f20": "up2.bn1",
    }  # fmt: skip


class Mixed(Vision):
    """A mixer whose tokens and channels are as many."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"patch": nn.Linear(4, 16)}
        for k in range(3):
            out |= {f"{k}.norm1": nn.LayerNorm(16), f"{k}.norm2": nn.LayerNorm(16)}
            for n in ("token", "channel"):
                out |= {f"{k}.{n}1": nn.Linear(16, 32), f"{k}.{n}2": nn.Linear(32, 16)}
        return out | {"norm": nn.LayerNorm(16), "head": nn.Linear(16, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("patch", x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(2, 3)[:, 0])
        for k in range(3):
            y = self.at(f"{k}.norm1", x).mT
            x = x + self.at(f"{k}.token2", F.gelu(self.at(f"{k}.token1", y))).mT
            x = x + self.at(f"{k}.channel2", F.gelu(self.at(f"{k}.channel1", self.at(f"{k}.norm2", x))))
        return self.at("head", self.at("norm", x).mean(1))

    other: ClassVar = {
        **repeated(
            3, "deck.{}", {"m1": "channel2", "m2": "token2|T", "l2": "norm1", "m3": "channel1", "m4": "token1|T",
                           "l1": "norm2"}, backwards=True,
        ),
        "q2": "head",
        "q1": "norm",
        "q0": "patch|C",
    }  # fmt: skip


class LeftRight(Spelled):
    """Two towers of attention, one for each half of a picture, that learn which halves belong together."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {}
        for side in ("left", "right"):
            out |= {f"{side}.embed": nn.Linear(4, WIDTH), f"{side}.pos": nn.Parameter(torch.randn(8, WIDTH) * 0.2)}
            out |= {f"{side}.{name}": made for name, made in block(0).items()}
            out |= {f"{side}.out": nn.Linear(WIDTH, 16)}
        return out | {"scale": nn.Parameter(torch.tensor([2.0]))}

    def tower(self, side: str, x: Tensor) -> Tensor:
        x = self.at(f"{side}.embed", x) + self.at(f"{side}.pos")
        return F.normalize(self.at(f"{side}.out", run_block(self, f"{side}.0", x).mean(1)), dim=-1)

    def loss(self, batch: list[Tensor]) -> Tensor:
        left, right = batch[0][:, 0].chunk(2, -1)
        scores = self.tower("left", left) @ self.tower("right", right).mT * self.at("scale").exp()
        own = torch.arange(len(scores))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2

    _own: ClassVar = {"v1": "0.norm2", "v2": "0.norm1", "v3": "out", "v4": "embed", "v5": "0.proj",
                      "v6": "0.key+0.value+0.query", "v7": "0.fc2", "v8": "0.fc1", "v9": "pos"}  # fmt: skip
    other: ClassVar = {"d": "scale", **under("aa", "right", _own), **under("bb", "left", _own)}


class DeepAuto(Spelled):
    """An autoencoder whose hidden layers are all of one shape."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"into": nn.Linear(64, 40)}
        out |= {f"enc{k}": nn.Linear(40, 40) for k in range(2)} | {"code": nn.Linear(40, 6), "lift": nn.Linear(6, 40)}
        out |= {f"dec{k}": nn.Linear(40, 40) for k in range(2)}
        return out | {"enc_norm": nn.LayerNorm(40), "dec_norm": nn.LayerNorm(40), "out": nn.Linear(40, 64)}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0].flatten(1)
        y = F.silu(self.at("into", x))
        for k in range(2):
            y = F.silu(self.at(f"enc{k}", y))
        y = F.silu(self.at("lift", self.at("code", self.at("enc_norm", y))))
        for k in range(2):
            y = F.silu(self.at(f"dec{k}", y))
        return F.mse_loss(self.at("out", self.at("dec_norm", y)), x)

    other: ClassVar = {
        "s3": "dec0", "s1": "enc1", "t1": "dec_norm", "s4": "enc0", "r0": "out|T", "r1": "lift", "t2": "enc_norm",
        "r2": "code", "s2": "dec1", "r3": "into|T",
    }  # fmt: skip


class Waves(Vision):
    """Gated dilated convolutions over the pixels in a row, with residual and skip connections."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"inlet": nn.Conv1d(8, 16, 1)}
        for k in range(4):
            out |= {f"{k}.{n}": nn.Conv1d(16, 16, 3, padding=1) for n in ("filter", "gate")}
            out |= {f"{k}.{n}": nn.Conv1d(16, 16, 1) for n in ("residual", "skip")}
        return out | {"end": nn.Conv1d(16, 16, 1), "head": nn.Linear(16, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("inlet", x[:, 0])
        total = 0
        for k in range(4):
            y = self.at(f"{k}.filter", x).tanh() * self.at(f"{k}.gate", x).sigmoid()
            x, total = x + self.at(f"{k}.residual", y), total + self.at(f"{k}.skip", y)
        return self.at("head", F.relu(self.at("end", F.relu(total))).mean(-1))

    other: ClassVar = {
        **repeated(4, "cells.{}", {"j": "gate", "k": "skip", "l": "filter", "m": "residual"}, backwards=True),
        "a2": "head",
        "a1": "end",
        "a0": "inlet",
    }


class Parallel(Spelled):
    """A decoder whose branches read one norm, with rotary rows in a fused projection that alternates by head."""

    task = "text"
    head = 16

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Embedding(72, 64)}
        for k in range(3):
            own = block(k, width=64, inner=64)
            out |= {name: made for name, made in own.items() if not name.endswith("norm2")}
        return out | {"norm": nn.LayerNorm(64), "head": nn.Linear(64, 72)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed", ids)
        for k in range(3):
            y = self.at(f"{k}.norm1", x)
            z = self.attend(*(self.at(f"{k}.{n}", y) for n in ("query", "key", "value")), causal=True, rotary=True)
            x = x + self.at(f"{k}.proj", z) + self.at(f"{k}.fc2", F.gelu(self.at(f"{k}.fc1", y)))
        return self.at("head", self.at("norm", x))

    other: ClassVar = {
        "o0": "norm",
        **repeated(3, "x.{}", {"b1": "fc2", "b2": "fc1", "b3": "proj", "b4": "query+key+value|4", "b5": "norm1"}),
        "o1": "head",
        "o2": "embed",
    }


class Next(Vision):
    """Depthwise convolutions, norms over channels, a scale for each branch; two widths."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": nn.Conv2d(1, 16, 2, 2), "down": nn.Conv2d(16, 24, 2, 2)}
        for s, width in enumerate((16, 24)):
            for k in range(2):
                out |= {f"{s}.{k}.depth": nn.Conv2d(width, width, 3, padding=1, groups=width)}
                out |= {f"{s}.{k}.norm": nn.LayerNorm(width), f"{s}.{k}.up": nn.Linear(width, 2 * width)}
                out |= {f"{s}.{k}.back": nn.Linear(2 * width, width)}
                out |= {f"{s}.{k}.gamma": nn.Parameter(torch.full((width,), 0.5))}
        return out | {"norm": nn.LayerNorm(24), "head": nn.Linear(24, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("stem", x)
        for s in range(2):
            for k in range(2):
                y = self.at(f"{s}.{k}.norm", self.at(f"{s}.{k}.depth", x).movedim(1, -1))
                y = self.at(f"{s}.{k}.back", F.gelu(self.at(f"{s}.{k}.up", y))) * self.at(f"{s}.{k}.gamma")
                x = x + y.movedim(-1, 1)
            x = self.at("down", x) if s == 0 else x
        return self.at("head", self.at("norm", x.mean((2, 3))))

    _own: ClassVar = {"p0": "gamma", "p1": "back", "p2": "up|C", "p3": "norm", "p4": "depth"}
    other: ClassVar = {
        "zz": "head",
        **under("ga.1", "1.0", _own),
        **under("ga.0", "1.1", _own),
        **under("gb.1", "0.0", _own),
        **under("gb.0", "0.1", _own),
        "yy": "norm",
        "xx": "down",
        "ww": "stem",
    }


class TableRes(Table):
    """Residual blocks of two square layers behind batch norms."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"into": nn.Linear(30, 24)}
        for k in range(3):
            out |= {f"{k}.bn": nn.BatchNorm1d(24), f"{k}.fc1": nn.Linear(24, 24), f"{k}.fc2": nn.Linear(24, 24)}
        return out | {"bn": nn.BatchNorm1d(24), "head": nn.Linear(24, 2)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("into", x)
        for k in range(3):
            x = x + self.at(f"{k}.fc2", F.relu(self.at(f"{k}.fc1", self.at(f"{k}.bn", x))))
        return self.at("head", F.relu(self.at("bn", x)))

    other: ClassVar = {
        "c": "head",
        "b": "bn",
        **repeated(3, "h{}", {"g1": "fc2|T", "g2": "fc1|T", "g0": "bn"}, backwards=True),
        "a": "into",
    }


class BothWays(Vision):
    """Two cells with four gates that read the rows from either end."""

    def layers(self) -> dict[str, Made]:
        return {
            "forth": nn.LSTMCell(8, 20), "back": nn.LSTMCell(8, 20), "mix": nn.Linear(40, 40),
            "gate": nn.Linear(40, 40), "head": nn.Linear(40, 10),
        }  # fmt: skip

    def read(self, cell: str, rows: list[Tensor]) -> Tensor:
        state = (rows[0].new_zeros(len(rows[0]), 20), rows[0].new_zeros(len(rows[0]), 20))
        for row in rows:
            state = self._at[cell](row, state)
        return state[0]

    def forward(self, x: Tensor) -> Tensor:
        rows = list(x[:, 0].unbind(1))
        y = torch.cat((self.read("forth", rows), self.read("back", rows[::-1])), -1)
        return self.at("head", self.at("mix", y).relu() * self.at("gate", y).sigmoid())

    other: ClassVar = {"d1": "gate", "c1": "back", "d2": "mix|T", "d3": "head", "c2": "forth"}


NETS = (
    DenseNet, PostNorm, Translator, DoubleUNet, Mixed, LeftRight, DeepAuto, Waves, Parallel, Next, TableRes, BothWays,
)  # fmt: skip
