"""Go on training after a refactor, as if nothing had happened: weights, optimizer moments, schedule and step counter.

1. Train a small vision transformer on scikit-learn's handwritten digits for six epochs: the run nobody interrupts.
2. Train another one, from the same start, for three epochs only, and save a Lightning checkpoint.
3. Refactor: other names, another order of registration, the fused query-key-value layer split into three.
4. Match, write the plan, convert the checkpoint, and train the new network for the other three epochs with
   ``trainer.fit(ckpt_path="new.ckpt")``.
5. Compare: the weights are those of the run that was never interrupted, bit for bit.

The same from a terminal, steps 4::

    lit-wsl map old.ckpt --model resume_across_refactor.py:NewNet --plan plan.json
    lit-wsl convert old.ckpt --plan plan.json -o new.ckpt

Run it with ``python examples/resume_across_refactor.py``; it takes about half a minute on two cores. It checks what it
shows, and ends with exit code 1 if anything of it is not so.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lit_wsl import WeightMapper, WeightTransferCallback
from lit_wsl.convert.checkpoint import convert_checkpoint
from lit_wsl.convert.weights import convert_tensors
from lit_wsl.plan.file import plan_to_text

EPOCHS, INTERRUPTED, WIDTH = 6, 3, 32

# ---- the data --------------------------------------------------------------------------------------------------------


class ShuffledByEpoch(Sampler[int]):
    """An order that depends on the epoch alone, so that a resumed run sees what an uninterrupted one sees."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def digits() -> DataLoader:
    """1797 real images of handwritten digits, 8 x 8 pixels, as sequences of 16 patches."""
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4) / 16.0
    data = TensorDataset(x, torch.as_tensor(labels))
    return DataLoader(data, batch_size=128, sampler=ShuffledByEpoch(len(data)), drop_last=True)


# ---- before and after the refactor -----------------------------------------------------------------------------------


class Classifier(LightningModule):
    """What both networks share: loss, optimizer and schedule."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=EPOCHS * 14)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OldBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        x = x + self.c_proj(scaled_dot_product_attention(q, k, v))
        return x + self.mlp(self.ln_2(x))


class OldNet(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Linear(4, WIDTH)
        self.wpe = nn.Parameter(torch.randn(16, WIDTH) * 0.02)
        self.h = nn.ModuleList([OldBlock() for _ in range(3)])
        self.ln_f = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wte(x) + self.wpe
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x).mean(1))


class Attention(nn.Module):
    """Three layers where there was one; still computed as one product, so that not a single rounding differs."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.query, self.key, self.value)
        joined = linear(x, torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
        return self.out(scaled_dot_product_attention(*joined.chunk(3, dim=-1)))


class NewBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down, self.norm2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class NewNet(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(WIDTH, 10)
        self.layers = nn.ModuleList([NewBlock() for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH)
        self.patches = nn.Linear(4, WIDTH)
        self.positions = nn.Parameter(torch.randn(16, WIDTH) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(1))


# ---- the story -------------------------------------------------------------------------------------------------------


def train(
    model: LightningModule, epochs: int, folder: Path, ckpt_path: Path | None = None, callbacks: tuple = ()
) -> Trainer:
    """Train up to ``epochs`` epochs, quietly; reports go to the folder."""
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(model, digits(), ckpt_path=ckpt_path)
    return trainer


def loss(model: nn.Module) -> float:
    """Mean loss on all images."""
    x, y = digits().dataset.tensors
    with torch.no_grad():
        return cross_entropy(model(x), y).item()


def farthest(model: nn.Module, wanted: dict[str, Tensor]) -> float:
    """Largest difference between a model's weights and the wanted ones."""
    return max((value - wanted[name]).abs().max().item() for name, value in model.state_dict().items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Go on training after a refactor.")
    parser.add_argument("--output", type=Path, default=None, help="folder for checkpoints and the plan")
    folder: Path = parser.parse_args().output or Path(tempfile.mkdtemp(prefix="resume-"))
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)

    old = OldNet()
    uninterrupted = copy.deepcopy(old)
    train(uninterrupted, EPOCHS, folder)
    train(old, INTERRUPTED, folder).save_checkpoint(folder / "old.ckpt")
    print(f"old network: {EPOCHS} epochs without interruption, loss {loss(uninterrupted):.6f}")
    print(f"old network: {INTERRUPTED} epochs, loss {loss(old):.6f}, saved to {folder / 'old.ckpt'}\n")

    sample = (digits().dataset.tensors[0][:2],)
    plan = WeightMapper.from_checkpoint(folder / "old.ckpt", NewNet(), dummy_input=sample[0]).suggest_mapping().plan
    plan.save(folder / "plan.json")
    print("the plan, as a person reads it:")
    print("\n".join(line for line in plan_to_text(plan).splitlines() if '"map"' in line), "\n")
    done = convert_checkpoint(folder / "old.ckpt", folder / "new.ckpt", plan)
    print(f"converted: {done.tensors} tensors, the optimizer's state of {done.states} parameters\n")

    new = NewNet()
    trainer = train(new, EPOCHS, folder, ckpt_path=folder / "new.ckpt")
    inside = NewNet()
    train(inside, EPOCHS, folder, callbacks=(WeightTransferCallback(folder / "old.ckpt", resume="all", verbose=False),))
    fresh = NewNet()
    train(fresh, EPOCHS - INTERRUPTED, folder, callbacks=(WeightTransferCallback(folder / "old.ckpt", verbose=False),))

    wanted = convert_tensors(uninterrupted.state_dict(), plan)
    gaps = {"converted": farthest(new, wanted), "resume='all'": farthest(inside, wanted)}
    gaps["weights only"] = farthest(fresh, wanted)
    for name, model in (("converted", new), ("resume='all'", inside), ("weights only", fresh)):
        print(f"{name:>13}: loss {loss(model):.6f}, farthest weight from the uninterrupted run {gaps[name]:.3g}")
    claims = {
        "all weights of the new network were found": len(plan.by_target) == len(new.state_dict()),
        "the step counter went on": trainer.global_step == EPOCHS * 14,
        "the converted checkpoint goes on bit for bit": gaps["converted"] == 0,
        "resume='all' inside a run does too": gaps["resume='all'"] == 0,
        "without the optimizer's state it is another run": gaps["weights only"] > 0,
    }
    print()
    for claim, holds in claims.items():
        print("yes" if holds else "NO ", claim)
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
