"""Telling the terminal, the loggers and a file what a transfer did; rank zero only."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_wsl.errors import LitWslError
from lit_wsl.mapper.options import MatchingOptions
from lit_wsl.structure import ModelDescription, describe
from lit_wsl.transfer.coverage import measure_coverage
from lit_wsl.transfer.plan import SideSummary, TransferPlan
from lit_wsl.transfer.report import TransferReport

if TYPE_CHECKING:
    import lightning.pytorch as pl

REPORT_FILE = "weight_transfer.json"


def report_nothing(model: pl.LightningModule, label: str, options: MatchingOptions, note: str) -> TransferReport:
    """The report of a transfer that was not made, since other weights win.

    Args:
        model: The model, which may not be built yet.
        label: What the weights would have come from.
        options: How they would have been matched.
        note: Why nothing was done.
    """
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
        from lit_wsl.report.coverage import print_report

        print_report(report)
    page = write_report(trainer, report)
    if trainer.is_global_zero:
        from lit_wsl.report.loggers import log_report

        log_report(trainer.loggers, report, page=page)


def write_report(trainer: pl.Trainer, report: TransferReport | None) -> Path | None:
    """Write the report, if there is one, into the run's folder, as JSON and as a page; on all ranks.

    Returns:
        The page, if one was written.
    """
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
