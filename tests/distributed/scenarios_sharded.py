"""What two processes do with sharded models; run by ``launch.run_ranks``, judged by ``test_sharded.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import runs_dist
import torch
import torch.distributed as dist
from checks_dist import attempt, differing, failing_copy, little_memory_to_undo, save, save_old, whole
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from models_dist import New, make_plan, old_model
from runs_dist import data, transfer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lit_wsl import transfer_weights
from lit_wsl.structure import trace_execution_order
from lit_wsl.transfer.ranks import held_part

TP_PLAN = {
    **{f"body.{name}": ColwiseParallel(output_layouts=Replicate()) for name in ("query", "key", "value", "gate_up")},
    "body.down": RowwiseParallel(input_layouts=Replicate()),
    "head": RowwiseParallel(input_layouts=Replicate()),
}


class Lit(runs_dist.Lit):
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


def shard(net: nn.Module, mesh: Any, how: str) -> None:
    if how == "fsdp2":
        for part in (net.body, net.experts, net):
            fully_shard(part, mesh=mesh["data_parallel"])
    else:
        parallelize_module(net, mesh["tensor_parallel"], TP_PLAN)


class Watch(runs_dist.Watch):
    """Also how much of the network this rank holds."""

    def look(self, module: LightningModule) -> None:
        super().look(module)
        tensors = dict(module.net.named_parameters())
        self.sharded = sum(isinstance(t, DTensor) for t in tensors.values())
        self.held = sum(held_part(t).numel() for t in tensors.values())
        self.total = sum(t.numel() for t in tensors.values())


def trainer(folder: Path, sharding: str, *callbacks: Callback, **options: Any) -> Trainer:
    fsdp = sharding == "fsdp2"
    strategy = ModelParallelStrategy(
        data_parallel_size=2 if fsdp else 1, tensor_parallel_size=1 if fsdp else 2, process_group_backend="gloo"
    )
    return runs_dist.quiet_trainer(folder, *callbacks, strategy=strategy, **options)


def _fit(folder: Path, sharding: str, meta: bool) -> dict[str, Any]:
    path, expected = save_old(folder)
    torch.manual_seed(100 + dist.get_rank())
    watch, callback = Watch(), transfer(path)
    trainer(folder, sharding, callback, watch).fit(Lit(sharding, meta), data())
    return {
        "wrong": differing(watch.state, expected),
        "sharded": watch.sharded,
        "held": watch.held,
        "total": watch.total,
        "loaded": len(callback.report.loaded),
        "reports": runs_dist.reports(folder),
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
    trainer(folder, "fsdp2", transfer(path), watch).validate(Lit("fsdp2"), data(), verbose=False)
    return {"wrong": differing(watch.state, expected)}


def matched_without_a_plan(folder: Path) -> dict[str, Any]:
    """No plan given: names that a prefix separates, matched on rank zero."""
    torch.manual_seed(3)
    source = New()
    path = save(folder / "same.ckpt", {"state_dict": {f"net.{n}": t for n, t in source.state_dict().items()}})
    watch, callback = Watch(), transfer(path, plan=None)
    trainer(folder, "fsdp2", callback, watch).fit(Lit("fsdp2"), data())
    return {"wrong": differing(watch.state, source.state_dict()), "notes": list(callback.report.notes)}


def restored(folder: Path) -> dict[str, Any]:
    path, expected = save_old(folder)
    model = Lit("fsdp2")
    first = trainer(folder, "fsdp2", transfer(path))
    first.fit(model, data())
    first.save_checkpoint(folder / "run.ckpt")
    parameters = dict(model.net.named_parameters())  # running statistics are each rank's own
    trained = {name: tensor for name, tensor in whole(model.net).items() if name in parameters}
    watch, callback = Watch(), transfer(path)
    second = trainer(folder, "fsdp2", callback, watch, max_epochs=2)
    second.fit(Lit("fsdp2"), data(), ckpt_path=folder / "run.ckpt")
    return {
        "wrong": differing(watch.state, trained),
        "moved": len(differing(watch.state, expected)),
        "applied": callback.report.applied,
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
        "wrong": differing(state, expected),
        "difference": difference,
        "loaded": len(report.loaded),
    }


class Registered(nn.Module):
    """Four layers, registered last to first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in "zyxw"})

    def forward(self, x: Tensor) -> Tensor:
        for name in "wxyz":
            x = self.layers[name](x).tanh()
        return x


class LitRegistered(runs_dist.Lit):
    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = Registered()
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def execution_order(folder: Path) -> dict[str, Any]:
    """A sharded model is not run, and yet its order is known: by the data's sample, and by one that is given."""
    path = save(folder / "same.ckpt", Registered().state_dict())
    callback = transfer(path, plan=None)
    trainer(folder, "fsdp2", callback).fit(LitRegistered(), data())
    mesh = init_device_mesh("cpu", (2,))
    reports = [callback.report]
    for sample in (torch.ones(2, 6), torch.ones(2, 5)):  # the second does not fit
        net = Registered()
        fully_shard(net, mesh=mesh)
        reports.append(transfer_weights(net, path, example_args=(sample,)))
    expected = trace_execution_order(Registered(), (torch.ones(2, 6),))
    orders = [{i.name.removeprefix("net."): i.execution_order for i in report.target.parameters} for report in reports]
    return {"right": [order == expected for order in orders], "notes": [list(report.notes) for report in reports]}


def _failing(net: nn.Module, path: Path) -> dict[str, Any]:
    return attempt(net, lambda: transfer_weights(net, path, plan=make_plan()))


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


def copy_fails_on_rank_one(folder: Path) -> dict[str, Any]:
    path, _ = save_old(folder)
    with failing_copy(6):
        return _failing(_plain("fsdp2"), path)


def copy_fails_on_rank_one_tensor_parallel(folder: Path) -> dict[str, Any]:
    path, _ = save_old(folder)
    with failing_copy(2):
        return _failing(_plain("tp"), path)


def last_copy_fails_on_rank_one(folder: Path) -> dict[str, Any]:
    """When rank zero is through with all of its copies, far more than the undo log takes into memory."""
    path, expected = save_old(folder)
    with failing_copy(len(expected)), little_memory_to_undo():
        return _failing(_plain("fsdp2"), path)


def last_copy_fails_and_the_disk_is_full(folder: Path) -> dict[str, Any]:
    import lit_wsl.transfer.apply as apply

    path, expected = save_old(folder)
    room, apply.room_on_disk = apply.room_on_disk, lambda size: False
    try:
        with failing_copy(len(expected)), little_memory_to_undo():
            return _failing(_plain("fsdp2"), path)
    finally:
        apply.room_on_disk = room


def sharded_source(folder: Path) -> dict[str, Any]:
    net, source = _plain("fsdp2"), _plain("fsdp2")
    return attempt(net, lambda: transfer_weights(net, source.state_dict()))


def wrapped_by_fsdp_one(folder: Path) -> dict[str, Any]:
    from lit_wsl.errors import TransferError
    from lit_wsl.transfer.ranks import refuse_wrapped

    net = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    try:
        refuse_wrapped(nn.Sequential(net))
    except TransferError as error:
        return {"message": str(error)}
    return {"message": ""}
