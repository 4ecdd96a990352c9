"""When in Lightning's life cycle a model is completely built, whether a run resumes, and who copied the model already.

``Trainer._run`` calls, in this order: ``DataModule.setup``, ``Callback.setup``, ``LightningModule.setup``,
``configure_model``, the restoring of a resumed checkpoint, ``Strategy.setup`` (device, wrapping, optimizers),
``on_fit_start``. A model built in ``__init__`` is complete at ``Callback.setup``; one that overrides ``setup`` or
``configure_model`` only after both, and Lightning has no callback hook there, so one call of ``Strategy.setup`` is
preceded by ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lit_wsl.errors import LitWslError
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.plan.coverage import measure_coverage
from lit_wsl.plan.entries import SideSummary
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.loggers import log_report
from lit_wsl.report.report import TransferReport
from lit_wsl.report.terminal import print_report
from lit_wsl.structure import ModelDescription, describe
from lit_wsl.structure.families import prefixes
from lit_wsl.transfer.apply import copy_into, live_tensors

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import Strategy

    from lit_wsl.convert.resume import Resume


_BUILDERS = ("setup", "configure_model", "configure_sharded_model")


def is_whole(module: pl.LightningModule) -> bool:
    """Whether no later hook of the module itself may add parameters to it."""
    return not any(is_overridden(name, module) for name in _BUILDERS if hasattr(module, name))


def resumed_path(trainer: pl.Trainer) -> tuple[bool, str | None]:
    """The checkpoint that this run restores, if it restores one.

    ``trainer.ckpt_path`` is set only when the restoring begins, after the setup hooks. Until then the path is an
    argument of ``Trainer._run`` and stored nowhere, so it is read from that frame. Should a future Lightning name
    things differently, this cannot be told yet; the restored weights win all the same, and are noticed afterwards.

    Returns:
        Whether it can be told, and the path, ``None`` if nothing is restored.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            path = frame.f_locals.get("ckpt_path")
            return "ckpt_path" in frame.f_locals, str(path) if path else None
        frame = frame.f_back
    return False, None


def has_trained_elsewhere(trainer: pl.Trainer) -> bool:
    """Whether this trainer has run a fit in processes that it spawned and that are gone.

    They return their weights to the main process, and nothing of the callbacks; a ``test`` that follows starts new
    processes with the trained weights and a callback that knows nothing of the transfer that came before.
    """
    return bool(getattr(trainer.strategy.launcher, "_already_fit", False))


def when_whole(strategy: Strategy, run: Callable[[], None], needs_memory: Callable[[], bool]) -> Callable[[], None]:
    """Call ``run`` once when the next ``strategy.setup`` begins, or where it needs memory when tensors have some."""
    installed = vars(strategy).get("setup")
    queue: list[tuple[Callable[[], None], Callable[[], bool]]] = getattr(installed, "lit_wsl_queue", [])
    if not hasattr(installed, "lit_wsl_queue"):
        original = strategy.setup

        def setup(trainer: pl.Trainer) -> Any:
            _uninstall(strategy, setup, installed)
            waiting = []
            for request, has_to_wait in queue:
                if has_to_wait():
                    waiting.append(request)
                else:
                    request()
            result = original(trainer)
            for request in waiting:
                request()
            return result

        setup.lit_wsl_queue = queue  # type: ignore[attr-defined]
        strategy.setup = setup  # type: ignore[method-assign]
    request = (run, needs_memory)
    queue.append(request)
    current = vars(strategy)["setup"]

    def take_back() -> None:
        if request in queue:
            queue.remove(request)
        if not queue:
            _uninstall(strategy, current, installed)

    return take_back


def _uninstall(strategy: Strategy, ours: Any, before: Any) -> None:
    if vars(strategy).get("setup") is ours:
        if before is None:
            del strategy.setup
        else:
            strategy.setup = before  # type: ignore[method-assign]


def needs_memory(module: nn.Module) -> bool:
    """Whether some parameters are on the meta device."""
    return any(p.is_meta for p in module.parameters())


