"""A sample batch for the execution order, taken so that the run that follows cannot tell.

The training data must come in the same order, with the same augmentations, as without us. So no loader of the run is
iterated: two items are read from its data set and collated as it would, and whatever Python state that touches
(generators, counters, open files) is put back.

A stream (``IterableDataset``, generator, a loader that is not PyTorch's) moves on when it is read, so a forked copy of
the process reads it. The copy has its own memory, as a data loader's worker has, so generators and counters of the run
stay where they are. What both processes share is put back or cut off: positions in open files; pipes and sockets,
which the copy does not have.
"""

from __future__ import annotations

import dis
import os
import pickle
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from lit_wsl.errors import reason
from lit_wsl.structure.execution_order import Step, callee
from lit_wsl.structure.losses import NoDataError
from lit_wsl.structure.running import Call, as_call, preserved_objects, preserved_rng, ways_to_call

if TYPE_CHECKING:
    import lightning.pytorch as pl


WAIT = 30.0  # seconds for the first batch and for all others together


class NoSampleError(NoDataError):
    """A place that could have had a sample has none; the reason in words."""


def stream(loader: Any, seconds: float = WAIT) -> Generator[Any, None, None]:
    """Yield a loader's batches, read by a copy of this process that ends with the iterator.

    A ``DataLoader`` is read without workers of its own. Refused where no batch comes in time, or no copy can be made.
    """
    if not sys.platform.startswith("linux"):
        raise NoSampleError("the data set is a stream, and reading from it would take samples away from the run")
    positions = _positions()
    ours, theirs = Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of several threads; workers fork all the same
        child = os.fork()
    if child == 0:
        _serve(loader, theirs)
    theirs.close()
    try:
        with ours:
            yield from _received(ours, seconds)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for number, position in positions.items():
            with suppress(OSError):
                os.lseek(number, position, os.SEEK_SET)


def first_of_stream(loader: Any) -> Any:
    """The first batch of a stream."""
    batches = stream(loader)
    try:
        return next(batches)
    finally:
        batches.close()


def _received(pipe: Connection, seconds: float) -> Iterator[Any]:
    """What the copy sends, until it has no more or something fails."""
    count = 0
    while True:
        started = time.monotonic()
        if not pipe.poll(seconds):
            error = f"no batch of the stream within {seconds:.0f} seconds"
        else:
            try:
                batch, error = pickle.loads(pipe.recv_bytes())
            except EOFError:
                batch, error = None, "the process that read the stream has ended"
            if not error:
                yield batch
                count += 1
                seconds = max(0.0, seconds - (time.monotonic() - started))
                continue
        if count == 0:
            raise NoSampleError(error)
        return


def _serve(loader: Any, pipe: Connection) -> None:
    """The copy's work: send batches until there is no more, and end without anything that a process does at its end."""
    try:
        _cut_off(pipe.fileno())
        torch.set_num_threads(1)
        for name, value in (("num_workers", 0), ("timeout", 0), ("pin_memory", False), ("prefetch_factor", None)):
            if isinstance(loader, torch.utils.data.DataLoader):
                setattr(loader, name, value)
        for batch in loader:
            pipe.send_bytes(pickle.dumps((batch, "")))
        pipe.send_bytes(pickle.dumps((None, "the stream is at its end")))
    except BaseException as error:
        with suppress(BaseException):
            pipe.send_bytes(pickle.dumps((None, reason(error))))
    finally:
        os._exit(0)


