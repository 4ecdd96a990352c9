"""Training that goes on across a refactor in two processes; run by ``launch``, judged by ``test_resume_ranks.py``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import runs_dist
import torch
import torch.distributed as dist
from checks_dist import differing, save, whole
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from models_dist import New, make_plan, old_model
from runs_dist import transfer
from scenarios_fsdp_one import OnCpu, Trained
from scenarios_sharded import shard
from scenarios_sharded import trainer as sharded_trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from conversion_models import NewBlock, NewTransformer, OldTransformer, tokens, transformer_plan

from lit_wsl.convert.weights import convert_tensors
from lit_wsl.transfer import TransferPlan
from lit_wsl.transfer.ranks import held_part

BEFORE, ALL = 2, 5  # epochs


class Lit(runs_dist.Lit):
    """A network that is made and, on a mesh, sharded in ``configure_model``."""

    def __init__(self, make: Callable[[], nn.Module], sharding: str = "none", meta: bool = False) -> None:
        super().__init__()
        self.make, self.sharding, self.meta = make, sharding, meta

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        with torch.device("meta" if self.meta else "cpu"):
            self.net = self.make()
        if self.sharding == "fsdp2":
            blocks = self.net.layers if hasattr(self.net, "layers") else self.net.h
            for part in (*blocks, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
        elif self.sharding == "tp":
            shard(self.net, self.device_mesh, "tp")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if len(batch) == 1:
            return self(batch[0]).square().mean()
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 2e-3}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 5e-3], total_steps=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Data(LightningDataModule):
    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make, self.seen = make, 0

    def train_dataloader(self) -> Any:
        return self.make()

    def state_dict(self) -> dict[str, int]:
        return {"seen": 7}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.seen = state_dict["seen"]


class Steps(Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.count = state_dict["count"]


def under_net(plan: TransferPlan) -> TransferPlan:
    """The plan, for models that have the network as ``net``."""
    entries = (
        replace(e, sources=tuple(f"net.{n}" for n in e.sources), targets=tuple(f"net.{n}" for n in e.targets))
        for e in plan.entries
    )
    return replace(plan, entries=tuple(entries))


def one_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return runs_dist.quiet_trainer(folder, *callbacks, devices=1, strategy="auto", logger=False, **options)


def fit(trainer: Trainer, model: Lit, data: Callable[[], Any]) -> dict[str, Any]:
    """Train, and tell where the run has come."""
    module = Data(data)
    trainer.fit(model, module)
    optimizer = trainer.optimizers[0]
    held = [
        (p, optimizer.state[p]["exp_avg"]) for group in optimizer.param_groups for p in group["params"] if p.numel()
    ]
    return {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "rates": [group["lr"] for group in optimizer.param_groups],
        "decays": [group["weight_decay"] for group in optimizer.param_groups],
        "steps": sorted({int(state["step"]) for state in optimizer.state.values()}),
        "seen": module.seen,
        "counted": [c.count for c in trainer.callbacks if isinstance(c, Steps)],
        "as sharded as the weights": all(
            held_part(p).shape == held_part(m).shape and isinstance(p, DTensor) == isinstance(m, DTensor)
            for p, m in held
        ),
    }


def everything(epochs: int, *, as_given: bool = False) -> dict[str, Any]:
    """Options of a trainer; Lightning deals out and shuffles the data, by the epoch, unless told otherwise."""
    return {"max_epochs": epochs, "limit_train_batches": 1.0, "use_distributed_sampler": not as_given}


def with_net(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"net.{name}": tensor for name, tensor in state.items()}


def old_in_one_process(
    folder: Path, net: nn.Module, data: Callable[[], Any], kind: type[Lit] = Lit
) -> tuple[Path, dict[str, Tensor], Any]:
    """Train the old network alone: its checkpoint after the first epochs, and where all epochs lead."""
    model = kind(lambda: copy.deepcopy(net))
    trainer = one_trainer(folder, Steps(), **everything(BEFORE))
    trainer.fit(model, Data(data))
    path = folder / "old.ckpt"
    if dist.get_rank() == 0:
        trainer.save_checkpoint(path)
    dist.barrier()
    uninterrupted = kind(lambda: copy.deepcopy(net))
    reached = fit(one_trainer(folder, Steps(), **everything(ALL)), uninterrupted, data)
    return path, whole(uninterrupted), reached


def transformer() -> OldTransformer:
    torch.manual_seed(0)
    return OldTransformer()


def transformers_plan() -> TransferPlan:
    return under_net(transformer_plan(OldTransformer(), NewTransformer()))


# ---- the same data on every rank: what one process would have come to ------------------------------------------------


def _same_data(folder: Path, sharding: str, *, meta: bool = False) -> dict[str, Any]:
    path, uninterrupted, reached = old_in_one_process(folder, transformer(), tokens)
    plan = transformers_plan()
    callback, options = transfer(path, plan=plan, resume="all"), everything(ALL, as_given=True)
    torch.manual_seed(100 + dist.get_rank())
    model = Lit(NewTransformer, sharding, meta)
    if sharding == "none":
        strategy = DDPStrategy(process_group_backend="gloo")
        trainer = runs_dist.quiet_trainer(folder, callback, Steps(), strategy=strategy, **options)
    else:
        trainer = sharded_trainer(folder, sharding, callback, Steps(), **options)
    found = fit(trainer, model, tokens)
    return {
        "wrong": differing(whole(model), convert_tensors(uninterrupted, plan)),
        "reached": found,
        "uninterrupted": reached,
        "notes": list(callback.report.notes),
    }


def ddp(folder: Path) -> dict[str, Any]:
    return _same_data(folder, "none")


def fsdp2_from_a_file(folder: Path) -> dict[str, Any]:
    return _same_data(folder, "fsdp2", meta=True)


def one_process_from_a_folder(folder: Path) -> dict[str, Any]:
    """Two ranks wrote it, one process goes on."""
    _, uninterrupted, reached = old_in_one_process(folder, transformer(), tokens)
    trainer = sharded_trainer(folder, "fsdp2", Steps(), **everything(BEFORE, as_given=True))
    trainer.fit(Lit(transformer, "fsdp2"), Data(tokens))
    trainer.save_checkpoint(folder / "sharded")
    plan, model = transformers_plan(), Lit(NewTransformer)
    callback = transfer(folder / "sharded", plan=plan, resume="all")
    found = fit(one_trainer(folder, callback, Steps(), **everything(ALL)), model, tokens)
    return {
        "wrong": differing(whole(model), convert_tensors(uninterrupted, plan)),
        "reached": found,
        "uninterrupted": reached,
    }


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """Every lossless operation; sums are taken in another order, so equal to rounding."""
    path, uninterrupted, reached = old_in_one_process(folder, old_model().train(), runs_dist.data)
    plan = under_net(make_plan())
    expected = convert_tensors(uninterrupted, plan)

    def run(resume: str, *epochs: int) -> tuple[float, dict[str, Any]]:
        model, callback = Lit(New, "tp"), transfer(path, plan=plan, resume=resume)
        trainer = sharded_trainer(folder, "tp", callback, Steps(), **everything(*epochs, as_given=True))
        found = fit(trainer, model, runs_dist.data)
        state = whole(model)
        return max((state[n].double() - t.double()).abs().max().item() for n, t in expected.items()), found

    difference, found = run("all", ALL)
    afresh, _ = run("weights", ALL - BEFORE)
    return {"difference": difference, "afresh": afresh, "reached": found, "uninterrupted": reached}


# ---- every rank its own data: what the same ranks would have come to -------------------------------------------------


def _own_data(
    folder: Path, resume: str, data: Callable[[], Any], *, distributed: bool, as_given: bool
) -> dict[str, Any]:
    plan = transformers_plan()
    old = Lit(transformer, "fsdp2")
    trainer = sharded_trainer(folder, "fsdp2", Steps(), **everything(BEFORE, as_given=as_given))
    trainer.strategy._save_distributed_checkpoint = distributed
    trainer.fit(old, Data(data))
    trainer.save_checkpoint(folder / "old.ckpt")
    uninterrupted = Lit(transformer, "fsdp2")
    options = everything(ALL, as_given=as_given)
    reached = fit(sharded_trainer(folder, "fsdp2", Steps(), **options), uninterrupted, data)
    model, callback = Lit(NewTransformer, "fsdp2"), transfer(folder / "old.ckpt", plan=plan, resume=resume)
    options = everything(ALL if resume == "all" else ALL - BEFORE, as_given=as_given)
    found = fit(sharded_trainer(folder, "fsdp2", callback, Steps(), **options), model, data)
    return {
        "wrong": differing(whole(model), convert_tensors(whole(uninterrupted), plan)),
        "a folder": (folder / "old.ckpt").is_dir(),
        "reached": found,
        "uninterrupted": reached,
    }


def fsdp2_from_a_folder(folder: Path) -> dict[str, Any]:
    return _own_data(folder, "all", tokens, distributed=True, as_given=False)


def fsdp2_optimizer_only(folder: Path) -> dict[str, Any]:
    """From one file that sharded ranks wrote, in which indices are places among the model's parameters."""

    def own_half() -> DataLoader:
        return DataLoader(Subset(tokens().dataset, range(dist.get_rank(), 16, 2)), batch_size=4)

    return _own_data(folder, "optimizer", own_half, distributed=False, as_given=True)


