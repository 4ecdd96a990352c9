"""A seventh set, written before the code had seen any: the kinds that people have most, under names that say little."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.proof.spelled import Made, Spelled, repeated, turn
from benchmarks.proof.unseen_k import Vision, conv
from benchmarks.proof.unseen_p import Decoder


class Plain(Vision):
    """Convolutions with batch norms and strides, a hidden layer."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"conv1": nn.Conv2d(1, 20, 3, padding=1), "bn1": nn.BatchNorm2d(20)}
        for k in (2, 3, 4):
            out |= {f"conv{k}": nn.Conv2d(20, 20, 3, 2 if k == 3 else 1, 1), f"bn{k}": nn.BatchNorm2d(20)}
        return out | {"fc1": nn.Linear(80, 40), "bn5": nn.BatchNorm1d(40), "fc2": nn.Linear(40, 10)}

    def forward(self, x: Tensor) -> Tensor:
        for k in (1, 2, 3, 4):
            x = F.relu(self.at(f"bn{k}", self.at(f"conv{k}", x)))
        return self.at("fc2", F.relu(self.at("bn5", self.at("fc1", F.avg_pool2d(x, 2).flatten(1)))))

    other: ClassVar = {
        "out": "fc2", "n5": "bn5", "hid": "fc1", "n4": "bn1", "n3": "bn3", "n2": "bn2", "n1": "bn4", "c4": "conv1",
        "c3": "conv2", "c2": "conv4", "c1": "conv3",
    }  # fmt: skip


