"""A fourth set, written before the code that was judged by it had seen any: names as in public code."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.proof.spelled import Made, Spelled, under
from benchmarks.proof.unseen_k import Vision

SIZE = 40


class Capsules(Vision):
    """Capsules that route by agreement, and a decoder of the digit from the strongest."""

    def layers(self) -> dict[str, Made]:
        return {
            "conv": nn.Conv2d(1, 24, 3, padding=1), "primary": nn.Conv2d(24, 24, 3, stride=2),
            "route": nn.Parameter(torch.randn(10, 27, 8, 6) * 0.1), "decoder.0": nn.Linear(60, 60),
            "decoder.2": nn.Linear(60, 60), "decoder.4": nn.Linear(60, 64),
        }  # fmt: skip

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = (
            self.at("primary", F.relu(self.at("conv", batch[0])))
            .unflatten(1, (3, 8))
            .permute(0, 1, 3, 4, 2)
            .flatten(1, 3)
        )
        x = x / (1 + x.norm(dim=-1, keepdim=True))
        votes = torch.einsum("bic,kicd->bkid", x, self.at("route"))
        logits = votes.new_zeros(votes.shape[:3])
        for _ in range(2):
            pose = (logits.softmax(1)[..., None] * votes).sum(2)
            pose = pose * pose.norm(dim=-1, keepdim=True) / (1 + pose.square().sum(-1, keepdim=True))
            logits = logits + (votes * pose[:, :, None]).sum(-1)
        length, own = pose.norm(dim=-1), F.one_hot(batch[1], 10)
        margin = own * F.relu(0.9 - length).square() + 0.5 * (1 - own) * F.relu(length - 0.1).square()
        y = (pose * own[..., None]).flatten(1)
        y = self.at("decoder.4", F.relu(self.at("decoder.2", F.relu(self.at("decoder.0", y)))))
        return margin.sum(1).mean() + F.mse_loss(y, batch[0].flatten(1))

    other: ClassVar = {
        "reconstruct.layer3": "decoder.4", "reconstruct.layer2": "decoder.2", "reconstruct.layer1": "decoder.0",
        "digitcaps": "route", "primarycaps": "primary", "stem": "conv",
    }  # fmt: skip


class Squeeze(Vision):
    """Residual blocks with squeeze and excitation, three of one shape."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"conv1": nn.Conv2d(1, 16, 3, padding=1, bias=False), "bn1": nn.BatchNorm2d(16)}
        for k in range(3):
            for j in (1, 2):
                out |= {f"layer{k}.conv{j}": nn.Conv2d(16, 16, 3, padding=1, bias=False)}
                out |= {f"layer{k}.bn{j}": nn.BatchNorm2d(16)}
            out |= {f"layer{k}.se.fc1": nn.Conv2d(16, 4, 1), f"layer{k}.se.fc2": nn.Conv2d(4, 16, 1)}
        return out | {"fc": nn.Linear(16, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.at("bn1", self.at("conv1", x)))
        for k in range(3):
            y = F.relu(self.at(f"layer{k}.bn1", self.at(f"layer{k}.conv1", x)))
            y = self.at(f"layer{k}.bn2", self.at(f"layer{k}.conv2", y))
            s = self.at(f"layer{k}.se.fc2", F.relu(self.at(f"layer{k}.se.fc1", y.mean((2, 3), keepdim=True))))
            x = F.relu(x + y * s.sigmoid())
            x = F.max_pool2d(x, 2) if k == 0 else x
        return self.at("fc", x.mean((2, 3)))

    _own: ClassVar = {"gate.squeeze": "se.fc1", "gate.excite": "se.fc2", "norms.1": "bn2", "norms.0": "bn1",
                      "filters.1": "conv2", "filters.0": "conv1"}  # fmt: skip
    other: ClassVar = {
        "classifier": "fc", **under("trunk.0", "layer0", _own), **under("trunk.1", "layer1", _own),
        **under("trunk.2", "layer2", _own), "entry.norm": "bn1", "entry.filter": "conv1",
    }  # fmt: skip


class SpatialGate(Vision):
    """A gated perceptron over patches (gMLP) of three blocks."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"patch_embed": nn.Conv2d(1, SIZE, 2, 2)}
        for k in range(3):
            at = f"blocks.{k}"
            out |= {f"{at}.norm": nn.LayerNorm(SIZE), f"{at}.fc1": nn.Linear(SIZE, 2 * SIZE)}
            out |= {f"{at}.sgu.norm": nn.LayerNorm(SIZE), f"{at}.sgu.proj": nn.Linear(16, 16)}
            out |= {f"{at}.fc2": nn.Linear(SIZE, SIZE)}
        return out | {"norm": nn.LayerNorm(SIZE), "head": nn.Linear(SIZE, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("patch_embed", x).flatten(2).mT
        for k in range(3):
            at = f"blocks.{k}"
            u, v = F.gelu(self.at(f"{at}.fc1", self.at(f"{at}.norm", x))).chunk(2, -1)
            v = self.at(f"{at}.sgu.proj", self.at(f"{at}.sgu.norm", v).mT).mT
            x = x + self.at(f"{at}.fc2", u * (v + 1))
        return self.at("head", self.at("norm", x).mean(1))

    other: ClassVar = {
        "stem": "patch_embed",
        **{
            f"stages.{2 - k}.{name}": f"blocks.{k}.{role}"
            for k in (2, 1, 0)
            for name, role in (("out", "fc2|T"), ("mix", "sgu.proj|T"), ("b", "sgu.norm"), ("a", "norm"),
                               ("in", "fc1|T"))
        },
        "classify": "head", "last": "norm",
    }  # fmt: skip


class Fourier(Spelled):
    """Fourier transforms in place of attention, over letters some of which are hidden."""

    task = "text"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {
            "embeddings.word": nn.Embedding(73, SIZE),
            "embeddings.position": nn.Embedding(49, SIZE),
        }
        out |= {"embeddings.LayerNorm": nn.LayerNorm(SIZE)}
        for k in range(3):
            out |= {f"encoder.{k}.fourier.norm": nn.LayerNorm(SIZE), f"encoder.{k}.dense": nn.Linear(SIZE, SIZE)}
            out |= {f"encoder.{k}.output": nn.Linear(SIZE, SIZE), f"encoder.{k}.norm": nn.LayerNorm(SIZE)}
        return out | {"transform": nn.Linear(SIZE, SIZE), "predict": nn.Linear(SIZE, 72)}

    def loss(self, batch: list[Tensor]) -> Tensor:
        ids = batch[0]
        hidden = torch.rand(ids.shape) < 0.15
        x = self.at("embeddings.word", ids.masked_fill(hidden, 72))
        x = self.at("embeddings.LayerNorm", x + self.at("embeddings.position", torch.arange(ids.shape[1])))
        for k in range(3):
            x = self.at(f"encoder.{k}.fourier.norm", x + torch.fft.fft2(x).real / SIZE)
            y = self.at(f"encoder.{k}.output", F.gelu(self.at(f"encoder.{k}.dense", x)))
            x = self.at(f"encoder.{k}.norm", x + y)
        x = self.at("predict", F.gelu(self.at("transform", x)))
        return F.cross_entropy(x[hidden], ids[hidden])

    other: ClassVar = {
        "tok": "embeddings.word", "pos": "embeddings.position", "ln": "embeddings.LayerNorm",
        **{f"h.{k}.{name}": f"encoder.{k}.{role}" for k in range(3) for name, role in (
            ("ff.0", "dense"), ("ff.1", "output"), ("ln_1", "fourier.norm"), ("ln_2", "norm"))},
        "lm.0": "transform", "lm.1": "predict",
    }  # fmt: skip


class Linearised(Spelled):
    """A decoder whose attention is linear, with a convolution over the last letters."""

    task = "text"
    head = 12

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Embedding(72, 48), "shift": nn.Conv1d(48, 48, 3, groups=48)}
        for k in range(2):
            out |= {f"stack.{k}.ln1": nn.LayerNorm(48), f"stack.{k}.ln2": nn.LayerNorm(48)}
            out |= {f"stack.{k}.attn.{n}": nn.Linear(48, 48, bias=False) for n in ("q", "k", "v", "o")}
            out |= {f"stack.{k}.ffn.{n}": nn.Linear(48, 48) for n in ("w1", "w2")}
        return out | {"ln_f": nn.LayerNorm(48), "head": nn.Linear(48, 72, bias=False)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed", ids)
        x = x + self.at("shift", F.pad(x.mT, (2, 0))).mT
        for k in range(2):
            at = f"stack.{k}"
            y = self.at(f"{at}.ln1", x)
            q, w, v = (self.at(f"{at}.attn.{n}", y).unflatten(-1, (-1, self.head)).transpose(1, 2) for n in "qkv")
            scores = ((F.elu(q) + 1) @ (F.elu(w) + 1).mT).tril()
            y = (scores / scores.sum(-1, keepdim=True)) @ v
            x = x + self.at(f"{at}.attn.o", y.transpose(1, 2).flatten(2))
            x = x + self.at(f"{at}.ffn.w2", F.relu(self.at(f"{at}.ffn.w1", self.at(f"{at}.ln2", x))).square())
        return self.at("head", self.at("ln_f", x))

    other: ClassVar = {
        "wte": "embed",
        **{f"h.{k}.{name}": f"stack.{k}.{role}".replace("+", f"+stack.{k}.") for k in range(2) for name, role in (
            ("mlp.c_fc", "ffn.w1|T"), ("mlp.c_proj", "ffn.w2|T"), ("mix.c_attn", "attn.v+attn.q+attn.k"),
            ("mix.c_proj", "attn.o"), ("ln_1", "ln1"), ("ln_2", "ln2"))},
        "conv": "shift", "norm": "ln_f", "out": "head",
    }  # fmt: skip


class Temporal(Vision):
    """A temporal convolutional network over pixels, four levels of two convolutions of one shape."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"start": nn.Conv1d(2, 20, 1)}
        for k in range(4):
            out |= {f"network.{k}.conv{j}": nn.Conv1d(20, 20, 3) for j in (1, 2)}
            out |= {f"network.{k}.gn": nn.GroupNorm(2, 20)}
        return out | {"linear": nn.Linear(20, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("start", x.flatten(1).unflatten(1, (32, 2)).mT)
        for k in range(4):
            y = x
            for j in (1, 2):
                y = F.relu(self.at(f"network.{k}.conv{j}", F.pad(y, (2, 0))))
                y = F.dropout(y, 0.05, self.training)
            x = self.at(f"network.{k}.gn", x + y)
            x = x[..., ::2] if k < 3 else x
        return self.at("linear", x.mean(-1))

    other: ClassVar = {
        "readout": "linear",
        **{f"tcn.level{k}.{name}": f"network.{k}.{role}" for k in range(4) for name, role in (
            ("second", "conv2"), ("first", "conv1"), ("post", "gn"))},
        "lift": "start",
    }  # fmt: skip


class Prototypes(Vision):
    """Distances to the means of classes in one half of a batch tell the classes of the other half."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {}
        for k in range(3):
            out |= {f"encoder.{3 * k}": nn.Conv2d(16 if k else 1, 16, 3, padding=1)}
            out |= {f"encoder.{3 * k + 1}": nn.BatchNorm2d(16)}
        return out | {"embed": nn.Linear(64, 32), "temperature": nn.Parameter(torch.ones(1))}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0]
        for k in range(3):
            x = F.relu(self.at(f"encoder.{3 * k + 1}", self.at(f"encoder.{3 * k}", x)))
            x = F.max_pool2d(x, 2) if k < 2 else x
        x = self.at("embed", x.flatten(1))
        half = len(x) // 2
        own = F.one_hot(batch[1][:half], 10).to(x)
        centres = (own.mT @ x[:half]) / own.sum(0)[:, None].clamp_min(1)
        scores = -torch.cdist(x[half:], centres).square() * self.at("temperature")
        return F.cross_entropy(scores.masked_fill(own.sum(0) == 0, -30.0), batch[1][half:])

    other: ClassVar = {
        "scale": "temperature", "backbone.block3.bn": "encoder.7", "backbone.block3.conv": "encoder.6",
        "backbone.block2.bn": "encoder.4", "backbone.block2.conv": "encoder.3", "backbone.block1.bn": "encoder.1",
        "backbone.block1.conv": "encoder.0", "projection": "embed|T",
    }  # fmt: skip


class GatedUNet(Spelled):
    """A U-Net with attention gates on its skips, which takes noise off digits."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        def double(at: str, a: int, b: int) -> dict[str, Made]:
            return {f"{at}.0": nn.Conv2d(a, b, 3, padding=1), f"{at}.1": nn.Conv2d(b, b, 3, padding=1)}

        out: dict[str, Made] = double("inc", 1, 12) | double("down1", 12, 16) | double("down2", 16, 16)
        for k, width in ((2, 16), (1, 12)):
            out |= {f"att{k}.W_g": nn.Conv2d(16, 8, 1), f"att{k}.W_x": nn.Conv2d(width, 8, 1)}
            out |= {f"att{k}.psi": nn.Conv2d(8, 1, 1)}
        return out | double("up2", 32, 16) | double("up1", 28, 12) | {"outc": nn.Conv2d(12, 1, 1)}

    def twice(self, at: str, x: Tensor) -> Tensor:
        return F.relu(self.at(f"{at}.1", F.relu(self.at(f"{at}.0", x))))

    def gated(self, at: str, x: Tensor, g: Tensor) -> Tensor:
        both = F.relu(self.at(f"{at}.W_g", g) + self.at(f"{at}.W_x", x))
        return torch.cat((x * self.at(f"{at}.psi", both).sigmoid(), g), 1)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0] + 0.4 * torch.randn_like(batch[0])
        a = self.twice("inc", x)
        b = self.twice("down1", F.max_pool2d(a, 2))
        c = self.twice("down2", F.max_pool2d(b, 2))
        c = self.twice("up2", self.gated("att2", b, F.interpolate(c, scale_factor=2)))
        c = self.twice("up1", self.gated("att1", a, F.interpolate(c, scale_factor=2)))
        return F.mse_loss(self.at("outc", c), batch[0])

    other: ClassVar = {
        "final": "outc", "encoder.0.a": "inc.0", "encoder.0.b": "inc.1", "encoder.1.a": "down1.0",
        "encoder.1.b": "down1.1", "bottom.a": "down2.0", "bottom.b": "down2.1", "decoder.0.a": "up2.0",
        "decoder.0.b": "up2.1", "decoder.1.a": "up1.0", "decoder.1.b": "up1.1", "gates.0.skip": "att2.W_x",
        "gates.0.query": "att2.W_g", "gates.0.mask": "att2.psi", "gates.1.skip": "att1.W_x",
        "gates.1.query": "att1.W_g", "gates.1.mask": "att1.psi",
    }  # fmt: skip


class Sequence(Spelled):
    """An encoder and a decoder of gated recurrent cells with additive attention between them."""

    task = "text"

    def layers(self) -> dict[str, Made]:
        return {
            "encoder.embedding": nn.Embedding(72, 32), "encoder.rnn": nn.GRU(32, 32, batch_first=True),
            "decoder.embedding": nn.Embedding(72, 32), "decoder.rnn": nn.GRU(32, 32, batch_first=True),
            "decoder.attention.W1": nn.Linear(32, 32), "decoder.attention.W2": nn.Linear(32, 32),
            "decoder.attention.V": nn.Linear(32, 1), "decoder.fc": nn.Linear(64, 72),
        }  # fmt: skip

    def loss(self, batch: list[Tensor]) -> Tensor:
        ids = batch[0]
        memory, last = self.at("encoder.rnn", self.at("encoder.embedding", ids[:, :24]))
        y, _ = self.at("decoder.rnn", self.at("decoder.embedding", ids[:, 24:-1]), last)
        both = self.at("decoder.attention.W1", y)[:, :, None] + self.at("decoder.attention.W2", memory)[:, None]
        share = self.at("decoder.attention.V", both.tanh())[..., 0].softmax(-1)
        scores = self.at("decoder.fc", torch.cat((y, share @ memory), -1))
        return F.cross_entropy(scores.flatten(0, 1), ids[:, 25:].flatten())

    other: ClassVar = {
        "generator": "decoder.fc", "attn.energy": "decoder.attention.V", "attn.keys": "decoder.attention.W2",
        "attn.query": "decoder.attention.W1", "tgt_rnn": "decoder.rnn", "src_rnn": "encoder.rnn",
        "tgt_emb": "decoder.embedding", "src_emb": "encoder.embedding",
    }  # fmt: skip


class Quantised(Spelled):
    """A variational autoencoder with a codebook (VQ-VAE) and residual blocks."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"enc.conv": nn.Conv2d(1, 16, 4, 2, 1)}
        for side in ("enc", "dec"):
            for k in range(2):
                out |= {f"{side}.res{k}.a": nn.Conv2d(16, 16, 3, padding=1), f"{side}.res{k}.b": nn.Conv2d(16, 16, 1)}
        return out | {"codebook": nn.Embedding(24, 16), "dec.conv": nn.ConvTranspose2d(16, 1, 4, 2, 1)}

    def residual(self, side: str, x: Tensor) -> Tensor:
        for k in range(2):
            x = x + self.at(f"{side}.res{k}.b", F.relu(self.at(f"{side}.res{k}.a", F.relu(x))))
        return x

    def loss(self, batch: list[Tensor]) -> Tensor:
        z = self.residual("enc", self.at("enc.conv", batch[0])).permute(0, 2, 3, 1)
        table = self.at("codebook", torch.arange(24))
        code = table[torch.cdist(z.flatten(0, 2), table).argmin(-1)].view_as(z)
        near = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())
        x = self.residual("dec", (z + (code - z).detach()).permute(0, 3, 1, 2))
        return F.mse_loss(self.at("dec.conv", x), batch[0]) + near

    other: ClassVar = {
        "quantizer.embedding": "codebook",
        **{f"{new}.stack.{k}.{j}": f"{old}.res{k}.{role}" for new, old in (("decoder", "dec"), ("encoder", "enc"))
           for k in range(2) for j, role in ((0, "a"), (1, "b"))},
        "encoder.inlet": "enc.conv", "decoder.outlet": "dec.conv",
    }  # fmt: skip


class Neighbours(Vision):
    """Graph convolutions over the nearest neighbours in a batch, own and neighbours' features apart (GraphSAGE)."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"lin_in": nn.Linear(64, 48)}
        for k in range(3):
            out |= {f"convs.{k}.lin_l": nn.Linear(48, 48), f"convs.{k}.lin_r": nn.Linear(48, 48, bias=False)}
            out |= {f"norms.{k}": nn.LayerNorm(48)}
        return out | {"lin_out": nn.Linear(48, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        near = torch.cdist(x, x).topk(min(4, len(x)), largest=False).indices
        x = F.relu(self.at("lin_in", x))
        for k in range(3):
            y = self.at(f"convs.{k}.lin_l", x[near].mean(1)) + self.at(f"convs.{k}.lin_r", x)
            x = x + F.relu(self.at(f"norms.{k}", y))
        return self.at("lin_out", x)

    other: ClassVar = {
        "post": "lin_out",
        **{f"gnn.{k}.{name}": role.format(k) for k in range(3) for name, role in (
            ("self_loop", "convs.{}.lin_r"), ("aggregate", "convs.{}.lin_l"), ("bn", "norms.{}"))},
        "pre": "lin_in",
    }  # fmt: skip


class Coupled(Spelled):
    """A normalising flow of affine couplings, whose scales and shifts are networks of one shape."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {}
        for k in range(3):
            for net in "st":
                out |= {f"flows.{k}.{net}.0": nn.Linear(32, 32), f"flows.{k}.{net}.2": nn.Linear(32, 32)}
        return out | {"loc": nn.Parameter(torch.zeros(64)), "log_scale": nn.Parameter(torch.zeros(64))}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = (batch[0].flatten(1) + 0.1 * torch.randn(len(batch[0]), 64) - 0.3) * 2
        logdet = x.new_zeros(len(x))
        for k in range(3):
            a, b = x[:, ::2], x[:, 1::2]
            s, t = (self.at(f"flows.{k}.{net}.2", F.leaky_relu(self.at(f"flows.{k}.{net}.0", a), 0.1)) for net in "st")
            s = s.tanh()
            x, logdet = torch.stack((b * s.exp() + t, a), -1).flatten(1), logdet + s.sum(1)
        x = (x - self.at("loc")) * self.at("log_scale").exp()
        density = -0.5 * x.square().sum(1) + logdet + self.at("log_scale").sum()
        return -(density / 64).mean()

    other: ClassVar = {
        "prior.mu": "loc", "prior.sigma": "log_scale",
        **{f"bijectors.{k}.{name}": f"flows.{k}.{role}" for k in range(3) for name, role in (
            ("shift.in", "t.0"), ("shift.out", "t.2"), ("scale.in", "s.0"), ("scale.out", "s.2"))},
    }  # fmt: skip


NETS = (
    Capsules, Squeeze, SpatialGate, Fourier, Linearised, Temporal, Prototypes, GatedUNet, Sequence, Quantised,
    Neighbours, Coupled,
)  # fmt: skip