def _open_files() -> Iterator[tuple[int, int]]:
    """Numbers and modes of the open files, sockets and pipes of this process."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            yield int(name), os.fstat(int(name)).st_mode


def _positions() -> dict[int, int]:
    """Where each open file is being read."""
    found = {}
    for number, mode in _open_files():
        if stat.S_ISREG(mode):
            with suppress(OSError):
                found[number] = os.lseek(number, 0, os.SEEK_CUR)
    return found


def _cut_off(kept: int) -> None:
    """Let nothing that both processes share be read or written by this one but its pipe and plain files."""
    import fcntl

    nothing = os.open(os.devnull, os.O_RDWR)
    for number, mode in list(_open_files()):
        if number in (kept, nothing):
            continue
        is_written = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        if number in (1, 2) or is_written or not stat.S_ISREG(mode):
            os.dup2(nothing, number)


_ITEMS = 2  # enough for batch statistics in models that refuse a batch of one
_LOADERS = {  # which loaders a stage has, the best first
    "fit": ("train_dataloader", "val_dataloader"),
    "validate": ("val_dataloader", "train_dataloader"),
    "test": ("test_dataloader", "val_dataloader", "train_dataloader"),
    "predict": ("predict_dataloader", "test_dataloader", "val_dataloader"),
}

_SILENCED = (
    "log", "log_dict", "print", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients",
)  # fmt: skip
_STOOD_IN = ("optimizers", "lr_schedulers")  # not made yet
STEPS = {  # which step takes the batches of which loader
    "train_dataloader": "training_step",
    "val_dataloader": "validation_step",
    "test_dataloader": "test_step",
    "predict_dataloader": "predict_step",
}


def find_samples(trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> tuple[list[Call], str]:
    """Ways to call ``module.forward`` on one sample, the likeliest first, and one line saying why there are none.

    The sample comes from the datamodule, from the loaders of the model or of the ``fit`` call, or from
    ``example_input_array``, in that order; batch transfer hooks are applied to it.
    """
    reasons: list[str] = []
    calls: list[Call] = []
    steps: list[Call] = []
    with preserved_rng(module):
        for kind, owner, name in places(trainer, module, stage, _LOADERS.get(stage, _LOADERS["fit"])):
            try:
                with preserved_objects(owner):
                    loaders = getattr(owner, name)() if name is not None else owner
                    batch = batch_of(loaders, 0, _small_batch)
                    batch = to_model(batch, trainer, module)
            except NoSampleError as error:
                reasons.append(str(error))
            except Exception as error:
                reasons.append(reason(error))
            else:
                calls += ways_to_call(callee(module)[0], batch)
                steps += [((Step(STEPS[kind], batch),), {})] if is_overridden(STEPS[kind], module) else []
                break
        calls += [*_example_calls(module), *steps]
    if calls:
        return calls, ""
    why = f" ({reasons[0]})" if reasons else ""
    return [], f"no execution order, matched without it: there is no sample batch{why}"


def places(
    trainer: pl.Trainer, module: pl.LightningModule, stage: str, names: Sequence[str]
) -> Iterator[tuple[str, Any, str | None]]:
    """Yield ``(kind, owner, method name)``, or ``(kind, loaders, None)``, for every place that may give a batch."""
    datamodule = getattr(trainer, "datamodule", None)
    for name in names if datamodule is not None else ():
        if is_overridden(name, datamodule):
            yield name, datamodule, name
    for name in names:
        loop = {
            "train_dataloader": trainer.fit_loop,
            "val_dataloader": trainer.fit_loop.epoch_loop.val_loop if stage == "fit" else trainer.validate_loop,
            "test_dataloader": trainer.test_loop,
            "predict_dataloader": trainer.predict_loop,
        }[name]
        given = getattr(getattr(loop, "_data_source", None), "instance", None)
        if given is not None and given is not datamodule and given is not module:
            yield name, given, None
        elif is_overridden(name, module):
            yield name, module, name


def batch_of(loaders: Any, number: int, read: Callable[[Any], Any]) -> Any:
    """A batch in the form in which ``loaders`` would give it, made of what is read of each."""
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    if isinstance(loaders, (list, tuple)) and loaders and not isinstance(loaders[0], DataLoader):
        return loaders[number]  # a list of ready batches
    if isinstance(loaders, (list, tuple, dict)):
        if not loaders:
            raise NoSampleError("the list of data loaders is empty")
        return tree_map(read, loaders)
    return read(loaders)


def _small_batch(loader: Any) -> Any:
    if not hasattr(loader, "dataset"):  # not PyTorch's
        return loader[0] if isinstance(loader, Sequence) and len(loader) else first_of_stream(loader)
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return first_of_stream(loader)
    collate = loader.collate_fn
    with preserved_objects(dataset, loader.sampler, loader.batch_sampler, getattr(loader, "generator", None), collate):
        if loader.batch_sampler is None:  # the data set gives whole batches
            return collate(dataset[next(iter(loader.sampler))])
        try:
            items = [dataset[i] for i in range(min(_ITEMS, len(dataset)))]
        except (KeyError, TypeError, IndexError):  # indices of another kind: ask the sampler
            items = [dataset[i] for i in next(iter(loader.batch_sampler))[:_ITEMS]]
        return collate(items)


def to_model(batch: Any, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    """Bring a batch to the model as the trainer would: transfer hooks, the model's device."""
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    with preserved_objects(getattr(trainer, "datamodule", None), module):
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return _in_dtype_of(module, module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0))


def _in_dtype_of(module: nn.Module, value: Any) -> Any:
    """Numbers of the default type in the type of the model's weights, as precision plugins do for ``bf16-true``."""
    wanted = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    usual = torch.float32
    return tree_map(lambda t: t.to(wanted) if isinstance(t, Tensor) and t.dtype == usual else t, value)


@contextmanager
def quiet(trainer: pl.Trainer, model: pl.LightningModule) -> Iterator[None]:
    """Keep a sample call from logging and training: ``self.log`` does nothing, the trainer has no loggers meanwhile."""
    stand_ins = {**dict.fromkeys(_SILENCED, _do_nothing), **dict.fromkeys(_STOOD_IN, _StandIn())}
    with instead(trainer, model, [], stand_ins):
        yield


@contextmanager
def instead(
    trainer: pl.Trainer, model: pl.LightningModule, loggers: list[Any], attributes: dict[str, Any]
) -> Iterator[None]:
    """Other loggers in the trainer, and other attributes in the model, for a while."""
    before, own = trainer.loggers, dict(vars(model))
    trainer.loggers = loggers
    vars(model).update(attributes)
    try:
        yield
    finally:
        trainer.loggers = before
        for name in attributes:
            vars(model).pop(name, None)
            if name in own:
                vars(model)[name] = own[name]


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``self.log`` during a sample call."""


class _StandIn:
    """Stands in for the optimizers and schedulers of a step that trains by itself: takes any call and does nothing."""

    def __getattr__(self, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _StandIn:
        return self

    def __getitem__(self, index: Any) -> _StandIn:
        return self

    def __iter__(self) -> Iterator[_StandIn]:
        """As many as ``first, second = self.optimizers()`` asks for; one for a loop."""
        caller = sys._getframe(1)
        asking = next(i for i in dis.get_instructions(caller.f_code) if i.offset == caller.f_lasti)
        return iter([self] * (int(asking.arg or 0) if asking.opname == "UNPACK_SEQUENCE" else 1))

    def __enter__(self) -> _StandIn:
        return self

    def __exit__(self, *exc: object) -> None:
        """Let errors through."""


def _example_calls(module: pl.LightningModule) -> list[Call]:
    example = getattr(module, "example_input_array", None)
    if example is None:
        return []
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    example = _in_dtype_of(module, tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, example))
    return [as_call(example)]
