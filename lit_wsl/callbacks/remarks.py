"""What a run shows of a transfer: which weights were replaced or kept, who has copies of them, report and progress.

No logger's library is imported here: a logger is known by what its ``experiment`` offers, so whatever is not installed
is never asked for.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lit_wsl.callbacks.state_dicts import given_while_built
from lit_wsl.errors import LitWslError, counted, listed
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.plan.coverage import measure_coverage
from lit_wsl.plan.entries import SideSummary
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.drawing import as_html, plain
from lit_wsl.report.report import TransferReport
from lit_wsl.report.terminal import ReportView, markdown, module_rows, print_report
from lit_wsl.structure import ModelDescription, describe
from lit_wsl.structure.families import prefixes
from lit_wsl.transfer.apply import copy_into, live_tensors
from lit_wsl.transfer.memory import given_by_hand, recall, was_trained_here

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger
    from rich.progress import Progress

    from lit_wsl.convert.resume import Resume


ON_PURPOSE = "give again=True, or call transfer_weights, to fill it on purpose"


@dataclass(frozen=True)
class Shadow:
    """A copy of the model that another callback keeps, such as the average of ``WeightAveraging``."""

    callback: Any
    module: nn.Module
    prefix: str  # what stands before the model's names in the copy's state dict
    listed_before: bool  # whether that callback is set up before ours

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


class Before(NamedTuple):
    """What a model held before it was filled."""

    by_hand: list[str]  # the modules that somebody gave weights of unknown origin
    trained: bool  # whether it was trained in this process without a transfer, and loses that unasked
    only: frozenset[str] | None  # the tensors that are to be filled, because they were built anew; ``None`` for all

    @classmethod
    def look(cls, model: nn.Module, only: frozenset[str] | None, *, again: bool) -> Before:
        """Look at a model that is about to be filled; ``again`` if that was asked for though it may be trained."""
        anew = only is None and not again
        return cls(given_by_hand(model), anew and recall(model) is None and was_trained_here(model), only)


def remarked(
    report: TransferReport,
    trainer: pl.Trainer,
    callback: pl.Callback,
    model: nn.Module,
    before: Before,
    *,
    late: bool,
    resuming: Resume | None,
) -> TransferReport:
    """The report of a filled model with its warnings and notes, which are printed too; copies get their share."""
    file = report.plan.source.label
    warnings, notes = mind_copies(trainer, model, callback, report.loaded, late=late, resuming=resuming)
    kept = given_by_hand(model)
    replaced = [path for path in (*before.by_hand, *given_while_built(model)) if path not in kept]
    if replaced := _written(replaced, report.loaded):
        warnings += (
            f"{given(replaced, model)}, now replaced by those of {file}; if they were trained, "
            "leave this callback out, or load them with load_from_checkpoint or ckpt_path=",
        )
    if kept:
        warnings += (f"{given(kept, model)}, and this run only evaluates it, so they were kept; {ON_PURPOSE}",)
    if before.trained:
        warnings += (
            f"weights of {type(model).__name__} that were trained before in this process were replaced by those "
            f"of {file}; if that was not intended, leave this callback out",
        )
    for warning in warnings:
        rank_zero_warn(f"Weight transfer: {warning}.")
    if before.only is not None:
        notes += (_of_a_part(report, before.only),)
        rank_zero_info(f"Weight transfer: {notes[-1]}.")
    return report.with_remarks(warnings=warnings, notes=notes)


def given(paths: Sequence[str], model: nn.Module) -> str:
    """That some modules were given weights by hand."""
    named = [path or type(model).__name__ for path in paths]
    return f"{counted(named, 3)} held weights that load_state_dict gave before"


def _written(paths: Sequence[str], loaded: Sequence[str]) -> list[str]:
    """Those modules into which something was loaded."""
    return [path for path in paths if any(not path or name.startswith(f"{path}.") for name in loaded)]


def _of_a_part(report: TransferReport, only: frozenset[str]) -> str:
    """What to say of a transfer into those layers only that were built anew."""
    filled = [name for name in report.loaded if name in only]
    empty = sorted(only - set(filled))
    note = f"the model was filled before; {len(filled)} tensors that are new in it since were filled, and no others"
    left = f" ({listed(empty, 5)} found no source)" if empty else ""
    return note + left


_log = logging.getLogger(__name__)
PREFIX = "weight_transfer"


def scalars(report: TransferReport) -> dict[str, float]:
    """The report's numbers: coverage as shares from 0 to 1, the rest as numbers of tensors."""
    coverage = report.coverage
    values = {
        "target_coverage": coverage.target.share,
        "source_coverage": coverage.source.share,
        "target_tensor_coverage": coverage.target.tensor_share,
        "source_tensor_coverage": coverage.source.tensor_share,
        "loaded": float(len(report.loaded)),
        "missing": float(len(report.missing)),
        "ambiguous": float(len(report.ambiguous)),
        "unused": float(len(report.unused)),
    }
    measured = report.plan.measured
    if measured is not None:
        values["loss_fresh"], values["loss_transferred"] = measured.fresh, measured.transferred
    for row in module_rows(coverage)[1]:  # a dashboard of thousands of charts helps nobody
        values[f"module_coverage/{row.module.strip('()')}"] = row.share
    return {f"{PREFIX}/{name}": value for name, value in values.items()}


