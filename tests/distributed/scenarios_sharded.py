"""What two processes do with sharded models; run by ``launch.run_ranks``, judged by ``test_sharded.py``."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from models_dist import New, expected_state, make_plan, old_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl import WeightTransferCallback, transfer_weights
from lit_wsl.transfer.distributed import held_part

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore")

TP_PLAN = {
    **{f"body.{name}": ColwiseParallel(output_layouts=Replicate()) for name in ("query", "key", "value", "gate_up")},
    "body.down": RowwiseParallel(input_layouts=Replicate()),
    "head": RowwiseParallel(input_layouts=Replicate()),
}


class Lit(LightningModule):
    """The new network, made and sharded in ``configure_model`` as Lightning asks."""

    def __init__(self, sharding: str, meta: bool = False) -> None:
        super().__init__()
        self.sharding, self.meta = sharding, meta

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        with torch.device("meta" if self.meta else "cpu"):
            self.net = New()
        shard(self.net, self.device_mesh, self.sharding)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def shard(net: nn.Module, mesh: Any, how: str) -> None:
    if how == "fsdp2":
        for part in (net.body, net.experts, net):
            fully_shard(part, mesh=mesh["data_parallel"])
    else:
        parallelize_module(net, mesh["tensor_parallel"], TP_PLAN)


def whole(net: nn.Module) -> dict[str, Tensor]:
    """Whole tensors on every rank, as plain copies."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in net.state_dict().items()
    }


