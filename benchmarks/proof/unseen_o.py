"""A fifth set, of kinds that were known to be open: bare vectors of gates, recurrent convolutions, many blocks."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.proof.spelled import Made, Spelled, under
from benchmarks.proof.unseen_k import Table, Vision, block, run_block

GATES = ("input", "forget", "cell", "output")


class Peephole(Vision):
    """A cell with four gates that see the cell, each in layers of its own, over the rows of a picture."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {f"x_{g}": nn.Linear(8, 24) for g in GATES}
        out |= {f"h_{g}": nn.Linear(24, 24, bias=False) for g in GATES}
        out |= {f"peep_{g}": nn.Parameter(torch.randn(24) * 0.1) for g in GATES if g != "cell"}
        return out | {"head": nn.Linear(24, 10)}

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 24)
        for row in x[:, 0].unbind(1):
            i, f, g, o = (self.at(f"x_{n}", row) + self.at(f"h_{n}", h) for n in GATES)
            i, f = (i + self.at("peep_input") * c).sigmoid(), (f + self.at("peep_forget") * c).sigmoid()
            c = f * c + i * g.tanh()
            h = (o + self.at("peep_output") * c).sigmoid() * c.tanh()
        return self.at("head", h)

    other: ClassVar = {
        "decoder": "head", "cell.W": "x_forget+x_input+x_output+x_cell", "cell.U": "h_forget+h_input+h_output+h_cell",
        "cell.p0": "peep_output", "cell.p1": "peep_forget", "cell.p2": "peep_input",
    }  # fmt: skip


class Recurrent(Vision):
    """A gated recurrent cell of convolutions that looks at a picture three times."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": nn.Conv2d(1, 12, 3, padding=1)}
        out |= {f"cell.{n}_gate": nn.Conv2d(24, 12, 3, padding=1) for n in ("reset", "update", "out")}
        return out | {"fc": nn.Linear(12, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.at("stem", x))
        h = torch.zeros_like(x)
        for _ in range(3):
            both = torch.cat((x, h), 1)
            r, z = self.at("cell.reset_gate", both).sigmoid(), self.at("cell.update_gate", both).sigmoid()
            h = (1 - z) * h + z * self.at("cell.out_gate", torch.cat((x, r * h), 1)).tanh()
        return self.at("fc", h.amax((2, 3)))

    other: ClassVar = {
        "readout": "fc", "gru.conv_h": "cell.out_gate", "gru.conv_z": "cell.update_gate",
        "gru.conv_r": "cell.reset_gate", "embed": "stem",
    }  # fmt: skip


class Twins(Spelled):
    """Two views of a picture whose features should agree and not repeat each other (Barlow twins)."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"backbone.0": nn.Linear(64, 48), "backbone.1": nn.BatchNorm1d(48)}
        out |= {"backbone.3": nn.Linear(48, 48), "projector.0": nn.Linear(48, 48, bias=False)}
        out |= {"projector.1": nn.BatchNorm1d(48), "projector.3": nn.Linear(48, 48, bias=False)}
        return out | {"projector.4": nn.BatchNorm1d(48), "projector.6": nn.Linear(48, 24, bias=False)}

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.at("backbone.1", self.at("backbone.0", x)))
        x = self.at("backbone.3", x)
        for k in (0, 3):
            x = F.relu(self.at(f"projector.{k + 1}", self.at(f"projector.{k}", x)))
        x = self.at("projector.6", x)
        return (x - x.mean(0)) / (x.std(0) + 1e-4)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0].flatten(1)
        one, other = (self.features(x + 0.1 * torch.randn_like(x)) for _ in range(2))
        c = one.mT @ other / len(x)
        same = c.diagonal()
        return (1 - same).square().sum() + 0.02 * (c.square().sum() - same.square().sum())

    other: ClassVar = {
        "proj.out": "projector.6", "proj.hidden2.norm": "projector.4", "proj.hidden2.linear": "projector.3",
        "proj.hidden1.norm": "projector.1", "proj.hidden1.linear": "projector.0|T", "encoder.last": "backbone.3|T",
        "encoder.norm": "backbone.1", "encoder.first": "backbone.0",
    }  # fmt: skip


