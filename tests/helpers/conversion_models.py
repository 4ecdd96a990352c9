"""Small Lightning models before and after a refactor, and the plans between them; shared by the tests of conversion."""

import copy

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl.convert.weights import convert_tensors
from lit_wsl.plan.operations import run_shapes
from lit_wsl.structure import describe
from lit_wsl.transfer import PlanEntry, SideSummary, Split, TransferPlan, Unmatched

WIDTH, CLASSES = 8, 5


def make_plan(old, new, steps):
    """A plan from ``(sources, targets, operations)``, in the new model's order, as a matcher would write it."""
    source, target = describe(old), describe(new)
    entries = []
    for sources, targets, operations in steps:
        shapes = tuple(source[name].shape for name in sources)
        results = tuple(run_shapes(operations, shapes))
        assert results == tuple(target[name].shape for name in targets)
        kind = target[targets[0]].kind
        entries.append(PlanEntry(tuple(sources), tuple(targets), tuple(operations), shapes, results, kind))
    entries.sort(key=lambda entry: target[entry.targets[0]].index)
    filled = {name for entry in entries for name in entry.targets}
    used = {name for entry in entries for name in entry.sources}
    return TransferPlan(
        tuple(entries),
        SideSummary.of(source),
        SideSummary.of(target),
        unmatched_source=tuple(Unmatched(i.name, i.shape, i.kind, "") for i in source.parameters if i.name not in used),
        unmatched_target=tuple(
            Unmatched(i.name, i.shape, i.kind, "") for i in target.parameters if i.name not in filled
        ),
    )


class Trained(pl.LightningModule):
    """The part of training that a refactor leaves alone; ``configure`` makes the optimizers."""

    def __init__(self, configure=None):
        super().__init__()
        self.configure = configure or adamw_with_schedule

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return self.configure(self)


def adamw_with_schedule(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class OldBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        x = x + self.c_proj(F.softmax(q @ k.transpose(1, 2) / WIDTH**0.5, dim=-1) @ v)
        return x + self.mlp(self.ln_2(x))


class OldTransformer(Trained):
    def __init__(self, configure=None):
        super().__init__(configure)
        self.wte = nn.Embedding(11, WIDTH)
        self.h = nn.ModuleList([OldBlock() for _ in range(2)])
        self.ln_f = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.wte(x)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x).mean(1))


class NewAttention(nn.Module):
    """Three projections where there was one; ``fused`` computes them as one, so that not a single rounding differs."""

    def __init__(self, fused):
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fused = fused

    def forward(self, x):
        if self.fused:
            parts = (self.q, self.k, self.v)
            joined = F.linear(x, torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
            q, k, v = joined.chunk(3, dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(F.softmax(q @ k.transpose(1, 2) / WIDTH**0.5, dim=-1) @ v)


class NewBlock(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.attention = NewAttention(fused)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class NewTransformer(Trained):
    """Renamed, in another order of registration, and with the fused projection split."""

    def __init__(self, fused=True, configure=None):
        super().__init__(configure)
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.layers = nn.ModuleList([NewBlock(fused) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.tokens = nn.Embedding(11, WIDTH)

    def forward(self, x):
        x = self.tokens(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(1))


def transformer_plan(old, new):
    steps = [(("wte.weight",), ("tokens.weight",), ())]
    for leaf in ("weight", "bias"):
        steps += [((f"{a}.{leaf}",), (f"{b}.{leaf}",), ()) for a, b in (("ln_f", "norm"), ("head", "classifier"))]
        for i in range(2):
            names = [("ln_1", "norms.0"), ("ln_2", "norms.1"), ("c_proj", "attention.out"), ("mlp.0", "up")]
            names += [("mlp.2", "down")]
            steps += [((f"h.{i}.{a}.{leaf}",), (f"layers.{i}.{b}.{leaf}",), ()) for a, b in names]
            parts = [f"layers.{i}.attention.{x}.{leaf}" for x in "qkv"]
            steps.append(((f"h.{i}.c_attn.{leaf}",), parts, (Split(0, (WIDTH,) * 3),)))
    return make_plan(old, new, steps)


class OldConvNet(Trained):
    def __init__(self, configure=None):
        super().__init__(configure)
        self.stem = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x):
        x = self.body(F.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3), keepdim=True)).flatten(1)


class NewConvNet(Trained):
    """Wrapped, reordered, the 1x1 convolution a Linear."""

    def __init__(self, configure=None):
        super().__init__(configure)
        self.head = nn.Linear(6, CLASSES)
        self.net = nn.ModuleDict(
            {
                "norm_2": nn.BatchNorm2d(6),
                "norm_1": nn.BatchNorm2d(4),
                "conv_1": nn.Conv2d(1, 4, 3),
                "conv_2": nn.Conv2d(4, 6, 3),
            }
        )

    def forward(self, x):
        x = F.relu(self.net["norm_1"](self.net["conv_1"](x)))
        x = F.relu(self.net["norm_2"](self.net["conv_2"](x))).mean((2, 3), keepdim=True)
        return F.conv2d(x, self.head.weight[:, :, None, None], self.head.bias).flatten(1)


def conv_plan(old, new):
    from lit_wsl.transfer import Reshape

    pairs = {"stem": "net.conv_1", "bn": "net.norm_1", "body.0": "net.conv_2", "body.1": "net.norm_2", "fc": "head"}
    steps = []
    for name in describe(old).by_name:
        module, _, leaf = name.rpartition(".")
        change = (Reshape((CLASSES, 6, 1, 1), (CLASSES, 6)),) if name == "fc.weight" else ()
        steps.append(((name,), (f"{pairs[module]}.{leaf}",), change))
    return make_plan(old, new, steps)


def tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 11, (16, 4), generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, CLASSES, (16,), generator=generator)), batch_size=4)


def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, CLASSES, (16,), generator=generator)), batch_size=4)


def trainer(folder, epochs, callbacks=(), checkpoints=False):
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )


def fit(model, data, folder, epochs, ckpt_path=None, callbacks=()):
    """Train up to ``epochs`` epochs and return the trainer."""
    runner = trainer(folder, epochs, callbacks)
    runner.fit(model, data, ckpt_path=ckpt_path)
    return runner


CASES = {
    "transformer": (OldTransformer, NewTransformer, transformer_plan, tokens),
    "conv net": (OldConvNet, NewConvNet, conv_plan, images),
}


def interrupted(old, data, folder, *, after=2, of):
    """Train a model to ``old.ckpt`` in the folder, and a twin of it that nothing interrupts to the end; give the twin.

    Args:
        old: The model; trained in place. The generator should be seeded before it is made.
        data: Makes the data loader.
        folder: Where to.
        after: Epochs to the checkpoint.
        of: Epochs in all.
    """
    twin = copy.deepcopy(old)
    fit(old, data(), folder, after).save_checkpoint(folder / "old.ckpt")
    fit(twin, data(), folder, of)
    return twin


def differing(new, old, plan):
    """Names of the tensors of a model that are not bit for bit those of the old one, brought over by the plan."""
    expected, found = convert_tensors(old.state_dict(), plan), new.state_dict()
    assert set(expected) == set(found)
    return [name for name, value in found.items() if not torch.equal(value, expected[name])]