class Watch(Callback):
    """Note the weights before the first step."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.sharded = self.held = self.total = 0

    def look(self, module: LightningModule) -> None:
        self.state = whole(module.net)
        tensors = dict(module.net.named_parameters())
        self.sharded = sum(isinstance(t, DTensor) for t in tensors.values())
        self.held = sum(held_part(t).numel() for t in tensors.values())
        self.total = sum(t.numel() for t in tensors.values())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.state:
            self.look(pl_module)

    def result(self, expected: dict[str, Tensor]) -> dict[str, Any]:
        wrong = sorted(name for name, tensor in expected.items() if not torch.equal(self.state[name], tensor))
        return {"wrong": wrong, "sharded": self.sharded, "held": self.held, "total": self.total}


def save_old(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    old = old_model()
    path = folder / "old.ckpt"
    if dist.get_rank() == 0:
        torch.save({"state_dict": old.state_dict()}, path)
    dist.barrier()
    return path, expected_state(old)


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(16, 6, generator=torch.Generator().manual_seed(1))), batch_size=4)


def trainer(folder: Path, sharding: str, *callbacks: Callback, **options: Any) -> Trainer:
    fsdp = sharding == "fsdp2"
    strategy = ModelParallelStrategy(
        data_parallel_size=2 if fsdp else 1, tensor_parallel_size=1 if fsdp else 2, process_group_backend="gloo"
    )
    return Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        limit_train_batches=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=CSVLogger(folder, name="logs", version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, **options},
    )


def _fit(folder: Path, sharding: str, meta: bool) -> dict[str, Any]:
    path, expected = save_old(folder)
    torch.manual_seed(100 + dist.get_rank())
    watch = Watch()
    transfer = WeightTransferCallback(path, plan=make_plan("net."), verbose=False)
    trainer(folder, sharding, transfer, watch).fit(Lit(sharding, meta), data())
    return {
        **watch.result(expected),
        "loaded": len(transfer.report.loaded),
        "reports": len(list(folder.glob("logs/**/weight_transfer.json"))),
    }


def fsdp2(folder: Path) -> dict[str, Any]:
    return _fit(folder, "fsdp2", meta=False)


def fsdp2_meta(folder: Path) -> dict[str, Any]:
    return _fit(folder, "fsdp2", meta=True)


def tensor_parallel(folder: Path) -> dict[str, Any]:
    return _fit(folder, "tp", meta=False)


def tensor_parallel_meta(folder: Path) -> dict[str, Any]:
    return _fit(folder, "tp", meta=True)


def validate_alone(folder: Path) -> dict[str, Any]:
    path, expected = save_old(folder)
    watch = Watch()
    transfer = WeightTransferCallback(path, plan=make_plan("net."), verbose=False)
    trainer(folder, "fsdp2", transfer, watch).validate(Lit("fsdp2"), data(), verbose=False)
    return watch.result(expected)


def matched_without_a_plan(folder: Path) -> dict[str, Any]:
    """No plan given: names that a prefix separates, matched on rank zero."""
    torch.manual_seed(3)
    source = New()
    path = folder / "same.ckpt"
    if dist.get_rank() == 0:
        torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in source.state_dict().items()}}, path)
    dist.barrier()
    watch = Watch()
    trainer(folder, "fsdp2", WeightTransferCallback(path, verbose=False), watch).fit(Lit("fsdp2"), data())
    return watch.result(source.state_dict())


def resume(folder: Path) -> dict[str, Any]:
    path, expected = save_old(folder)
    model = Lit("fsdp2")
    first = trainer(folder, "fsdp2", WeightTransferCallback(path, plan=make_plan("net."), verbose=False))
    first.fit(model, data())
    first.save_checkpoint(folder / "run.ckpt")
    parameters = dict(model.net.named_parameters())  # running statistics are each rank's own
    trained = {name: tensor for name, tensor in whole(model.net).items() if name in parameters}
    watch = Watch()
    transfer = WeightTransferCallback(path, plan=make_plan("net."), verbose=False)
    second = trainer(folder, "fsdp2", transfer, watch, max_epochs=2)
    second.fit(Lit("fsdp2"), data(), ckpt_path=folder / "run.ckpt")
    return {
        "resumed": watch.result(trained)["wrong"],
        "moved": len(watch.result(expected)["wrong"]),
        "applied": transfer.report.applied,
    }


# ---- without a trainer -----------------------------------------------------------------------------------------------


def _plain(how: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel" if how == "fsdp2" else "tensor_parallel",))
    torch.manual_seed(7)
    net = New()
    shard(net, mesh, how)
    return net


def function_alone(folder: Path) -> dict[str, Any]:
    """``transfer_weights`` on a sharded model, called on all ranks; the network then computes what the old one did."""
    path, expected = save_old(folder)
    net = _plain("fsdp2")
    report = transfer_weights(net, path, plan=make_plan())
    state = whole(net)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))
    net.eval()
    with torch.no_grad():
        difference = (net(x) - old_model()(x)).abs().max().item()
    return {
        "wrong": sorted(n for n, t in expected.items() if not torch.equal(state[n], t)),
        "difference": difference,
        "loaded": len(report.loaded),
    }


def _failing(net: nn.Module, path: Path) -> dict[str, Any]:
    before = whole(net)
    try:
        transfer_weights(net, path, plan=make_plan())
    except Exception as error:
        after = whole(net)
        unchanged = all(torch.equal(after[name], before[name]) for name in before)
        return {"kind": type(error).__name__, "message": str(error), "unchanged": unchanged}
    return {"kind": "none"}


def missing_on_rank_one(folder: Path) -> dict[str, Any]:
    path, _ = save_old(folder)
    return _failing(_plain("fsdp2"), path if dist.get_rank() == 0 else folder / "elsewhere.ckpt")


def older_file_on_rank_one(folder: Path) -> dict[str, Any]:
    """The same names and shapes, the weights of another epoch."""
    path, _ = save_old(folder)
    if dist.get_rank() == 1:
        path = folder / "older.ckpt"
        torch.save({"state_dict": old_model(seed=1).state_dict()}, path)
    return _failing(_plain("fsdp2"), path)


def _copy_fails(folder: Path, how: str, after: int) -> dict[str, Any]:
    import lit_wsl.transfer.apply as apply

    path, _ = save_old(folder)
    net = _plain(how)
    copy, calls = apply.copy_into, []

    def fails(target: Tensor, value: Tensor) -> None:
        calls.append(1)
        if len(calls) == after:
            raise OSError("the disk went away")
        copy(target, value)

    if dist.get_rank() == 1:
        apply.copy_into = fails
    try:
        return _failing(net, path)
    finally:
        apply.copy_into = copy


def copy_fails_on_rank_one(folder: Path) -> dict[str, Any]:
    return _copy_fails(folder, "fsdp2", after=6)


def copy_fails_on_rank_one_tensor_parallel(folder: Path) -> dict[str, Any]:
    return _copy_fails(folder, "tp", after=2)


def sharded_source(folder: Path) -> dict[str, Any]:
    net, source = _plain("fsdp2"), _plain("fsdp2")
    before = whole(net)
    try:
        transfer_weights(net, source.state_dict())
    except Exception as error:
        after = whole(net)
        unchanged = all(torch.equal(after[name], before[name]) for name in before)
        return {"kind": type(error).__name__, "message": str(error), "unchanged": unchanged}
    return {"kind": "none"}


def wrapped_by_fsdp_one(folder: Path) -> dict[str, Any]:
    from lit_wsl.errors import TransferError
    from lit_wsl.transfer.distributed import refuse_wrapped

    net = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    try:
        refuse_wrapped(nn.Sequential(net))
    except TransferError as error:
        return {"message": str(error)}
    return {"message": ""}