class Attending(Vision):
    """Graph attention with two linear layers of one shape (GATv2) over the pixels and their neighbours."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Linear(1, 32), "place": nn.Parameter(torch.randn(64, 32) * 0.3)}
        for k in range(2):
            out |= {f"convs.{k}.lin_l": nn.Linear(32, 32), f"convs.{k}.lin_r": nn.Linear(32, 32)}
            out |= {f"convs.{k}.att": nn.Parameter(torch.randn(32) * 0.2), f"norms.{k}": nn.LayerNorm(32)}
        return out | {"lin": nn.Linear(32, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("embed", x.flatten(1)[..., None]) + self.at("place")
        y, z = torch.arange(64) // 8, torch.arange(64) % 8
        far = ((y[:, None] - y).abs() + (z[:, None] - z).abs()) > 2
        for k in range(2):
            left, right = self.at(f"convs.{k}.lin_l", x), self.at(f"convs.{k}.lin_r", x)
            scores = F.leaky_relu(left[:, None] + right[:, :, None], 0.2) @ self.at(f"convs.{k}.att")
            share = scores.masked_fill(far, -1e9).softmax(-1)
            x = self.at(f"norms.{k}", x + F.elu(share @ left))
        return self.at("lin", x.mean(1))

    other: ClassVar = {
        "out": "lin",
        **{f"layer.{k}.{name}": f"convs.{k}.{role}" for k in range(2)
           for name, role in (("a", "att"), ("dst", "lin_r"), ("src", "lin_l"))},
        "ln.0": "norms.0", "ln.1": "norms.1", "pe": "place", "inp": "embed",
    }  # fmt: skip


class Masked(Spelled):
    """An autoencoder of a quarter of a picture's patches (MAE): an encoder of two blocks, a decoder of one."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"patch": nn.Linear(4, 32), "pos": nn.Parameter(torch.randn(16, 32) * 0.2)}
        out |= block(0) | block(1) | {"norm": nn.LayerNorm(32), "bridge": nn.Linear(32, 32)}
        out |= {"mask": nn.Parameter(torch.randn(32) * 0.2), "pos2": nn.Parameter(torch.randn(16, 32) * 0.2)}
        return out | block(2) | {"norm2": nn.LayerNorm(32), "predict": nn.Linear(32, 4)}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = F.unfold(batch[0], 2, stride=2).mT
        order = torch.rand(len(x), 16).argsort(1)
        seen = order[:, :8, None].expand(-1, -1, 32)
        y = (self.at("patch", x) + self.at("pos")).gather(1, seen)
        for k in (0, 1):
            y = run_block(self, k, y)
        y = self.at("bridge", self.at("norm", y))
        z = self.at("mask").expand(len(x), 16, 32).scatter(1, seen, y) + self.at("pos2")
        z = self.at("predict", self.at("norm2", run_block(self, 2, z)))
        gap = (z - x).square().mean(-1)
        return gap.gather(1, order[:, 8:]).mean()

    _own: ClassVar = {"ln_a": "norm1", "att.qkv": "query+key+value", "att.out": "proj", "ln_b": "norm2",
                      "up": "fc1", "down": "fc2"}  # fmt: skip
    other: ClassVar = {
        "decoder.pred": "predict", "decoder.norm": "norm2", **under("decoder.blocks.0", "2", _own),
        "decoder.pos_embed": "pos2", "decoder.mask_token": "mask", "decoder.embed": "bridge",
        "encoder.norm": "norm", **under("encoder.blocks.0", "0", _own), **under("encoder.blocks.1", "1", _own),
        "encoder.pos_embed": "pos", "encoder.patch_embed": "patch",
    }  # fmt: skip


