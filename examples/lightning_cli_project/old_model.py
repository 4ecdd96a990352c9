"""The model as it was last year. Run this file to train it and save ``old.ckpt``."""

import torch
from data import Digits
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class OldClassifier(LightningModule):
    """Two layers and a head, all in one class."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(64, 128), nn.BatchNorm1d(128)
        self.fc2, self.norm2 = nn.Linear(128, 96), nn.BatchNorm1d(96)
        self.out = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.fc1(x)).relu()
        return self.out(self.norm2(self.fc2(x)).relu())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    seed_everything(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=5, **quiet)
    trainer.fit(OldClassifier(), datamodule=Digits())
    trainer.save_checkpoint("old.ckpt")
    print(f"old model: {trainer.callback_metrics['val_accuracy']:.2%} right")
