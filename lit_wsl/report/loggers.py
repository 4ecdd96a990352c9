"""What a run shows of a transfer: coverage for loggers, from scalars to the whole HTML page, and a progress bar.

No logger's library is imported here: a logger is known by what its ``experiment`` offers, so whatever is not
installed is never asked for.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_wsl.report.drawing import as_html, plain
from lit_wsl.report.terminal import ReportView, markdown, module_rows

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from lit_wsl.report.report import TransferReport


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
    if not enabled or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("proof on data", total=most)
        yield lambda passes: bars.update(task, completed=passes)


_LONG = 1 << 30  # bytes; less is done before a bar could be read


@contextmanager
def transfer_progress(size: int, *, enabled: bool = True) -> Iterator[Callable[[str, int], None] | None]:
    """Show how far a transfer is, if it is long and somebody is watching."""
    if not enabled or size < _LONG or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TimeRemainingColumn(), TextColumn(""))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("copying weights", total=size)

        def advance(stage: str, count: int) -> None:
            if stage == "copy":
                bars.advance(task, count)

        yield advance
