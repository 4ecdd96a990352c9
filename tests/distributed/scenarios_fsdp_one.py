"""Lightning's ``FSDPStrategy`` (FullyShardedDataParallel) in two processes; judged by ``test_fsdp_one.py``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from checks_dist import differing, save_old
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from models_dist import New
from runs_dist import data, quiet_trainer, transfer
from scenarios_ddp import Lit
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap, wrap


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


def _fit(folder: Path, model: LightningModule) -> dict[str, Any]:
    path, expected = save_old(folder)
    strategy, callback = OnCpu(process_group_backend="gloo"), transfer(path)
    with suppress(Wrapped):
        quiet_trainer(folder, callback, Stop(), strategy=strategy, logger=False).fit(model, data())
    return {"wrong": differing(strategy.before_wrapping, expected), "loaded": len(callback.report.loaded)}


def built_in_init(folder: Path) -> dict[str, Any]:
    return _fit(folder, Lit("init"))


def built_in_configure_model(folder: Path) -> dict[str, Any]:
    return _fit(folder, Lit("configure_model"))


def wrapped_in_configure_model(folder: Path) -> dict[str, Any]:
    return _fit(folder, Wrapping(""))


def made_on_meta(folder: Path) -> dict[str, Any]:
    return _fit(folder, OnMeta(""))
