"""Scenarios that run in two processes; see tests/distributed/launch.py."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl.callbacks import RebasinCallback
from lit_wsl.rebasin import infer_permutation_spec


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


class Sharded(Net):
    """Every layer cut up over both ranks (FSDP2)."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if not any(hasattr(p, "full_tensor") for p in self.parameters()):
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def fit(folder, strategy, reference, model=Net, **options):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 6, generator=generator)
    labels = torch.randint(0, 3, (32,), generator=generator)
    if torch.distributed.get_rank() == 0:
        torch.save({"state_dict": Net().state_dict()}, folder / "base.ckpt")
    torch.distributed.barrier()
    callback = RebasinCallback(folder / "base.ckpt", folder / reference, **options)
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
    trainer.fit(model(), DataLoader(TensorDataset(images, labels), batch_size=8))
    report = callback.report
    matched = None if report is None else report.models["run"].on_weights
    return {"finished": trainer.state.finished, "share": None if matched is None else matched.identity_share}


def ddp(folder):
    return fit(folder, "ddp", "base.ckpt")


def ddp_failing(folder):
    return fit(folder, "ddp", "nowhere.ckpt")


def sharded(folder):
    return fit(folder, strategy(), "base.ckpt", Sharded)


def sharded_with_a_spec(folder):
    if torch.distributed.get_rank() == 0:
        infer_permutation_spec(Net(), (torch.randn(2, 6),)).to_json(folder / "spec.json")
    return fit(
        folder, strategy(), "base.ckpt", Sharded, spec=folder / "spec.json", merge="average", update_model="merged"
    )


def strategy():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