class Sets(Vision):
    """A set transformer over the lit pixels: two blocks among themselves, pooling by a learned query, a last block."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Linear(3, 32), "seed": nn.Parameter(torch.randn(1, 32) * 0.3)}
        for at in ("enc0", "enc1", "pool", "dec"):
            out |= {f"{at}.fc_{n}": nn.Linear(32, 32) for n in "qkvo"}
            out |= {f"{at}.ln0": nn.LayerNorm(32), f"{at}.ln1": nn.LayerNorm(32)}
        return out | {"head": nn.Linear(32, 10)}

    def mab(self, at: str, x: Tensor, y: Tensor) -> Tensor:
        q = self.at(f"{at}.fc_q", x)
        z = self.at(f"{at}.ln0", q + self.attend(q, self.at(f"{at}.fc_k", y), self.at(f"{at}.fc_v", y)))
        return self.at(f"{at}.ln1", z + F.relu(self.at(f"{at}.fc_o", z)))

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij"), -1)
        x = torch.cat((x.flatten(1)[..., None], grid.flatten(0, 1).expand(len(x), -1, -1)), -1)
        x = self.at("embed", x)
        for at in ("enc0", "enc1"):
            x = self.mab(at, x, x)
        x = self.mab("pool", self.at("seed").expand(len(x), 1, 32), x)
        return self.at("head", self.mab("dec", x, x)[:, 0])

    _own: ClassVar = {"norm.0": "ln0", "norm.1": "ln1", "out": "fc_o", "val": "fc_v", "key": "fc_k", "query": "fc_q"}
    other: ClassVar = {
        "classifier": "head", **under("decoder.0", "pool", _own), **under("decoder.1", "dec", _own),
        **under("encoder.0", "enc0", _own), **under("encoder.1", "enc1", _own), "inducing": "seed",
        "lift": "embed",
    }  # fmt: skip


class Shuffled(Table):
    """Six residual blocks whose numbers are in no order on the other side."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": nn.Linear(30, 24)}
        for k in range(6):
            out |= {f"{k}.norm": nn.LayerNorm(24), f"{k}.up": nn.Linear(24, 36), f"{k}.down": nn.Linear(36, 24)}
        return out | {"head": nn.Linear(24, 2)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("stem", x)
        for k in range(6):
            x = x + self.at(f"{k}.down", F.gelu(self.at(f"{k}.up", self.at(f"{k}.norm", x))))
        return self.at("head", x)

    other: ClassVar = {
        "last": "head",
        **{f"b.{k}.{name}": f"{number}.{role}" for k, number in enumerate((3, 0, 5, 1, 4, 2))
           for name, role in (("w1", "up"), ("w2", "down"), ("g", "norm"))},
        "first": "stem",
    }  # fmt: skip


class Liar(Spelled):
    """A variational autoencoder whose names lie: mean and spread, encoder and decoder are each other's."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"encoder.0": nn.Linear(64, 40), "encoder.1": nn.Linear(40, 40)}
        out |= {"mu": nn.Linear(40, 8), "logvar": nn.Linear(40, 8), "widen": nn.Linear(8, 40)}
        return out | {"decoder.0": nn.Linear(40, 40), "decoder.1": nn.Linear(40, 64)}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0].flatten(1)
        y = F.relu(self.at("encoder.1", F.relu(self.at("encoder.0", x))))
        mean, spread = self.at("mu", y), self.at("logvar", y)
        z = mean + torch.randn_like(mean) * (spread / 2).exp()
        z = self.at("decoder.1", F.relu(self.at("decoder.0", F.relu(self.at("widen", z)))))
        likeness = F.binary_cross_entropy_with_logits(z, x, reduction="sum") / len(x)
        return likeness + 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1).mean()

    other: ClassVar = {
        "encoder.0": "encoder.0", "encoder.1": "decoder.0", "mu": "logvar", "logvar": "mu", "widen": "widen",
        "decoder.0": "encoder.1", "decoder.1": "decoder.1",
    }  # fmt: skip


NETS = (Peephole, Recurrent, Twins, Attending, Masked, Sets, Shuffled, Liar)
