"""Tiny Lightning models and data for the callback's tests."""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


class Base(L.LightningModule):
    """Trains on what it is given; records what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(float(x.double().sum()))
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class InInit(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()


class InSetup(Base):
    def setup(self, stage):
        if not hasattr(self, "net"):
            self.net = network()


class InConfigureModel(Base):
    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = network()


class InBoth(Base):
    """Half of the network is built in __init__, half in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))

    def configure_model(self):
        if len(self.net) == 4:
            self.net.append(nn.Linear(8, 3))


class SetupForData(InInit):
    """Overrides setup, but not to build anything."""

    def setup(self, stage):
        self.stage = stage


BUILDERS = [InInit, InSetup, InConfigureModel, InBoth, SetupForData]


def dataset(n: int = 16, seed: int = 0) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g))


def loader(**kwargs) -> DataLoader:
    return DataLoader(dataset(), batch_size=4, **kwargs)


class Augmented(Dataset):
    """Draws from every generator there is, its own included, and counts."""

    def __init__(self, n: int = 16) -> None:
        self.data = dataset(n)
        self.rng = np.random.default_rng(3)
        self.generator = torch.Generator().manual_seed(4)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        self.reads += 1
        noise = torch.rand(4) + np.random.rand() + random.random() + self.rng.random() + self.reads * 0.01
        return x + 0.1 * noise.float() + 0.1 * torch.rand(4, generator=self.generator), y


class Data(L.LightningDataModule):
    """Random split, shuffling with its own generator, augmentation, hooks on the batch."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers
        self.loaders_made = 0

    def setup(self, stage):
        self.data = Augmented()
        self.order = torch.Generator().manual_seed(5)

    def train_dataloader(self):
        self.loaders_made += 1
        torch.rand(1)
        return DataLoader(self.data, 4, shuffle=True, generator=self.order, num_workers=self.workers)

    def val_dataloader(self):
        return DataLoader(self.data, 4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + torch.randn(1) * 0.01, batch[1]


class Measured(InInit):
    """Holds metrics, in forward too."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.mean = torchmetrics.MeanMetric()

    def forward(self, x):
        self.mean.update(x.mean())
        self.log("mean", self.mean)
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)
        return loss
