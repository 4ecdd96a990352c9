"""A sixth set, written before the code had seen any: usual small models, public ones in other words, lying names."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.proof.spelled import Made, Spelled, repeated, turn, under
from benchmarks.proof.unseen_k import Table, Vision, conv

WIDTH = 32


class PreAct(Vision):
    """Three bottlenecks that begin with their norm (ResNet v2)."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": conv(1, 24)}
        for k in range(3):
            out |= {f"blocks.{k}.bn1": nn.BatchNorm2d(24), f"blocks.{k}.conv1": conv(24, 12, 1)}
            out |= {f"blocks.{k}.bn2": nn.BatchNorm2d(12), f"blocks.{k}.conv2": conv(12, 12)}
            out |= {f"blocks.{k}.bn3": nn.BatchNorm2d(12), f"blocks.{k}.conv3": conv(12, 24, 1)}
        return out | {"bn": nn.BatchNorm2d(24), "fc": nn.Linear(24, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("stem", x)
        for k in range(3):
            y = x
            for j in (1, 2, 3):
                y = self.at(f"blocks.{k}.conv{j}", F.relu(self.at(f"blocks.{k}.bn{j}", y)))
            x = x + y
            x = F.avg_pool2d(x, 2) if k == 0 else x
        return self.at("fc", F.relu(self.at("bn", x)).mean((2, 3)))

    other: ClassVar = {
        "y": "fc", "w": "bn",
        **{f"m.{2 - k}.{name}": f"blocks.{k}.{role}" for k in range(3)
           for name, role in (("n.2", "bn1"), ("n.1", "bn3"), ("n.0", "bn2"), ("k.2", "conv2"), ("k.1", "conv1"),
                              ("k.0", "conv3"))},
        "x": "stem",
    }  # fmt: skip


class LayerScaled(Vision):
    """A vision transformer with a scale behind each branch, two register tokens, and pooling by the mean."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"patch_embed": nn.Conv2d(1, WIDTH, 2, 2)}
        out |= {"pos_embed": nn.Parameter(torch.randn(16, WIDTH) * 0.1)}
        out |= {"reg_token": nn.Parameter(torch.randn(2, WIDTH) * 0.1)}
        for k in range(3):
            out |= {f"{k}.norm1": nn.LayerNorm(WIDTH), f"{k}.norm2": nn.LayerNorm(WIDTH)}
            out |= {f"{k}.{n}": nn.Linear(WIDTH, WIDTH) for n in ("q", "k", "v", "proj")}
            out |= {f"{k}.ls{j}": nn.Parameter(torch.full((WIDTH,), 0.3)) for j in (1, 2)}
            out |= {f"{k}.fc1": nn.Linear(WIDTH, 64), f"{k}.fc2": nn.Linear(64, WIDTH)}
        return out | {"fc_norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("patch_embed", x).flatten(2).mT + self.at("pos_embed")
        x = torch.cat((self.at("reg_token").expand(len(x), -1, -1), x), 1)
        for k in range(3):
            y = self.at(f"{k}.norm1", x)
            y = self.attend(*(self.at(f"{k}.{n}", y) for n in "qkv"))
            x = x + self.at(f"{k}.ls1") * self.at(f"{k}.proj", y)
            y = self.at(f"{k}.fc2", F.gelu(self.at(f"{k}.fc1", self.at(f"{k}.norm2", x))))
            x = x + self.at(f"{k}.ls2") * y
        return self.at("head", self.at("fc_norm", x)[:, 2:].mean(1))

    other: ClassVar = {
        "tokens": "reg_token", "places": "pos_embed", "cut": "patch_embed",
        **repeated(3, "stages.{}", {"scale_b": "ls1", "scale_a": "ls2", "ln_b": "norm1",
                                    "ln_a": "norm2", "mix.in": "q+k+v",
                                    "mix.out": "proj", "mlp.b": "fc1", "mlp.a": "fc2"}),
        "last": "fc_norm", "classes": "head",
    }  # fmt: skip


class SquareMixer(Vision):
    """A mixer of three blocks in which all layers that mix channels are square, stored the other way round."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"stem": nn.Linear(4, WIDTH)}
        for k in range(3):
            out |= {f"{k}.norm1": nn.LayerNorm(WIDTH), f"{k}.norm2": nn.LayerNorm(WIDTH)}
            out |= {f"{k}.tokens1": nn.Linear(16, 16), f"{k}.tokens2": nn.Linear(16, 16)}
            out |= {f"{k}.channels1": nn.Linear(WIDTH, WIDTH), f"{k}.channels2": nn.Linear(WIDTH, WIDTH)}
        return out | {"norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 10)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("stem", F.unfold(x, 2, stride=2).mT)
        for k in range(3):
            y = self.at(f"{k}.norm1", x).mT
            x = x + self.at(f"{k}.tokens2", F.gelu(self.at(f"{k}.tokens1", y))).mT
            y = self.at(f"{k}.norm2", x)
            x = x + self.at(f"{k}.channels2", F.gelu(self.at(f"{k}.channels1", y)))
        return self.at("head", self.at("norm", x).mean(1))

    other: ClassVar = {
        "o": "head",
        **repeated(3, "f.{}", {"d": "channels1|T", "c": "channels2|T", "b": "tokens1|T", "a": "tokens2|T",
                               "n": "norm2", "m": "norm1"}, backwards=True),
        "e": "stem", "p": "norm",
    }  # fmt: skip


class GroupUNet(Spelled):
    """A U-Net with group norms that finds the ink under noise; its skips are added."""

    task = "segment"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"inc": nn.Conv2d(1, 16, 3, padding=1)}
        for at in ("down1", "down2", "up1", "up2"):
            out |= {f"{at}.conv1": conv(16, 16), f"{at}.gn1": nn.GroupNorm(4, 16)}
            out |= {f"{at}.conv2": conv(16, 16), f"{at}.gn2": nn.GroupNorm(4, 16)}
        return out | {"outc": nn.Conv2d(16, 1, 1)}

    def double(self, at: str, x: Tensor) -> Tensor:
        for j in (1, 2):
            x = F.silu(self.at(f"{at}.gn{j}", self.at(f"{at}.conv{j}", x)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        a = self.double("down1", self.at("inc", x))
        b = self.double("down2", F.max_pool2d(a, 2))
        y = self.double("up1", F.interpolate(F.max_pool2d(b, 2), scale_factor=2.0) + b)
        return self.at("outc", self.double("up2", F.interpolate(y, scale_factor=2.0) + a))

    other: ClassVar = {
        "final": "outc",
        **{f"{path}.{name}": f"{at}.{role}"
           for path, at in (("decoder.0", "up2"), ("decoder.1", "up1"), ("encoder.0", "down2"), ("encoder.1", "down1"))
           for name, role in (("norm_b", "gn1"), ("norm_a", "gn2"), ("conv_b", "conv1"), ("conv_a", "conv2"))},
        "first": "inc",
    }  # fmt: skip


class Conditional(Spelled):
    """A variational autoencoder that is told the digit, with two layers on each side."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"enc_label": nn.Embedding(10, 16), "dec_label": nn.Embedding(10, 16)}
        out |= {"enc1": nn.Linear(80, 48), "enc2": nn.Linear(48, 48)}
        out |= {"mu": nn.Linear(48, 12), "logvar": nn.Linear(48, 12)}
        return out | {"dec1": nn.Linear(28, 48), "dec2": nn.Linear(48, 48), "dec3": nn.Linear(48, 64)}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, labels = batch[0].flatten(1), batch[1]
        y = F.relu(self.at("enc1", torch.cat((x, self.at("enc_label", labels)), 1)))
        y = F.relu(self.at("enc2", y))
        mean, spread = self.at("mu", y), self.at("logvar", y)
        z = mean + torch.randn_like(mean) * (spread / 2).exp()
        z = F.relu(self.at("dec1", torch.cat((z, self.at("dec_label", labels)), 1)))
        z = self.at("dec3", F.relu(self.at("dec2", z)))
        likeness = F.binary_cross_entropy_with_logits(z, x, reduction="none").sum(1)
        return (likeness + 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1)).mean()

    other: ClassVar = {
        "p.2": "dec3", "p.1": "dec2", "p.0": "dec1", "sigma": "mu", "mean": "logvar", "q.1": "enc2", "q.0": "enc1",
        "classes.0": "dec_label", "classes.1": "enc_label",
    }  # fmt: skip


class TwoWays(Vision):
    """Two LSTMs, along the rows and back, and two along the columns; all four under one another's names."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Linear(8, 16)}
        out |= {f"{n}_{w}": nn.LSTM(16, 20, batch_first=True) for n in ("rows", "columns") for w in ("there", "back")}
        return out | {"fc1": nn.Linear(80, 40), "fc2": nn.Linear(40, 10)}

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for name, y in (("rows", x[:, 0]), ("columns", x[:, 0].mT)):
            y = self.at("embed", y)
            found.append(self.at(f"{name}_there", y)[0][:, -1])
            found.append(self.at(f"{name}_back", y.flip(1))[0][:, -1])
        return self.at("fc2", F.relu(self.at("fc1", torch.cat(found, 1))))

    other: ClassVar = {
        "rnn.0": "columns_there", "rnn.1": "rows_back", "rnn.2": "rows_there", "rnn.3": "columns_back",
        "inp": "embed", "mlp.0": "fc1", "mlp.2": "fc2",
    }  # fmt: skip


class Towers(Spelled):
    """Two towers of one shape: a picture's blurred half and the whole of it; names that lie about which is which."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"scale": nn.Parameter(torch.tensor(2.0))}
        for at in ("query", "document"):
            out |= {f"{at}_encoder.fc1": nn.Linear(64, 48), f"{at}_encoder.norm": nn.LayerNorm(48)}
            out |= {f"{at}_encoder.fc2": nn.Linear(48, 48), f"{at}_encoder.proj": nn.Linear(48, 24, bias=False)}
        return out

    def tower(self, at: str, x: Tensor) -> Tensor:
        x = F.gelu(self.at(f"{at}_encoder.norm", self.at(f"{at}_encoder.fc1", x)))
        return F.normalize(self.at(f"{at}_encoder.proj", F.gelu(self.at(f"{at}_encoder.fc2", x))), dim=-1)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0]
        blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0).flatten(1)
        scores = self.tower("query", blurred) @ self.tower("document", x.flatten(1)).mT * self.at("scale").exp()
        own = torch.arange(len(x))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2

    _own: ClassVar = {"out": "proj", "hidden": "fc2|T", "ln": "norm", "inp": "fc1"}
    other: ClassVar = {
        **under("query_tower", "document_encoder", _own), **under("document_tower", "query_encoder", _own),
        "logit_scale": "scale",
    }  # fmt: skip


class SharedExperts(Vision):
    """Four small experts of which two are asked, and one that always is; experts in another order on the other side."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Linear(64, WIDTH)}
        for k in range(2):
            out |= {f"{k}.norm": nn.LayerNorm(WIDTH), f"{k}.router": nn.Linear(WIDTH, 4, bias=False)}
            for j in (*range(4), "shared"):
                out |= {f"{k}.{j}.{n}": nn.Linear(WIDTH, 24, bias=False) for n in ("gate", "up")}
                out |= {f"{k}.{j}.down": nn.Linear(24, WIDTH, bias=False)}
        return out | {"norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 10)}

    def expert(self, at: str, x: Tensor) -> Tensor:
        return self.at(f"{at}.down", F.silu(self.at(f"{at}.gate", x)) * self.at(f"{at}.up", x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("embed", x.flatten(1))
        for k in range(2):
            y = self.at(f"{k}.norm", x)
            best = self.at(f"{k}.router", y).softmax(-1).topk(2, -1)
            share = torch.zeros(len(x), 4).scatter(1, best.indices, best.values)
            every = torch.stack([self.expert(f"{k}.{j}", y) for j in range(4)], 1)
            x = x + self.expert(f"{k}.shared", y) + (share[..., None] * every).sum(1)
        return self.at("head", self.at("norm", x))

    other: ClassVar = {
        "lm": "head", "f": "norm",
        **{f"model.{k}.{path}.{name}": f"{k}.{at}.{role}" for k in range(2)
           for path, at in (("always", "shared"), *((f"moe.{j}", str(j)) for j in range(4)))
           for name, role in (("w3", "gate"), ("w2", "up"), ("w1", "down"))},
        **{f"model.{k}.gate": f"{k}.router" for k in range(2)}, **{f"model.{k}.ln": f"{k}.norm" for k in range(2)},
        "tok": "embed",
    }  # fmt: skip


class Decoder(Spelled):
    """A small language model."""

    task = "text"
    head = 16
    steps = 250

    def loss(self, batch: list[Tensor]) -> Tensor:
        ids = batch[0]
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


class NeoXLike(Decoder):
    """Attention and feed-forward side by side with a norm each, a quarter of each head is rotary."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed_in": nn.Embedding(72, 64)}
        for k in range(3):
            out |= {f"{k}.input_layernorm": nn.LayerNorm(64), f"{k}.post_attention_layernorm": nn.LayerNorm(64)}
            out |= {f"{k}.{n}": nn.Linear(64, 64) for n in ("query", "key", "value", "dense")}
            out |= {f"{k}.dense_h_to_4h": nn.Linear(64, 128), f"{k}.dense_4h_to_h": nn.Linear(128, 64)}
        return out | {"final_layer_norm": nn.LayerNorm(64), "embed_out": nn.Linear(64, 72, bias=False)}

    def some(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, 16)).transpose(1, 2)
        return torch.cat((turn(x[..., :4]), x[..., 4:]), -1).transpose(1, 2).flatten(2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed_in", ids)
        for k in range(3):
            y, z = self.at(f"{k}.input_layernorm", x), self.at(f"{k}.post_attention_layernorm", x)
            q, key, v = (self.at(f"{k}.{n}", y) for n in ("query", "key", "value"))
            y = self.at(f"{k}.dense", self.attend(self.some(q), self.some(key), v, causal=True))
            x = x + y + self.at(f"{k}.dense_4h_to_h", F.gelu(self.at(f"{k}.dense_h_to_4h", z)))
        return self.at("embed_out", self.at("final_layer_norm", x))

    other: ClassVar = {
        "wte": "embed_in",
        **repeated(3, "h.{}", {"ln_2": "input_layernorm", "ln_1": "post_attention_layernorm",
                               "attn.c_attn": "query+key+value|4", "attn.c_proj": "dense",
                               "mlp.c_fc": "dense_h_to_4h|T", "mlp.c_proj": "dense_4h_to_h|T"}),
        "ln_f": "final_layer_norm", "lm_head": "embed_out",
    }  # fmt: skip


class GemmaLike(Decoder):
    """Four norms in a block, gates with gelu, grouped queries, the head is the embedding; names of norms exchanged."""

    _norms: ClassVar = ("input", "post_attention", "pre_feedforward", "post_feedforward")

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed_tokens": nn.Embedding(72, 64)}
        for k in range(2):
            out |= {f"model.{k}.{n}_layernorm": nn.RMSNorm(64, 1e-6) for n in self._norms}
            out |= {f"model.{k}.q_proj": nn.Linear(64, 64, bias=False)}
            out |= {f"model.{k}.o_proj": nn.Linear(64, 64, bias=False)}
            out |= {f"model.{k}.{n}_proj": nn.Linear(64, 32, bias=False) for n in "kv"}
            out |= {f"model.{k}.{n}_proj": nn.Linear(64, 112, bias=False) for n in ("gate", "up")}
            out |= {f"model.{k}.down_proj": nn.Linear(112, 64, bias=False)}
        return out | {"norm": nn.RMSNorm(64, 1e-6), "lm_head": nn.Linear(64, 72, bias=False)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed_tokens", ids) * 8
        for k in range(2):
            at = f"model.{k}"
            y = self.at(f"{at}.input_layernorm", x)
            y = self.attend(*(self.at(f"{at}.{n}_proj", y) for n in "qkv"), causal=True, rotary=True)
            x = x + self.at(f"{at}.post_attention_layernorm", self.at(f"{at}.o_proj", y))
            y = self.at(f"{at}.pre_feedforward_layernorm", x)
            y = self.at(f"{at}.down_proj", F.gelu(self.at(f"{at}.gate_proj", y)) * self.at(f"{at}.up_proj", y))
            x = x + self.at(f"{at}.post_feedforward_layernorm", y)
        return 20 * torch.tanh(self.at("lm_head", self.at("norm", x)) / 20)

    other: ClassVar = {
        "output": "lm_head", "tok_embeddings": "embed_tokens",
        **{f"blocks.{k}.{name}": f"model.{k}.{role}" for k in range(2)
           for name, role in (("attention.wq", "q_proj|R"), ("attention.wk", "k_proj|R"), ("attention.wv", "v_proj"),
                              ("attention.wo", "o_proj"), ("feed_forward.w1", "up_proj"),
                              ("feed_forward.w2", "down_proj"), ("feed_forward.w3", "gate_proj"),
                              ("norm_1", "pre_feedforward_layernorm"), ("norm_2", "post_attention_layernorm"),
                              ("norm_3", "input_layernorm"), ("norm_4", "post_feedforward_layernorm"))},
        "norm": "norm",
    }  # fmt: skip


class OlmoLike(Decoder):
    """Norms behind the branches and on queries and keys; all that is fused is fused, and blocks count from the last."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"embed": nn.Embedding(72, 64)}
        for k in range(2):
            out |= {f"{k}.{n}": nn.RMSNorm(64, 1e-6) for n in ("q_norm", "k_norm", "attn_norm", "ff_norm")}
            out |= {f"{k}.{n}": nn.Linear(64, 64, bias=False) for n in "qkvo"}
            out |= {f"{k}.{n}": nn.Linear(64, 96, bias=False) for n in ("gate", "up")}
            out |= {f"{k}.down": nn.Linear(96, 64, bias=False)}
        return out | {"norm": nn.RMSNorm(64, 1e-6), "head": nn.Linear(64, 72, bias=False)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed", ids)
        for k in range(2):
            q, key = (self.at(f"{k}.{n}_norm", self.at(f"{k}.{n}", x)) for n in "qk")
            y = self.attend(q, key, self.at(f"{k}.v", x), causal=True, rotary=True)
            x = x + self.at(f"{k}.attn_norm", self.at(f"{k}.o", y))
            y = self.at(f"{k}.down", F.silu(self.at(f"{k}.gate", x)) * self.at(f"{k}.up", x))
            x = x + self.at(f"{k}.ff_norm", y)
        return self.at("head", self.at("norm", x))

    other: ClassVar = {
        "unembed": "head", "ln_final": "norm",
        **repeated(2, "blocks.{}", {"ln.3": "k_norm", "ln.2": "ff_norm", "ln.1": "attn_norm", "ln.0": "q_norm",
                                    "qkv": "k+q+v", "out": "o", "ff.in": "up+gate", "ff.out": "down"},
                   backwards=True),
        "embedding": "embed",
    }  # fmt: skip


class BloomLike(Decoder):
    """Attention that falls with the distance, one head of keys and values, a norm behind the embedding."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"word_embeddings": nn.Embedding(72, 64), "embed_norm": nn.LayerNorm(64)}
        for k in range(3):
            out |= {f"{k}.norm1": nn.LayerNorm(64), f"{k}.norm2": nn.LayerNorm(64)}
            out |= {f"{k}.query": nn.Linear(64, 64), f"{k}.out": nn.Linear(64, 64)}
            out |= {f"{k}.key": nn.Linear(64, 16), f"{k}.value": nn.Linear(64, 16)}
            out |= {f"{k}.up": nn.Linear(64, 128), f"{k}.down": nn.Linear(128, 64)}
        return out | {"ln_f": nn.LayerNorm(64), "lm_head": nn.Linear(64, 72, bias=False)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.at("embed_norm", self.at("word_embeddings", ids))
        count = ids.shape[1]
        far = torch.arange(count)[:, None] - torch.arange(count)
        bias = -far * 2.0 ** -torch.arange(1, 5)[:, None, None]
        bias = bias.masked_fill(far < 0, -1e9)
        for k in range(3):
            y = self.at(f"{k}.norm1", x)
            q, key, v = (self.at(f"{k}.{n}", y).unflatten(-1, (-1, 16)).transpose(1, 2)
                         for n in ("query", "key", "value"))  # fmt: skip
            y = ((q @ key.mT / 4 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + self.at(f"{k}.out", y)
            x = x + self.at(f"{k}.down", F.gelu(self.at(f"{k}.up", self.at(f"{k}.norm2", x))))
        return self.at("lm_head", self.at("ln_f", x))

    other: ClassVar = {
        "r": "lm_head", "s": "ln_f",
        **repeated(3, "t.{}", {"e": "norm2", "f": "norm1", "g": "down", "h": "up", "i": "out", "j": "query",
                               "k": "value", "l": "key"}),
        "u": "embed_norm", "v": "word_embeddings",
    }  # fmt: skip


class Cells(Vision):
    """Four stacked GRU cells over the rows, three of one shape, in another order on the other side."""

    steps = 400

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"cells.0": nn.GRUCell(8, 24)}
        return out | {f"cells.{k}": nn.GRUCell(24, 24) for k in (1, 2, 3)} | {"head": nn.Linear(24, 10)}

    def forward(self, x: Tensor) -> Tensor:
        h = [x.new_zeros(len(x), 24) for _ in range(4)]
        for row in x[:, 0].unbind(1):
            for k in range(4):
                h[k] = self.at(f"cells.{k}", row if k == 0 else h[k - 1], h[k])
        return self.at("head", h[3])

    other: ClassVar = {
        "read": "head", "top": "cells.1", "middle": "cells.3", "bottom": "cells.2", "first": "cells.0",
    }  # fmt: skip


class ThreeTasks(Spelled):
    """One trunk with a gate and three heads of one shape for three questions about a table's rows."""

    task = "table"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"trunk1": nn.Linear(30, 40), "bn1": nn.BatchNorm1d(40), "trunk2": nn.Linear(40, 40)}
        out |= {"bn2": nn.BatchNorm1d(40), "gate": nn.Linear(40, 40)}
        for n in ("label", "radius", "texture"):
            out |= {f"{n}.hidden": nn.Linear(40, 20), f"{n}.out": nn.Linear(20, 1)}
        return out

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, labels = batch
        y = F.relu(self.at("bn1", self.at("trunk1", x)))
        z = F.relu(self.at("bn2", self.at("trunk2", y)))
        z = z * self.at("gate", y).sigmoid() + y
        a, b, c = (self.at(f"{n}.out", F.relu(self.at(f"{n}.hidden", z)))[:, 0] for n in ("label", "radius", "texture"))
        wanted = (labels.float(), (x[:, 0] > 0).float(), (x[:, 1] > 0).float())
        return sum(F.binary_cross_entropy_with_logits(*both) for both in zip((a, b, c), wanted))

    other: ClassVar = {
        **{f"heads.{k}.{name}": f"{at}.{role}" for k, at in enumerate(("texture", "label", "radius"))
           for name, role in (("1", "out"), ("0", "hidden"))},
        "body.norms.0": "bn2", "body.norms.1": "bn1", "body.lin.0": "gate", "body.lin.1": "trunk2",
        "body.lin.2": "trunk1",
    }  # fmt: skip


class Variance(Spelled):
    """Two noisy views whose features agree, vary and do not repeat each other (VICReg)."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"encoder.0": nn.Linear(64, 40), "encoder.1": nn.LayerNorm(40)}
        out |= {"encoder.2": nn.Linear(40, 40), "expander.0": nn.Linear(40, 40), "expander.1": nn.LayerNorm(40)}
        return out | {"expander.2": nn.Linear(40, 40, bias=False)}

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.at("encoder.2", F.relu(self.at("encoder.1", self.at("encoder.0", x)))))
        return self.at("expander.2", F.relu(self.at("expander.1", self.at("expander.0", x))))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0].flatten(1)
        one, other = (self.features(x + 0.1 * torch.randn_like(x)) for _ in range(2))
        total = 25 * F.mse_loss(one, other)
        for z in (one, other):
            z = z - z.mean(0)
            c = z.mT @ z / (len(z) - 1)
            total = total + 25 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
            total = total + (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]
        return total

    other: ClassVar = {
        "tail.last": "expander.2|T", "tail.norm": "expander.1", "tail.first": "expander.0", "net.last": "encoder.2",
        "net.norm": "encoder.1", "net.first": "encoder.0",
    }  # fmt: skip


class Triplets(Spelled):
    """An embedding in which digits of a kind lie together (supervised contrastive), convolutions and batch norms."""

    task = "classify"

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"conv1": conv(1, 16), "bn1": nn.BatchNorm2d(16)}
        for k in (2, 3):
            out |= {f"conv{k}": conv(16, 16), f"bn{k}": nn.BatchNorm2d(16)}
        return out | {"proj1": nn.Linear(64, 64), "proj2": nn.Linear(64, 16)}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, labels = batch
        for k in (1, 2, 3):
            x = F.relu(self.at(f"bn{k}", self.at(f"conv{k}", x)))
            x = F.max_pool2d(x, 2) if k > 1 else x
        x = F.normalize(self.at("proj2", F.relu(self.at("proj1", x.flatten(1)))), dim=-1)
        scores = (x @ x.mT / 0.2).fill_diagonal_(-1e9)
        same = (labels[:, None] == labels).float().fill_diagonal_(0)
        share = (scores.log_softmax(1) * same).sum(1) / same.sum(1).clamp_min(1)
        return -share.mean()

    other: ClassVar = {
        "emb.1": "proj2", "emb.0": "proj1|T", "norm.2": "bn2", "norm.1": "bn3", "norm.0": "bn1", "filt.2": "conv1",
        "filt.1": "conv2", "filt.0": "conv3",
    }  # fmt: skip


class Prefixed(Table):
    """A gated residual network over a table with two branches that are multiplied, and swapped names of both."""

    def layers(self) -> dict[str, Made]:
        out: dict[str, Made] = {"lift": nn.Linear(30, 32)}
        for k in range(3):
            out |= {f"{k}.left": nn.Linear(32, 32), f"{k}.right": nn.Linear(32, 32), f"{k}.norm": nn.LayerNorm(32)}
        return out | {"score": nn.Linear(32, 2)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("lift", x)
        for k in range(3):
            x = self.at(f"{k}.norm", x + self.at(f"{k}.left", x).tanh() * self.at(f"{k}.right", x).sigmoid())
        return self.at("score", x)

    other: ClassVar = {
        "score": "score", "lift": "lift",
        **{f"{k}.{name}": f"{k}.{role}" for k in range(3)
           for name, role in (("left", "right"), ("right", "left"), ("norm", "norm"))},
    }  # fmt: skip


NETS = (
    PreAct, LayerScaled, SquareMixer, GroupUNet, Conditional, TwoWays, Towers, SharedExperts, NeoXLike, GemmaLike,
    OlmoLike, BloomLike, Cells, ThreeTasks, Variance, Triplets, Prefixed,
)  # fmt: skip
