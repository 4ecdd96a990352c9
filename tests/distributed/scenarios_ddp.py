"""What two processes do under DDP; run by ``launch.run_ranks``, judged by ``test_ddp.py``."""

from __future__ import annotations

import hashlib
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from models_dist import New, expected_state, make_plan, old_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl import WeightTransferCallback

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore")


def digest(module: nn.Module, *, buffers: bool = True) -> str:
    sha = hashlib.sha256()
    tensors = module.state_dict() if buffers else dict(module.named_parameters())
    for name, tensor in tensors.items():
        sha.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


class Lit(LightningModule):
    """The new network, built when ``built`` says."""

    def __init__(self, built: str = "init") -> None:
        super().__init__()
        self.built = built
        if built == "init":
            self.net = New()

    def setup(self, stage: str) -> None:
        if self.built == "setup":
            self.net = New()

    def configure_model(self) -> None:
        if self.built == "configure_model" and not hasattr(self, "net"):
            self.net = New()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(Callback):
    """Note the weights before the first step and at the end."""

    def __init__(self) -> None:
        self.before = self.start = ""
        self.equal = False
        self.state: dict[str, Tensor] = {}

    def look(self, module: LightningModule) -> None:
        self.before, self.start = digest(module.net), digest(module.net, buffers=False)
        self.state = {name: tensor.detach().clone() for name, tensor in module.net.state_dict().items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.before:
            self.look(pl_module)

    def matches(self, expected: dict[str, Tensor]) -> bool:
        return all(torch.equal(self.state[name], tensor) for name, tensor in expected.items())


def save_old(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The old checkpoint, written by rank zero, and what the new network must hold."""
    old = old_model()
    path = folder / "old.ckpt"
    if dist.get_rank() == 0:
        torch.save({"state_dict": old.state_dict()}, path)
    dist.barrier()
    return path, expected_state(old)


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(16, 6, generator=torch.Generator().manual_seed(1))), batch_size=4)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        limit_train_batches=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=CSVLogger(folder, name="logs", version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "devices": 2,
            "strategy": DDPStrategy(process_group_backend="gloo"),
            "max_epochs": 1,
            "enable_checkpointing": False,
            **options,
        },
    )


def _fit(folder: Path, built: str) -> dict[str, Any]:
    import lit_wsl.transfer.api as api

    planned: list[str] = []
    check = api.check_floor
    api.check_floor = lambda *a, **k: planned.append("here") or check(*a, **k)  # called once where the plan is made
    path, expected = save_old(folder)
    torch.manual_seed(100 + dist.get_rank())  # other initial weights on each rank
    model, watch = Lit(built), Watch()
    transfer = WeightTransferCallback(path, plan=make_plan("net."), verbose=False)
    try:
        trainer(folder, transfer, watch).fit(model, data())
    finally:
        api.check_floor = check
    return {
        "equal": watch.matches(expected),
        "before": watch.before,
        "start": watch.start,
        "after": digest(model.net, buffers=False),  # running statistics are each rank's own until the next forward
        "planned": len(planned),
        "loaded": len(transfer.report.loaded),
        "reports": len(list(folder.glob("logs/**/weight_transfer.json"))),
    }


def built_in_init(folder: Path) -> dict[str, Any]:
    return _fit(folder, "init")


def built_in_setup(folder: Path) -> dict[str, Any]:
    return _fit(folder, "setup")


def built_in_configure_model(folder: Path) -> dict[str, Any]:
    return _fit(folder, "configure_model")


def one_trainer_each(folder: Path) -> dict[str, Any]:
    """Two processes of one group, each with a trainer of its own; only one of them transfers."""
    path, expected = save_old(folder)
    watch = Watch()
    if dist.get_rank() == 1:
        transfer = WeightTransferCallback(path, plan=make_plan("net."), verbose=False)
        trainer(folder, transfer, watch, devices=1, strategy="auto").fit(Lit(), data())
    return {"equal": dist.get_rank() == 0 or watch.matches(expected)}


def validate_alone(folder: Path) -> dict[str, Any]:
    path, expected = save_old(folder)
    watch = Watch()
    transfer = WeightTransferCallback(path, plan=make_plan("net."), verbose=False)
    trainer(folder, transfer, watch).validate(Lit(), data(), verbose=False)
    return {"equal": watch.matches(expected), "before": watch.before}


class OldLit(LightningModule):
    """Flat and under other names, all renamed in :class:`Refactored`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Linear(6, 10), nn.BatchNorm1d(10)
        self.conv2, self.fc = nn.Linear(10, 7), nn.Linear(7, 3)


class Refactored(Lit):
    """What the old one became; ``lazy``: its first layer gets its shape from the first batch."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__("")
        first = nn.LazyLinear(10) if lazy else nn.Linear(6, 10)
        backbone = nn.Sequential(first, nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 7))
        self.net = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(7, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["head"](self.net["backbone"](x))


def _matched(folder: Path, lazy: bool) -> dict[str, Any]:
    torch.manual_seed(2)
    old = OldLit()
    path = folder / "old.ckpt"
    if dist.get_rank() == 0:
        torch.save({"state_dict": old.state_dict()}, path)
    dist.barrier()
    names = {"conv1": "backbone.0", "bn1": "backbone.1", "conv2": "backbone.3", "fc": "head"}
    expected = {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in old.state_dict().items()
    }
    torch.manual_seed(100 + dist.get_rank())
    watch, transfer = Watch(), WeightTransferCallback(path, verbose=False)
    trainer(folder, transfer, watch).fit(Refactored(lazy), data())
    return {"equal": watch.matches(expected), "before": watch.before, "missing": list(transfer.report.missing)}


def matched_without_a_plan(folder: Path) -> dict[str, Any]:
    return _matched(folder, lazy=False)


def lazy_modules(folder: Path) -> dict[str, Any]:
    return _matched(folder, lazy=True)


def resume(folder: Path) -> dict[str, Any]:
    """A resumed checkpoint wins over the transfer, on every rank."""
    path, _ = save_old(folder)
    model = Lit()
    first = trainer(folder, WeightTransferCallback(path, plan=make_plan("net."), verbose=False))
    first.fit(model, data())
    first.save_checkpoint(folder / "run.ckpt")
    trained = digest(model.net, buffers=False)
    watch = Watch()
    transfer = WeightTransferCallback(path, plan=make_plan("net."), verbose=False)
    trainer(folder, transfer, watch, max_epochs=2).fit(Lit(), data(), ckpt_path=folder / "run.ckpt")
    return {
        "resumed": watch.start == trained,
        "applied": transfer.report.applied,
        "notes": list(transfer.report.notes),
    }


def _failing(folder: Path, checkpoint: Path, wreck=None) -> dict[str, Any]:
    torch.manual_seed(5)
    model = Lit()
    before = digest(model)
    transfer = WeightTransferCallback(checkpoint, plan=make_plan("net."), verbose=False)
    try:
        trainer(folder, transfer).fit(model, data())
    except Exception as error:
        return {"kind": type(error).__name__, "message": str(error), "unchanged": digest(model) == before}
    return {"kind": "none"}


def missing_on_rank_one(folder: Path) -> dict[str, Any]:
    path, _ = save_old(folder)
    return _failing(folder, path if dist.get_rank() == 0 else folder / "elsewhere.ckpt")


def truncated_on_rank_one(folder: Path) -> dict[str, Any]:
    path, _ = save_old(folder)
    if dist.get_rank() == 1:
        half = folder / "half.ckpt"
        half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        path = half
    return _failing(folder, path)


def another_model_on_rank_one(folder: Path) -> dict[str, Any]:
    path, _ = save_old(folder)
    if dist.get_rank() == 1:
        path = folder / "other.ckpt"
        torch.save({"state_dict": nn.Linear(3, 4).state_dict()}, path)
    return _failing(folder, path)


def copy_fails_on_rank_one(folder: Path) -> dict[str, Any]:
    import lit_wsl.transfer.apply as apply

    path, _ = save_old(folder)
    copy, calls = apply.copy_into, []

    def fails(target: Tensor, value: Tensor) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise OSError("the disk went away")
        copy(target, value)

    if dist.get_rank() == 1:
        apply.copy_into = fails
    try:
        return _failing(folder, path)
    finally:
        apply.copy_into = copy


def fails_everywhere(folder: Path) -> dict[str, Any]:
    return _failing(folder, folder / "nowhere.ckpt")