def log_report(loggers: Iterable[Logger], report: TransferReport, page: Path | None = None) -> None:
    """Send the report to every logger; a logger that fails is warned about and does not stop the run."""
    for logger in loggers:
        try:
            logger.log_metrics(scalars(report), step=0)
            _log_text(logger, report)
            if page is not None:
                _log_page(logger, page)
        except Exception as error:
            _log.warning("weight transfer: %s could not log the report: %s", type(logger).__name__, error)


def _log_text(logger: Logger, report: TransferReport) -> None:
    """Log the report as text, table or HTML, whichever the logger's experiment offers."""
    if hasattr(logger, "log_table"):  # Weights & Biases
        titles, rows, _ = module_rows(report.coverage)
        data = [list(row.cells) for row in rows]
        logger.log_table(key=f"{PREFIX}/coverage", columns=titles, data=data, step=0)
        return
    experiment: Any = getattr(logger, "experiment", None)
    run_id = getattr(logger, "run_id", None)
    if hasattr(experiment, "add_text"):  # TensorBoard
        experiment.add_text(PREFIX, markdown(report), 0)
    elif hasattr(experiment, "log_html"):  # Comet
        experiment.log_html(f"<html><body>{as_html(ReportView(report))}</body></html>")
    elif hasattr(experiment, "log_text") and run_id is not None:  # MLflow
        experiment.log_text(run_id, plain(ReportView(report)), f"{PREFIX}.txt")


def _log_page(logger: Logger, page: Path) -> None:
    """Give the page to loggers whose site shows such files beside the run."""
    experiment: Any = getattr(logger, "experiment", None)
    run_id = getattr(logger, "run_id", None)
    if hasattr(logger, "log_table"):  # Weights & Biases, whose logger takes its own kinds of media as metrics
        media = sys.modules.get("wandb")
        if media is not None:
            logger.log_metrics({f"{PREFIX}/report": media.Html(str(page), inject=False)}, step=0)
    elif hasattr(experiment, "log_asset"):  # Comet
        experiment.log_asset(str(page), file_name=page.name)
    elif hasattr(experiment, "log_artifact") and run_id is not None:  # MLflow
        experiment.log_artifact(run_id, str(page))


@contextmanager
def proof_progress(most: float, *, enabled: bool = True) -> Iterator[Callable[[float], None] | None]:
    """Show how far a proof on data is, if somebody is watching."""
    if not enabled or not _is_watched():
        yield None
        return
    from rich.progress import Progress, TimeElapsedColumn

    with _bars(*Progress.get_default_columns()[:3], TimeElapsedColumn()) as bars:
        task = bars.add_task("proof on data", total=most)
        yield lambda passes: bars.update(task, completed=passes)


_LONG = 1 << 30  # bytes; less is done before a bar could be read


@contextmanager
def transfer_progress(size: int, *, enabled: bool = True) -> Iterator[Callable[[str, int], None] | None]:
    """Show how far a transfer is, if it is long and somebody is watching."""
    if not enabled or size < _LONG or not _is_watched():
        yield None
        return
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TimeRemainingColumn(), TextColumn(""))
    with _bars(*columns) as bars:
        task = bars.add_task("copying weights", total=size)

        def advance(stage: str, count: int) -> None:
            if stage == "copy":
                bars.advance(task, count)

        yield advance


def _is_watched() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _bars(*columns: Any) -> Progress:
    """Bars on the terminal's error stream, gone when they are done."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), transient=True)