@dataclass(frozen=True)
class Shadow:
    """A copy of the model that another callback keeps, such as the average of ``WeightAveraging``.

    Attributes:
        callback: The callback.
        module: The copy.
        prefix: What stands before the model's names in the copy's state dict.
        listed_before: Whether that callback is set up before ours.
    """

    callback: Any
    module: nn.Module
    prefix: str
    listed_before: bool

    def feed(self, model: nn.Module, names: tuple[str, ...]) -> None:
        """Give the copy the model's values of some tensors."""
        ours, theirs = live_tensors(model), live_tensors(self.module)
        for name in names:
            if self.prefix + name in theirs:
                copy_into(theirs[self.prefix + name], ours[name].detach())


def shadows(trainer: pl.Trainer, model: nn.Module, ours: Any) -> Iterator[Shadow]:
    """Find the copies of the model that other callbacks keep, by structure: modules that hold all its tensors."""
    inside = {id(sub) for sub in model.modules()}
    shapes = {n: t.shape for n, t in live_tensors(model).items() if not nn.parameter.is_lazy(t)}
    if not shapes:
        return
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    place = callbacks.index(ours) if ours in callbacks else len(callbacks)
    for index, callback in enumerate(callbacks):
        for value in list(vars(callback).values()) if hasattr(callback, "__dict__") else []:
            if not isinstance(value, nn.Module) or id(value) in inside:
                continue
            theirs = {n: t.shape for n, t in live_tensors(value).items() if not nn.parameter.is_lazy(t)}
            for prefix in prefixes(list(shapes), theirs):
                if all(theirs[prefix + name] == shape for name, shape in shapes.items()):
                    yield Shadow(callback, value, prefix, index < place)
                    break


def mind_copies(
    trainer: pl.Trainer, model: nn.Module, ours: Any, names: tuple[str, ...], *, late: bool, resuming: Resume | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Feed copies of the model that callbacks listed after ours made too early; warn about those listed before.

    A copy that is restored from the checkpoint afterwards, as ``resuming`` tells, needs neither.
    """
    warnings, notes = [], []
    for shadow in shadows(trainer, model, ours):
        name = type(shadow.callback).__name__
        if shadow.listed_before and resuming is not None and resuming.restores(shadow.callback):
            continue
        if shadow.listed_before:
            warnings.append(
                f"{name} is listed before WeightTransferCallback and copied the model before the transfer, "
                "so its copy starts from the old values; list WeightTransferCallback first"
            )
        elif late:
            shadow.feed(model, names)
            notes.append(f"the copy of the model in {name} was given the transferred weights too")
    return tuple(warnings), tuple(notes)


REPORT_FILE = "weight_transfer.json"


def report_nothing(model: pl.LightningModule, label: str, options: MatchingOptions, note: str) -> TransferReport:
    """The report of a transfer that was not made, since other weights win."""
    source = SideSummary(label, 0, 0, 0, 0, "")
    try:
        target = describe(model)
    except LitWslError:  # not built yet
        target = ModelDescription((), label=type(model).__name__)
    plan = TransferPlan((), source, SideSummary.of(target), options=options.to_dict())
    nothing = ModelDescription((), label=label)
    coverage = measure_coverage(plan, nothing, target)
    return replace(TransferReport.of(plan, coverage, nothing, target, notes=(note,)), applied=False)


def announce(trainer: pl.Trainer, report: TransferReport, *, verbose: bool) -> None:
    """Print the coverage, if ``verbose``, write the report, and tell the loggers."""
    if trainer.is_global_zero and verbose:
        print_report(report)
    page = write_report(trainer, report)
    if trainer.is_global_zero:
        log_report(trainer.loggers, report, page=page)


def write_report(trainer: pl.Trainer, report: TransferReport | None) -> Path | None:
    """Write the report, if there is one, into the run's folder, as JSON and as a page; on all ranks."""
    directory = trainer.log_dir  # a collective call
    if report is None or not trainer.is_global_zero or directory is None or getattr(trainer, "fast_dev_run", False):
        return None
    path = Path(directory) / REPORT_FILE
    try:
        os.makedirs(directory, exist_ok=True)
        report.to_json(path)
        if report.applied:
            report.save_html(path.with_suffix(".html"))
            return path.with_suffix(".html")
    except (OSError, LitWslError) as error:  # a full disk is no reason to stop a run that has its weights
        rank_zero_warn(f"Weight transfer: the report could not be written: {error}")
    return None
