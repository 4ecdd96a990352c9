"""What became of it: an encoder of blocks and a head."""

from itertools import pairwise

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Block(nn.Module):
    """Linear, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.projection = nn.Linear(inputs, outputs)
        self.normalisation = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalisation(self.projection(x)).relu()


class Classifier(LightningModule):
    """The refactored model.

    Args:
        widths: Output sizes of the blocks.
        lr: Learning rate.
    """

    def __init__(self, widths: tuple[int, ...] = (128, 96), lr: float = 3e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = (64, *widths)
        self.encoder = nn.Sequential(*(Block(a, b) for a, b in pairwise(sizes)))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        if self.trainer.sanity_checking:
            print(f"before the first step: {accuracy:.2%} right")
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
