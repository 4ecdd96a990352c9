"""The main job, end to end, on real images: a refactored network starts from its old checkpoint.

1. Train a small ResNet with attention pooling on scikit-learn's handwritten digits and save a Lightning checkpoint.
2. Refactor it as people do: other names, a backbone and a head, the fused query-key-value layer split into three.
3. Fit the new network through ``Trainer`` with ``WeightTransferCallback`` and look at it before any training step.

Run it with ``make demo`` (or ``python examples/demo_digits.py``); it takes well under a minute on two cores. It checks
what it shows, and ends with exit code 1 if anything of it is not so.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl import WeightTransferCallback

# ---- the data --------------------------------------------------------------------------------------------------------


class Digits(LightningDataModule):
    """1797 real images of handwritten digits, 8 x 8 pixels; every fifth is kept for validation."""

    def __init__(self) -> None:
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        x = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16.0
        y = torch.as_tensor(labels)
        train, val = train_test_split(torch.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
        self.train_set, self.val_set = TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=64, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, batch_size=120)


class Classifier(LightningModule):
    """What both networks share: the loss, the optimiser and the accuracy."""

    peak_lr = 5e-3

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean())
        return logits

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.peak_lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.peak_lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# ---- the network as it was -------------------------------------------------------------------------------------------


class OldBlock(nn.Module):
    """A residual block: two convolutions with batch norm, and a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(y + (x if self.downsample is None else self.downsample(x)))


class OldNet(Classifier):
    """Everything in one class, one fused layer for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(OldBlock(16, 16), OldBlock(16, 16))
        self.layer2 = nn.Sequential(OldBlock(16, 32, stride=2), OldBlock(32, 32))
        self.qkv = nn.Linear(32, 3 * 32)
        self.proj = nn.Linear(32, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(relu(self.bn1(self.conv1(x)))))
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        tokens = tokens + self.proj(scaled_dot_product_attention(q, k, v))
        return self.fc(tokens.mean(dim=1))


# ---- the network after the refactoring -------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """A convolution and its batch norm: the pair that was written out by hand before."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.filter = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.normalize = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(self.filter(x))


class ResidualUnit(nn.Module):
    """The same block, from the new building blocks."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.expand = ConvNorm(inputs, outputs, stride=stride)
        self.refine = ConvNorm(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.refine(relu(self.expand(x))) + self.shortcut(x))


class Backbone(nn.Module):
    """Image to feature map."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = ConvNorm(1, width)
        self.stages = nn.ModuleList(
            [
                nn.ModuleList([ResidualUnit(width, width), ResidualUnit(width, width)]),
                nn.ModuleList([ResidualUnit(width, 2 * width, stride=2), ResidualUnit(2 * width, 2 * width)]),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.stem(x))
        for stage in self.stages:
            for unit in stage:
                x = unit(x)
        return x


class AttentionHead(nn.Module):
    """Feature map to class scores, with one layer each for queries, keys and values."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed = scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        return self.classifier((tokens + self.output(mixed)).mean(dim=1))


class NewNet(Classifier):
    """The same network to a person, another one to ``load_state_dict``: not one name is left."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = AttentionHead()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


# ---- the job ---------------------------------------------------------------------------------------------------------


class BeforeTraining(Callback):
    """Keep what the network says in the sanity check: the whole validation set, before any training step."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Tensor, *_) -> None:
        if trainer.sanity_checking:
            assert trainer.global_step == 0
            self.batches.append(outputs.detach().clone())

    @property
    def logits(self) -> Tensor:
        return torch.cat(self.batches)


def make_trainer(folder: Path, name: str, epochs: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=CSVLogger(folder, name=name),
        callbacks=list(callbacks),
        num_sanity_val_steps=-1,  # the whole validation set before the first step
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@torch.no_grad()
def predict(network: nn.Module, data: Digits) -> Tensor:
    """Class scores of every validation image."""
    network.eval()
    return torch.cat([network(x) for x, _ in data.val_dataloader()])


def share_right(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for checkpoint and logs")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the old network's training")
    args = parser.parse_args()
    folder, epochs = args.output, args.epochs
    console = Console()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")

    torch.set_num_threads(1)  # on images this small, more threads only wait for each other

    data = Digits()
    labels = data.val_set.tensors[1]

    console.rule("1. The old network")
    seed_everything(0, verbose=False)
    old = OldNet()
    trainer = make_trainer(folder, "old", epochs)
    trainer.fit(old, data)
    checkpoint = folder / "old.ckpt"
    trainer.save_checkpoint(checkpoint)
    old_logits = predict(old, data)
    console.print(f"Trained for {epochs} epochs, {share_right(old_logits, labels):.2%} right, saved as {checkpoint}")

    console.rule("2. The refactored network, strict=False")
    seed_everything(1, verbose=False)
    silent = NewNet()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    silent.load_state_dict(state, strict=False)
    loaded = len(silent.state_dict().keys() & state.keys())
    silent_logits = predict(silent, data)
    console.print(f"{loaded} of {len(silent.state_dict())} tensors loaded, and no error.")

    console.rule("3. The refactored network, WeightTransferCallback, before any training step")
    seed_everything(1, verbose=False)
    new, look = NewNet(), BeforeTraining()
    new.peak_lr = 5e-4  # it has been trained already
    # "lenient" is the default: the running statistics of batch norm go with their layers. Without them ("exclude")
    # the weights are all there and the network still answers like an untrained one.
    transfer = WeightTransferCallback(checkpoint, buffers="lenient")
    trainer = make_trainer(folder, "new", 2, transfer, look)
    trainer.fit(new, data)
    new_logits, later_logits = look.logits, predict(new, data)
    for entry in transfer.report.plan:
        if entry.operations:
            console.print(f"{entry.badge}: {', '.join(entry.sources)} -> {', '.join(entry.targets)}", highlight=False)

    console.rule("Result")
    same = int((new_logits.argmax(1) == old_logits.argmax(1)).sum())
    table = Table("network", "right", "same prediction as before", box=None, pad_edge=False)
    for label, logits in (
        ("old, trained", old_logits),
        ("refactored, strict=False", silent_logits),
        ("refactored, WeightTransferCallback", new_logits),
        ("the same, two epochs later", later_logits),
    ):
        agree = int((logits.argmax(1) == old_logits.argmax(1)).sum())
        table.add_row(label, f"{share_right(logits, labels):.2%}", f"{agree} of {len(labels)} images")
    console.print(table)
    difference = (new_logits - old_logits).abs().max().item()
    console.print(f"Largest difference of a class score, new against old: {difference:.1e}")

    claims = {
        "the old network is right on more than 95 % of the images": share_right(old_logits, labels) > 0.95,
        "strict=False loaded nothing and said nothing": loaded == 0 and share_right(silent_logits, labels) < 0.5,
        "the fused layer was split into three": sum(e.badge == "split" for e in transfer.report.plan) == 2,
        "every image got the old network's prediction before any training step": same == len(labels),
        "class scores agree to rounding": difference < 1e-4,
    }
    for claim, holds in claims.items():
        console.print(f"[{'green' if holds else 'bold red'}]{'yes' if holds else 'NO '}[/]  {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
