"""The two networks that the guides use: one as it was, one after a refactoring. Tiny, so that pages run in seconds."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset


class Shapes(LightningDataModule):
    """Random 8 x 8 images of three classes, always the same ones."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(48) % 3
        x = torch.randn(48, 1, 8, 8, generator=generator) + y.view(-1, 1, 1, 1)
        self.data = TensorDataset(x, y)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=16)


class Classifier(LightningModule):
    """The training that both networks share."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_accuracy", accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class OldNet(Classifier):
    """As it was: everything flat, one fused layer for queries, keys and values."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.qkv = nn.Linear(24, 3 * 24)
        self.fc = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.conv2(relu(self.bn1(self.conv1(x)))))
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        return self.fc((tokens + scaled_dot_product_attention(q, k, v)).mean(1))


class Attention(nn.Module):
    """Queries, keys and values as layers of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))


class NewNet(Classifier):
    """After the refactoring: a backbone and a head, the fused layer split into three."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "stem": nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
                "down": nn.Sequential(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()),
                "attention": Attention(24),
            }
        )
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone["down"](self.backbone["stem"](x))
        return self.head(self.backbone["attention"](x.flatten(2).transpose(1, 2)).mean(1))


def train_old(path: str = "old.ckpt", epochs: int = 1) -> OldNet:
    """Train the old network for a moment and save a Lightning checkpoint of it."""
    seed_everything(0, verbose=False)
    model = OldNet()
    trainer = quiet_trainer(max_epochs=epochs)
    trainer.fit(model, datamodule=Shapes())
    trainer.save_checkpoint(path)
    return model


def quiet_trainer(**options: object) -> Trainer:
    """A trainer on the CPU that prints and writes nothing by itself."""
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **options})  # type: ignore[arg-type]
