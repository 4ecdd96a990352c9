"""Proof on data in a Trainer: the module's own step on batches of its own data, so that the run cannot tell.

The step is ``training_step`` on training batches, in eval mode: the right weights stand near a minimum of the training
loss only. Where that does not work, ``validation_step`` on validation batches. What the step logs is discarded, but is
read where the step returns nothing. No loader of the run is iterated: items are read from its data set, spread over the
whole of it, and collated as the loader would; a stream is read by a copy of the process.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lit_wsl.callbacks.remarks import proof_progress
from lit_wsl.callbacks.sample import STEPS, NoSampleError, batch_of, instead, places, stream, to_model
from lit_wsl.checkpoint import Checkpoint
from lit_wsl.matching.judge import PASSES
from lit_wsl.structure.running import cuda_devices, preserved_objects, preserved_rng, seed
from lit_wsl.transfer.api import OnData

if TYPE_CHECKING:
    import lightning.pytorch as pl

_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")  # whose steps have a loss
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier")


@dataclass(frozen=True)
class Recorded:
    """The score that the old run's ``ModelCheckpoint`` wrote into the checkpoint.

    Attributes:
        monitor: Name of the metric.
        value: Its value when the checkpoint was saved.
        mode: ``min`` or ``max``.
    """

    monitor: str
    value: float
    mode: str = "min"


def recorded_score(tensors: object) -> Recorded | None:
    """The monitored score in the ``callbacks`` of a Lightning checkpoint."""
    callbacks = tensors.unread.get("callbacks") if isinstance(tensors, Checkpoint) else None
    for key, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        if not isinstance(state, Mapping) or "best_model_score" not in state or not state.get("monitor"):
            continue
        value = state.get("current_score")
        value = state["best_model_score"] if value is None else value
        if isinstance(value, (int, float, Tensor)):
            found = re.search(r"\{.*\}", str(key))
            options = ast.literal_eval(found.group()) if found else {}
            return Recorded(str(state["monitor"]), float(value), str(options.get("mode", "min")))
    return None


def ways_to_prove(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    stage: str,
    score: Recorded | None,
    *,
    count: int = 8,
    seconds: float = 60.0,
    verbose: bool = True,
) -> tuple[list[OnData], str]:
    """Ways to measure the module's loss on its own data, the best first.

    Returns:
        The ways, and one line saying why there are none if there are none.
    """
    if not module.automatic_optimization:
        return [], "not tested on data: manual optimization"
    ways = []
    for kind, owner, name in places(trainer, module, stage, _LOADERS):
        own = STEPS[kind]
        for step in dict.fromkeys((own, "validation_step" if own != "training_step" else own, "training_step")):
            if is_overridden(step, module):
                logged: dict[str, Any] = {}
                loss = partial(_step_loss, step=step, logged=logged, score=score)
                world = partial(_world, trainer, module, logged)
                shown = partial(proof_progress, PASSES, enabled=verbose and trainer.is_global_zero)
                batches = _batches(trainer, module, _Data(owner, name, seconds))
                ways.append(OnData(loss, batches, count, seconds, world, shown))
    return ways, "" if ways else "not tested on data: there is no step with a loss, or no data"


# ---- the step --------------------------------------------------------------------------------------------------------


def _step_loss(module: nn.Module, batch: Any, *, step: str, logged: dict[str, Any], score: Recorded | None) -> Tensor:
    """The loss that a step returns, or logs."""
    logged.clear()
    method = getattr(module, step)
    names = list(inspect.signature(method).parameters)
    kwargs: dict[str, int] = {name: 0 for name in ("batch_idx", "dataloader_idx") if name in names}
    if len(names) > 1 and "batch_idx" not in names:
        kwargs[names[1]] = 0
    with cast("pl.LightningModule", module).trainer.precision_plugin.forward_context():
        result = method(batch, **kwargs)
    if isinstance(result, Mapping):
        result = result.get("loss")
    if isinstance(result, Tensor) and result.numel() == 1:
        return result.reshape(())
    return _logged_loss(logged, step, score)


def _logged_loss(logged: Mapping[str, Any], step: str, score: Recorded | None) -> Tensor:
    """What a step that returns nothing tells of its loss by what it logs."""
    values = {name: _number(value) for name, value in logged.items()}
    known = {name: value for name, value in values.items() if value is not None}
    for name, value in known.items():
        if "loss" in name.lower():
            return value
    if score is not None and score.monitor in known:
        return -known[score.monitor] if score.mode == "max" else known[score.monitor]
    raise NoSampleError(f"{step} returns no loss and logs none")


def _number(value: Any) -> Tensor | None:
    if hasattr(value, "compute") and callable(value.compute):
        value = value.compute()
    if isinstance(value, (int, float)):
        return torch.tensor(float(value))
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else None


@contextmanager
def _world(trainer: pl.Trainer, module: pl.LightningModule, logged: dict[str, Any]) -> Iterator[None]:
    """What a step finds around it: a log that is kept apart, loggers that take anything, no other process."""

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        logged[name] = value

    def log_dict(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        logged.update(values)

    with ExitStack() as stack:
        stack.enter_context(preserved_rng(module))
        stack.enter_context(preserved_objects(getattr(trainer, "datamodule", None)))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            stack.enter_context(_alone())
        stack.enter_context(instead(trainer, module, [DummyLogger()], {"log": log, "log_dict": log_dict}))
        yield


@contextmanager
def _alone() -> Iterator[None]:
    """One process makes the trials, so nothing in a step may wait for the others."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the step talks to other processes by itself")

    with ExitStack() as stack:
        for name, value in (("is_initialized", False), ("get_world_size", 1), ("get_rank", 0)):
            stack.enter_context(mock.patch.object(torch.distributed, name, lambda *a, _value=value, **k: _value))
        for name in _COLLECTIVES:
            stack.enter_context(mock.patch.object(torch.distributed, name, refuse))
        yield