class Stages(Vision):
    """Two residual stages of two blocks, with shortcuts of size one where the width changes."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": conv(1, 16), "bn": nn.BatchNorm2d(16)}
        for s, (a, b) in enumerate(((16, 16), (16, 32))):
            for k in range(2):
                into = a if k == 0 else b
                out |= {f"{s}.{k}.conv1": conv(into, b), f"{s}.{k}.bn1": nn.BatchNorm2d(b)}
                out |= {f"{s}.{k}.conv2": conv(b, b), f"{s}.{k}.bn2": nn.BatchNorm2d(b)}
                if into != b:
                    out |= {f"{s}.{k}.short": conv(into, b, 1), f"{s}.{k}.bn3": nn.BatchNorm2d(b)}
        return out | {"fc": nn.Linear(32, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.at("bn", self.at("stem", x)))
        for s in range(2):
            for k in range(2):
                at = f"{s}.{k}"
                y = F.relu(self.at(f"{at}.bn1", self.at(f"{at}.conv1", x)))
                y = self.at(f"{at}.bn2", self.at(f"{at}.conv2", y))
                x = self.at(f"{at}.bn3", self.at(f"{at}.short", x)) if (s, k) == (1, 0) else x
                x = F.relu(x + y)
            x = F.max_pool2d(x, 2)
        return self.at("fc", x.mean((2, 3)))

    other: ClassVar = {
        "linear": "fc",
        **{f"body.{2 * s + k}.{name}": f"{s}.{k}.{role}" for s in range(2) for k in range(2)
           for name, role in (("f2", "bn1"), ("f1", "bn2"), ("g2", "conv1"), ("g1", "conv2"))},
        "body.2.p": "1.0.short", "body.2.q": "1.0.bn3", "n0": "bn", "c0": "stem",
    }  # fmt: skip


class ClassViT(Vision):
    """A vision transformer with a class token; joined and turned on the other side, blocks from the last."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"patch": nn.Conv2d(1, 48, 2, 2), "cls": nn.Parameter(torch.randn(1, 48) * 0.1)}
        out |= {"pos": nn.Parameter(torch.randn(17, 48) * 0.1)}
        for k in range(4):
            out |= {f"{k}.{n}": nn.Linear(48, 48) for n in ("query", "key", "value", "proj")}
            out |= {f"{k}.norm1": nn.LayerNorm(48), f"{k}.norm2": nn.LayerNorm(48)}
            out |= {f"{k}.fc1": nn.Linear(48, 96), f"{k}.fc2": nn.Linear(96, 48)}
        return out | {"norm": nn.LayerNorm(48), "head": nn.Linear(48, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("patch", x).flatten(2).mT
        x = torch.cat((self.at("cls").expand(len(x), 1, -1), x), 1) + self.at("pos")
        for k in range(4):
            y = self.at(f"{k}.norm1", x)
            y = self.attend(*(self.at(f"{k}.{n}", y) for n in ("query", "key", "value")))
            x = x + self.at(f"{k}.proj", y)
            x = x + self.at(f"{k}.fc2", F.gelu(self.at(f"{k}.fc1", self.at(f"{k}.norm2", x))))
        return self.at("head", self.at("norm", x)[:, 0])

    other: ClassVar = {
        "t": "cls", "p": "pos", "e": "patch",
        **repeated(4, "l.{}", {"b": "norm1", "a": "norm2", "m": "key+query+value|T", "o": "proj|T", "u": "fc1|T",
                               "d": "fc2|T"}, backwards=True),
        "n": "norm", "h": "head",
    }  # fmt: skip


class Concats(Spelled):
    """A U-Net with batch norms whose skips are put beside, and transposed convolutions up."""

    task = "segment"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {}
        for at, (a, b) in {"e1": (1, 12), "e2": (12, 24), "mid": (24, 24), "d2": (48, 24), "d1": (24, 12)}.items():
            out |= {f"{at}.conv1": conv(a, b), f"{at}.bn1": nn.BatchNorm2d(b)}
            out |= {f"{at}.conv2": conv(b, b), f"{at}.bn2": nn.BatchNorm2d(b)}
        out |= {"up2": nn.ConvTranspose2d(24, 24, 2, 2), "up1": nn.ConvTranspose2d(24, 12, 2, 2)}
        return out | {"out": nn.Conv2d(12, 1, 1)}

    def double(self, at: str, x: Tensor) -> Tensor:
        for j in (1, 2):
            x = F.relu(self.at(f"{at}.bn{j}", self.at(f"{at}.conv{j}", x)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        a = self.double("e1", x)
        b = self.double("e2", F.max_pool2d(a, 2))
        x = self.double("mid", F.max_pool2d(b, 2))
        x = self.double("d2", torch.cat((self.at("up2", x), b), 1))
        return self.at("out", self.double("d1", torch.cat((self.at("up1", x), a), 1)))

    other: ClassVar = {
        "last": "out", "grow.0": "up1", "grow.1": "up2",
        **{f"{path}.{name}": f"{at}.{role}"
           for path, at in (("s.0", "d1"), ("s.1", "d2"), ("s.2", "mid"), ("s.3", "e2"), ("s.4", "e1"))
           for name, role in (("n.0", "bn2"), ("n.1", "bn1"), ("c.0", "conv2"), ("c.1", "conv1"))},
    }  # fmt: skip


class Variational(Spelled):
    """A variational autoencoder of linear layers, two square ones on each side."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"enc0": nn.Linear(64, 40), "dec3": nn.Linear(40, 64), "dec0": nn.Linear(10, 40)}
        out |= {n: nn.Linear(40, 40) for n in ("enc1", "enc2", "dec1", "dec2")}
        return out | {"mu": nn.Linear(40, 10), "logvar": nn.Linear(40, 10)}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0].flatten(1)
        y = x
        for k in range(3):
            y = F.relu(self.at(f"enc{k}", y))
        mean, spread = self.at("mu", y), self.at("logvar", y)
        z = mean + torch.randn_like(mean) * (spread / 2).exp()
        for k in range(3):
            z = F.relu(self.at(f"dec{k}", z))
        likeness = F.binary_cross_entropy_with_logits(self.at("dec3", z), x, reduction="sum") / len(x)
        return likeness + 0.5 * (mean**2 + spread.exp() - 1 - spread).sum(1).mean()

    other: ClassVar = {
        "f.0": "dec3", "f.1": "dec1", "f.2": "enc2", "f.3": "logvar", "f.4": "dec0", "f.5": "enc1", "f.6": "dec2",
        "f.7": "mu", "f.8": "enc0",
    }  # fmt: skip


class Gates(Vision):
    """An LSTM cell over rows, each gate in layers of its own; joined in another order on the other side."""

    steps = 400

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {f"x_{g}": nn.Linear(8, 28) for g in "ifgo"}
        out |= {f"h_{g}": nn.Linear(28, 28, bias=False) for g in "ifgo"}
        return out | {"norm": nn.LayerNorm(28), "fc": nn.Linear(28, 10)}

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 28)
        for row in x[:, 0].unbind(1):
            i, f, g, o = (self.at(f"x_{n}", row) + self.at(f"h_{n}", h) for n in "ifgo")
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.at("fc", self.at("norm", h))

    other: ClassVar = {"y": "fc", "s": "norm", "r": "h_f+h_i+h_o+h_g", "w": "x_f+x_i+x_o+x_g"}


class Labels(Spelled):
    """Pictures and the embeddings of their digits (CLIP): convolutions with norms on one side, layers on the other."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"conv1": conv(1, 16), "bn1": nn.BatchNorm2d(16), "conv2": conv(16, 16)}
        out |= {"bn2": nn.BatchNorm2d(16), "image": nn.Linear(64, 32), "image2": nn.Linear(32, 32)}
        out |= {"embed": nn.Embedding(10, 32), "text": nn.Linear(32, 32), "text2": nn.Linear(32, 32)}
        return out | {"temperature": nn.Parameter(torch.tensor(1.0))}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, labels = batch
        for k in (1, 2):
            x = F.max_pool2d(F.relu(self.at(f"bn{k}", self.at(f"conv{k}", x))), 2)
        x = F.normalize(self.at("image2", F.relu(self.at("image", x.flatten(1)))), dim=-1)
        y = F.normalize(self.at("text2", F.relu(self.at("text", self.at("embed", torch.arange(10))))), dim=-1)
        return F.cross_entropy(x @ y.mT * self.at("temperature").exp(), labels)

    other: ClassVar = {
        "b.p2": "image2|T", "b.p1": "image", "b.n.0": "bn2", "b.c.0": "conv2", "b.n.1": "bn1", "b.c.1": "conv1",
        "a.p2": "text", "a.p1": "text2|T", "a.e": "embed", "s": "temperature",
    }  # fmt: skip


class GPTLike(Decoder):
    """Learned positions, biases, gelu; fused and turned as in GPT-2 on the other side."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"tokens": nn.Embedding(72, 64), "places": nn.Parameter(torch.randn(48, 64) * 0.1)}
        for k in range(3):
            out |= {f"{k}.{n}": nn.Linear(64, 64) for n in ("query", "key", "value", "out")}
            out |= {f"{k}.norm1": nn.LayerNorm(64), f"{k}.norm2": nn.LayerNorm(64)}
            out |= {f"{k}.up": nn.Linear(64, 96), f"{k}.down": nn.Linear(96, 64)}
        return out | {"norm": nn.LayerNorm(64), "head": nn.Linear(64, 72, bias=False)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("tokens", ids) + self.at("places")[: ids.shape[1]]
        for k in range(3):
            y = self.at(f"{k}.norm1", x)
            y = self.attend(*(self.at(f"{k}.{n}", y) for n in ("query", "key", "value")), causal=True)
            x = x + self.at(f"{k}.out", y)
            x = x + self.at(f"{k}.down", F.gelu(self.at(f"{k}.up", self.at(f"{k}.norm2", x))))
        return self.at("head", self.at("norm", x))

    other: ClassVar = {
        "w0": "head", "w1": "norm", "w2": "places", "w3": "tokens",
        **repeated(3, "b{}", {"k0": "down|T", "k1": "up|T", "k2": "out|T", "k3": "value+key+query|T", "g0": "norm2",
                              "g1": "norm1"}),
    }  # fmt: skip


class LlamaLike(Decoder):
    """Rotary rows, grouped queries, gates; rows in pairs on the other side, gate and up exchanged their names."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed_tokens": nn.Embedding(72, 64)}
        for k in range(3):
            out |= {f"{k}.{n}_proj": nn.Linear(64, 64, bias=False) for n in "qo"}
            out |= {f"{k}.{n}_proj": nn.Linear(64, 32, bias=False) for n in "kv"}
            out |= {f"{k}.{n}_norm": nn.RMSNorm(64, 1e-6) for n in ("input", "post")}
            out |= {f"{k}.{n}_proj": nn.Linear(64, 96, bias=False) for n in ("gate", "up")}
            out |= {f"{k}.down_proj": nn.Linear(96, 64, bias=False)}
        return out | {"norm": nn.RMSNorm(64, 1e-6), "lm_head": nn.Linear(64, 72, bias=False)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed_tokens", ids)
        for k in range(3):
            y = self.at(f"{k}.input_norm", x)
            y = self.attend(*(self.at(f"{k}.{n}_proj", y) for n in "qkv"), causal=True, rotary=True)
            x = x + self.at(f"{k}.o_proj", y)
            y = self.at(f"{k}.post_norm", x)
            x = x + self.at(f"{k}.down_proj", F.silu(self.at(f"{k}.gate_proj", y)) * self.at(f"{k}.up_proj", y))
        return self.at("lm_head", self.at("norm", x))

    other: ClassVar = {
        "lm_head": "lm_head", "norm": "norm",
        **repeated(3, "h.{}", {"attn.o_proj": "o_proj", "attn.v_proj": "v_proj", "attn.k_proj": "k_proj|R",
                               "attn.q_proj": "q_proj|R", "mlp.down_proj": "down_proj", "mlp.up_proj": "gate_proj",
                               "mlp.gate_proj": "up_proj", "post_norm": "input_norm", "input_norm": "post_norm"}),
        "embed_tokens": "embed_tokens",
    }  # fmt: skip


class PhiLike(Decoder):
    """Attention and feed-forward beside each other behind one norm, half of each head rotary, biases everywhere."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Embedding(72, 64)}
        for k in range(3):
            out |= {f"{k}.norm": nn.LayerNorm(64)}
            out |= {f"{k}.{n}": nn.Linear(64, 64) for n in ("q_proj", "k_proj", "v_proj", "dense")}
            out |= {f"{k}.fc1": nn.Linear(64, 128), f"{k}.fc2": nn.Linear(128, 64)}
        return out | {"final_norm": nn.LayerNorm(64), "lm_head": nn.Linear(64, 72)}

    def some(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, 16)).transpose(1, 2)
        return torch.cat((turn(x[..., :8]), x[..., 8:]), -1).transpose(1, 2).flatten(2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed", ids)
        for k in range(3):
            y = self.at(f"{k}.norm", x)
            q, key, v = (self.at(f"{k}.{n}_proj", y) for n in "qkv")
            z = self.at(f"{k}.dense", self.attend(self.some(q), self.some(key), v, causal=True))
            x = x + z + self.at(f"{k}.fc2", F.gelu(self.at(f"{k}.fc1", y)))
        return self.at("lm_head", self.at("final_norm", x))

    other: ClassVar = {
        "wte": "embed",
        **repeated(3, "layer.{}", {"mixer.Wqkv": "q_proj+k_proj+v_proj", "mixer.out_proj": "dense", "mlp.fc1": "fc1",
                                   "mlp.fc2": "fc2", "ln": "norm"}),
        "ln": "final_norm", "linear": "lm_head",
    }  # fmt: skip


class FalconLike(Decoder):
    """Beside each other behind one norm, one head of keys and values, no biases; all of it fused by the other side."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Embedding(72, 64)}
        for k in range(3):
            out |= {f"{k}.norm": nn.LayerNorm(64), f"{k}.query": nn.Linear(64, 64, bias=False)}
            out |= {f"{k}.key": nn.Linear(64, 16, bias=False), f"{k}.value": nn.Linear(64, 16, bias=False)}
            out |= {f"{k}.dense": nn.Linear(64, 64, bias=False)}
            out |= {f"{k}.up": nn.Linear(64, 128, bias=False), f"{k}.down": nn.Linear(128, 64, bias=False)}
        return out | {"norm": nn.LayerNorm(64), "head": nn.Linear(64, 72, bias=False)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed", ids)
        for k in range(3):
            y = self.at(f"{k}.norm", x)
            z = self.attend(*(self.at(f"{k}.{n}", y) for n in ("query", "key", "value")), causal=True, rotary=True)
            x = x + self.at(f"{k}.dense", z) + self.at(f"{k}.down", F.gelu(self.at(f"{k}.up", y)))
        return self.at("head", self.at("norm", x))

    other: ClassVar = {
        "z": "head",
        **repeated(3, "g.{}", {"one": "query+key+value", "two": "dense", "three": "up", "four": "down",
                               "five": "norm"}, backwards=True),
        "y": "norm", "x": "embed",
    }  # fmt: skip


class MixtralLike(Decoder):
    """Four experts of which two are asked for each letter; stacks of them on the other side."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Embedding(72, 64)}
        for k in range(2):
            out |= {f"{k}.{n}": nn.Linear(64, 64, bias=False) for n in "qkvo"}
            out |= {f"{k}.norm1": nn.RMSNorm(64, 1e-6), f"{k}.norm2": nn.RMSNorm(64, 1e-6)}
            out |= {f"{k}.gate": nn.Linear(64, 4, bias=False)}
            for j in range(4):
                out |= {f"{k}.experts.{j}.{n}": nn.Linear(64, 48, bias=False) for n in ("w1", "w3")}
                out |= {f"{k}.experts.{j}.w2": nn.Linear(48, 64, bias=False)}
        return out | {"norm": nn.RMSNorm(64, 1e-6), "head": nn.Linear(64, 72, bias=False)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed", ids)
        for k in range(2):
            y = self.at(f"{k}.norm1", x)
            y = self.attend(*(self.at(f"{k}.{n}", y) for n in "qkv"), causal=True, rotary=True)
            x = x + self.at(f"{k}.o", y)
            y = self.at(f"{k}.norm2", x)
            best = self.at(f"{k}.gate", y).topk(2, -1)
            share = torch.zeros(*y.shape[:2], 4).scatter(-1, best.indices, best.values.softmax(-1))
            for j in range(4):
                at = f"{k}.experts.{j}"
                z = self.at(f"{at}.w2", F.silu(self.at(f"{at}.w1", y)) * self.at(f"{at}.w3", y))
                x = x + share[..., j : j + 1] * z
        return self.at("head", self.at("norm", x))

    other: ClassVar = {
        "lm_head": "head", "final": "norm", "embedding": "embed",
        **{f"blk.{k}.{name}": "+".join(f"{k}.experts.{j}.{role}" for j in range(4)) + "|S" for k in range(2)
           for name, role in (("ffn.c", "w3"), ("ffn.b", "w2"), ("ffn.a", "w1"))},
        **repeated(2, "blk.{}", {"ffn.r": "gate", "att.d": "o", "att.c": "q|R", "att.b": "v", "att.a": "k|R",
                                 "n2": "norm1", "n1": "norm2"}),
    }  # fmt: skip


class Relative(Decoder):
    """An encoder of letters some of which are hidden, with a table of distances for each head (T5), no biases."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Embedding(73, 64), "bias": nn.Embedding(16, 4)}
        for k in range(3):
            out |= {f"{k}.{n}": nn.Linear(64, 64, bias=False) for n in "qkvo"}
            out |= {f"{k}.wi": nn.Linear(64, 128, bias=False), f"{k}.wo": nn.Linear(128, 64, bias=False)}
            out |= {f"{k}.norm1": nn.RMSNorm(64, 1e-6), f"{k}.norm2": nn.RMSNorm(64, 1e-6)}
        return out | {"norm": nn.RMSNorm(64, 1e-6), "head": nn.Linear(64, 73, bias=False)}

    def loss(self, batch: list[Tensor]) -> Tensor:
        ids = batch[0]
        hidden = torch.rand(ids.shape) < 0.2
        return F.cross_entropy(self(ids.masked_fill(hidden, 72))[hidden], ids[hidden])

    def forward(self, ids: Tensor) -> Tensor:
        x, places = self.at("embed", ids), torch.arange(ids.shape[1])
        far = self.at("bias", ((places[:, None] - places).clamp(-8, 7) + 8)).permute(2, 0, 1)
        for k in range(3):
            y = self.at(f"{k}.norm1", x)
            q, key, v = (self.at(f"{k}.{n}", y).unflatten(-1, (-1, 16)).transpose(1, 2) for n in "qkv")
            x = x + self.at(f"{k}.o", ((q @ key.mT / 4 + far).softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + self.at(f"{k}.wo", F.relu(self.at(f"{k}.wi", self.at(f"{k}.norm2", x))))
        return self.at("head", self.at("norm", x))

    other: ClassVar = {
        "lm": "head", "fin": "norm",
        **repeated(3, "enc.{}", {"l2": "norm1", "l1": "norm2", "ff.b": "wi", "ff.a": "wo", "at.d": "q", "at.c": "v",
                                 "at.b": "o", "at.a": "k"}),
        "rel": "bias", "emb": "embed",
    }  # fmt: skip


NETS = (
    Plain, Stages, ClassViT, Concats, Variational, Gates, Labels, GPTLike, LlamaLike, PhiLike, FalconLike, MixtralLike,
    Relative,
)  # fmt: skip