# ---- flattened by FSDPStrategy ---------------------------------------------------------------------------------------


class OneGroup(Lit):
    """What is flattened has neither matrices nor vectors to tell apart; made and not sharded in ``configure_model``."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, eps=1e-3, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _flattened(folder: Path, **options: Any) -> dict[str, Any]:
    path, uninterrupted, reached = old_in_one_process(folder, transformer(), tokens, kind=OneGroup)
    plan, model, end = transformers_plan(), OneGroup(NewTransformer), Trained()
    callback = transfer(path, plan=plan, resume="all")
    strategy = OnCpu(process_group_backend="gloo", auto_wrap_policy={NewBlock}, **options)
    epochs = everything(ALL, as_given=True)
    trainer = runs_dist.quiet_trainer(folder, callback, Steps(), end, strategy=strategy, logger=False, **epochs)
    found = fit(trainer, model, tokens)
    expected = convert_tensors(uninterrupted, plan)
    return {
        "wrong": differing(end.state, {n: t for n, t in expected.items() if n in end.state}),
        "compared": len(end.state),
        "flat": end.flat,
        "reached": found,
        "uninterrupted": reached,
    }


def fsdp1(folder: Path) -> dict[str, Any]:
    return _flattened(folder)


def fsdp1_flat(folder: Path) -> dict[str, Any]:
    return _flattened(folder, use_orig_params=False)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def fails_on_rank_one(folder: Path) -> dict[str, Any]:
    import lit_wsl.convert.engines as engines

    path, _, _ = old_in_one_process(folder, transformer(), tokens)
    part, calls = engines.part_of, []

    def fails(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 9 and dist.get_rank() == 1:
            raise OSError("the disk went away")
        return part(*args)

    engines.part_of = fails
    model = Lit(NewTransformer, "fsdp2")
    trainer = sharded_trainer(folder, "fsdp2", transfer(path, plan=transformers_plan(), resume="all"))
    try:
        trainer.fit(model, Data(tokens))
    finally:
        engines.part_of = part
    return {}


def a_copy_of_the_weights(folder: Path) -> dict[str, Any]:
    path, _, _ = old_in_one_process(folder, transformer(), tokens)
    content = torch.load(path, weights_only=True)
    averaged = folder / "averaged.ckpt"
    save(averaged, {**content, "current_model_state": content["state_dict"], "averaging_state": {}})
    callback = transfer(averaged, plan=transformers_plan(), resume="all")
    sharded_trainer(folder, "fsdp2", callback).fit(Lit(NewTransformer, "fsdp2"), Data(tokens))
    return {}
