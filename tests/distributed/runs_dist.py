"""What the scenarios with a trainer share: a Lightning model around ``New``, its data, a quiet trainer."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from checks_dist import whole
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from models_dist import make_plan
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl import WeightTransferCallback

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore")


class Lit(LightningModule):
    """The part of training that all have in common; the network is ``self.net``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Watch(Callback):
    """Note the weights before the first step."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def look(self, module: LightningModule) -> None:
        self.state = whole(module.net)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.state:
            self.look(pl_module)


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(16, 6, generator=torch.Generator().manual_seed(1))), batch_size=4)


def transfer(path: Path, **options: Any) -> WeightTransferCallback:
    return WeightTransferCallback(path, **{"plan": make_plan("net."), "verbose": False, **options})


def quiet_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "devices": 2,
            "logger": CSVLogger(folder, name="logs", version=0),
            "limit_train_batches": 1,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "max_epochs": 1,
            "enable_checkpointing": False,
            **options,
        },
    )


def reports(folder: Path) -> int:
    return len(list(folder.glob("logs/**/weight_transfer.json")))