# ---- the data --------------------------------------------------------------------------------------------------------


def _batches(trainer: pl.Trainer, module: pl.LightningModule, data: _Data) -> Iterator[Any]:
    """Batches of a place that has data, taken one by one, each without a trace."""
    number = 0
    try:
        while True:
            with preserved_rng(module), preserved_objects(data.owner, getattr(trainer, "datamodule", None)):
                seed(number, cuda_devices(module))
                try:
                    batch = to_model(data.batch(number), trainer, module)
                except (NoSampleError, IndexError):
                    if number == 0:
                        raise
                    return  # all of the data has been seen
            yield batch
            number += 1
    finally:
        data.close()


class _Data:
    """A place that has data: loaders, or who makes them by a method of this name; streams are waited for so long."""

    def __init__(self, owner: Any, name: str | None, seconds: float) -> None:
        self.owner, self.name, self.seconds = owner, name, seconds
        self._loaders: Any = None
        self._streams: list[Generator[Any, None, None] | None] = []  # of each loader, if it is one

    def close(self) -> None:
        """End what reads streams."""
        for batches in self._streams:
            if batches is not None:
                batches.close()

    def batch(self, number: int) -> Any:
        """A batch in the form in which the loaders would give it."""
        places = itertools.count()
        return batch_of(self._made(), number, lambda loader: self._of(loader, number, next(places)))

    def _made(self) -> Any:
        """The loaders; a datamodule that was not set up for training is, for each batch anew."""
        if self._loaders is not None:
            return self._loaders
        lasting = True
        try:
            loaders = self.owner if self.name is None else getattr(self.owner, self.name)()
        except Exception:
            if self.name is None or not hasattr(self.owner, "setup") or isinstance(self.owner, nn.Module):
                raise
            lasting = False
            self.owner.setup("fit")
            loaders = getattr(self.owner, self.name)()
        if isinstance(loaders, CombinedLoader):
            loaders = loaders.iterables
        if self.name == "val_dataloader" and isinstance(loaders, (list, tuple)) and loaders:
            loaders = loaders[0] if hasattr(loaders[0], "dataset") else loaders
        self._loaders = loaders if lasting else None
        return loaders

    def _of(self, loader: Any, number: int, place: int) -> Any:
        """A batch of one loader: of its data set, or as the loader gives them where that is not enough."""
        if place == len(self._streams):
            self._streams.append(None)
            dataset = getattr(loader, "dataset", None)
            if dataset is not None and not isinstance(dataset, IterableDataset):
                with suppress(KeyError, TypeError, RuntimeError, ValueError, AttributeError):
                    return _spread_batch(loader, number)
            self._streams[place] = stream(loader, self.seconds)
        batches = self._streams[place]
        if batches is None:
            return _spread_batch(loader, number)
        batch = next(batches, None)
        if batch is None:
            raise NoSampleError("all of the data has been seen")
        return batch


def _spread_batch(loader: Any, number: int) -> Any:
    """Items that are spread over the whole of a data set, collated as the loader would."""
    dataset, collate = loader.dataset, loader.collate_fn
    with preserved_objects(dataset, loader.sampler, loader.batch_sampler, getattr(loader, "generator", None), collate):
        if loader.batch_sampler is None:  # the data set gives whole batches
            return collate(dataset[list(loader.sampler)[number]])
        size = getattr(loader, "batch_size", None) or getattr(loader.batch_sampler, "batch_size", None) or 32
        stride = max(1, len(dataset) // size)
        if number >= stride:
            raise NoSampleError("all of the data has been seen")
        return collate([dataset[i] for i in range(number, number + size * stride, stride) if i < len(dataset)])
