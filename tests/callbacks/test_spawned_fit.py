"""A fit in two processes that Lightning spawns; ``test_lives_ddp.py`` has the lives of processes that others start."""

from __future__ import annotations

import atexit
import logging
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl import WeightTransferCallback


class Task(L.LightningModule):
    def training_step(self, batch, _):
        return self(batch[0]).square().mean()

    test_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Old(Task):
    def __init__(self):
        super().__init__()
        self.encoder, self.fc = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.encoder(x).tanh())


class New(Task):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.trunk(x))


class Start(L.Callback):
    """What each process starts with, in a file of its own."""

    def __init__(self, folder):
        self.folder = folder

    def setup(self, trainer, pl_module, stage):
        # A gloo group that is still there when Python ends may abort its process: a thread of the group drops a
        # tensor and waits for an interpreter that is gone (pytorch issue 190489). Lightning closes NCCL's only.
        if torch.distributed.is_initialized():
            atexit.register(torch.distributed.destroy_process_group)

    def on_train_start(self, trainer, pl_module):
        torch.save(pl_module.head.weight.detach(), self.folder / f"start{trainer.global_rank}.pt")


def data():
    return DataLoader(TensorDataset(torch.randn(16, 4, generator=torch.Generator().manual_seed(0))), 4)


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        accelerator="cpu", enable_model_summary=False, max_epochs=1, callbacks=list(callbacks), **quiet, **options
    )


def spawned(folder: Path) -> None:
    """Fit in two spawned processes, then test in this one with the same trainer and with a new one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    model, transfer = New(), WeightTransferCallback(folder / "old.ckpt", verbose=False)
    runner = trainer(transfer, Start(folder), strategy=strategy, devices=2)
    runner.fit(model, data())
    torch.save(model.state_dict(), folder / "trained.pt")
    runner.test(model, data(), verbose=False)
    trainer(WeightTransferCallback(folder / "old.ckpt", verbose=False), devices=1).test(model, data(), verbose=False)
    torch.save(model.state_dict(), folder / "tested.pt")


def test_a_spawned_fit_starts_from_the_old_weights_and_no_test_takes_back_what_it_trained(tmp_path):
    old = Old()
    torch.save({"state_dict": old.state_dict(), "pytorch-lightning_version": L.__version__}, tmp_path / "old.ckpt")
    # a script of its own, as the processes that Lightning spawns import it again
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"start{rank}.pt"), old.fc.weight)
    trained, tested = torch.load(tmp_path / "trained.pt"), torch.load(tmp_path / "tested.pt")
    assert not torch.equal(trained["head.weight"], old.fc.weight)
    assert trained.keys() == tested.keys()
    assert all(torch.equal(trained[name], tested[name]) for name in trained)


if __name__ == "__main__":
    spawned(Path(sys.argv[1]))
