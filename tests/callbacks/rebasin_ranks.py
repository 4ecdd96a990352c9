"""Scenarios that run in two processes; see tests/distributed/launch.py."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl.callbacks import RebasinCallback


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, strategy, reference):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 6, generator=generator)
    labels = torch.randint(0, 3, (32,), generator=generator)
    if torch.distributed.get_rank() == 0:
        torch.save({"state_dict": Net().state_dict()}, folder / "base.ckpt")
    torch.distributed.barrier()
    callback = RebasinCallback(folder / "base.ckpt", folder / reference)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder / "root",
    )
    trainer.fit(Net(), DataLoader(TensorDataset(images, labels), batch_size=8))
    report = callback.report
    share = None if report is None else report.models["run"].on_weights.identity_share
    return {"finished": trainer.state.finished, "share": share}


def ddp(folder):
    return fit(folder, "ddp", "base.ckpt")


def ddp_failing(folder):
    return fit(folder, "ddp", "nowhere.ckpt")
