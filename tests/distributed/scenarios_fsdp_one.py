"""Lightning's ``FSDPStrategy`` (FullyShardedDataParallel) in two processes; judged by ``test_fsdp_one.py``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from checks_dist import differing, save, save_old
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from models_dist import Body, Experts, New, old_model
from runs_dist import data, quiet_trainer, transfer
from scenarios_ddp import Lit
from torch import nn
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap, wrap

from lit_wsl.errors import LitWslError
from lit_wsl.transfer.memory import recall


class OnCpu(FSDPStrategy):
    """The trainer refuses ``FSDPStrategy`` on a CPU, which can wrap but not run; hooks and their order are the same."""

    def model_sharded_context(self) -> Any:
        return enable_wrap(wrapper_cls=FullyShardedDataParallel, device_id=torch.device("cpu"), **self.kwargs)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        self.before_wrapping = {name: t.detach().clone() for name, t in model.net.state_dict().items()}
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


class Wrapped(Exception):
    """The strategy is set up; a step would need a GPU."""


class Wrapping(Lit):
    """Wraps its parts itself, as Lightning's guide shows for large models."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = New()
            self.net.body = wrap(self.net.body)


class OnMeta(Lit):
    """Made without memory, for the strategy to materialise part by part."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            with torch.device("meta"):
                self.net = New()


class Stop(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer.strategy.model, FullyShardedDataParallel)
        raise Wrapped


class Trained(Callback):
    """Note the whole parameters at the end of training, and of how many parts of its own the model is made."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = trainer.strategy.model
        self.wrapped = sum(isinstance(m, FullyShardedDataParallel) for m in model.modules())
        self.flat = sum(isinstance(p, FlatParameter) for p in trainer.optimizers[0].param_groups[0]["params"])
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            self.state = {name: p.detach().clone() for name, p in model.named_parameters()}


def _fit(folder: Path, model: LightningModule, **options: Any) -> dict[str, Any]:
    """Train an epoch on the same data on both ranks, as one process does that needs no transfer."""
    path, expected = save_old(folder)
    strategy, callback, end = OnCpu(process_group_backend="gloo", **options), transfer(path), Trained()
    epoch = {"limit_train_batches": 1.0, "use_distributed_sampler": False, "logger": False}
    quiet_trainer(folder, callback, end, strategy=strategy, **epoch).fit(model, data())
    alone = Lit("init")
    alone.net.load_state_dict(expected)
    quiet_trainer(folder, devices=1, strategy="auto", **epoch).fit(alone, data())
    parameters = {name: p.detach() for name, p in alone.named_parameters()}
    return {
        "wrong": differing(strategy.before_wrapping, expected),
        "loaded": len(callback.report.loaded),
        "wrapped": end.wrapped,
        "flat": end.flat,
        "names": list(end.state) == list(parameters),
        "difference": max((end.state[n] - p).abs().max().item() for n, p in parameters.items()),
        "moved": min((p - expected[n.removeprefix("net.")]).abs().max().item() for n, p in parameters.items()),
    }


def built_in_init(folder: Path) -> dict[str, Any]:
    return _fit(folder, Lit("init"))


def built_in_configure_model(folder: Path) -> dict[str, Any]:
    return _fit(folder, Lit("configure_model"))


def wrapped_by_a_policy(folder: Path) -> dict[str, Any]:
    """Its parts wrapped one by one, the parameters flattened under their modules' names."""
    return _fit(folder, Lit("init"), auto_wrap_policy={Body, Experts}, use_orig_params=False)


def wrapped_in_configure_model(folder: Path) -> dict[str, Any]:
    return _fit(folder, Wrapping(""))


def _late_refusal(folder: Path, **options: Any) -> dict[str, Any]:
    """Optimizers are compared when they exist: the model is flattened by then."""
    old, model = old_model(), Lit("init")
    before = {name: t.detach().clone() for name, t in model.net.state_dict().items()}
    state = torch.optim.SGD(old.parameters(), lr=0.1, momentum=0.9).state_dict()
    path = save(folder / "old.ckpt", {"state_dict": old.state_dict(), "optimizer_states": [state], "lr_schedulers": []})
    callback, strategy = transfer(path, resume="optimizer"), OnCpu(process_group_backend="gloo", **options)
    try:
        quiet_trainer(folder, callback, strategy=strategy, logger=False).fit(model, data())
    except LitWslError as error:
        filled = len(differing(strategy.before_wrapping, before))
        with FullyShardedDataParallel.summon_full_params(strategy.model, writeback=False):
            tensors = (*model.net.named_buffers(), *model.net.named_parameters())
            state = {name.replace("_fsdp_wrapped_module.", ""): t for name, t in tensors}
            wrong = differing(state, {name: before[name] for name in state})
        told = {"message": str(error), "report": callback.report is None, "remembers": recall(model) is not None}
        return {**told, "filled": filled, "compared": len(state), "wrong": wrong}
    return {"message": ""}


def a_late_refusal(folder: Path) -> dict[str, Any]:
    return _late_refusal(folder)


def a_late_refusal_by_parts(folder: Path) -> dict[str, Any]:
    return _late_refusal(folder, auto_wrap_policy={Body, Experts}, use_orig_params=False)


def a_callback_fails(folder: Path) -> dict[str, Any]:
    """Other callbacks fail on one process alone, so nothing that takes all of them can be done."""
    path, _ = save_old(folder)
    old = old_model()
    state = torch.optim.AdamW(old.parameters()).state_dict()
    content = {"state_dict": old.state_dict(), "optimizer_states": [state], "lr_schedulers": []}
    callback = transfer(save(path, content), resume="optimizer")
    strategy = OnCpu(process_group_backend="gloo")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            quiet_trainer(folder, callback, Stop(), strategy=strategy, logger=False).fit(Lit("init"), data())
        except Wrapped:
            told = [str(w.message) for w in caught]
            return {"report": callback.report is None, "said": any("NOT as it was" in text for text in told)}
    return {"report": None}


def made_on_meta(folder: Path) -> dict[str, Any]:
    return _fit(folder, OnMeta(""))
