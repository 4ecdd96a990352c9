"""Handwritten digits, 8 x 8 pixels (scikit-learn)."""

import torch
from lightning import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


class Digits(LightningDataModule):
    """1797 real images; the last 360 are for validation.

    Args:
        batch_size: Images per batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        x, y = torch.as_tensor(images, dtype=torch.float32) / 16, torch.as_tensor(labels)
        self.train, self.val = TensorDataset(x[:-360], y[:-360]), TensorDataset(x[-360:], y[-360:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 360)
