"""``lit-wsl map``: match a checkpoint to a model, print the coverage, write the plan and the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_wsl.cli.console import on_terminal, put_json, remark, say
from lit_wsl.cli.models import build_from, build_model, data_from_config, matching_options, sample_call
from lit_wsl.plan.coverage import likely_cause
from lit_wsl.plan.entries import Side
from lit_wsl.plan.file import plan_to_document
from lit_wsl.report.report import TransferReport
from lit_wsl.report.rows import gaps, open_questions
from lit_wsl.report.terminal import MappingView, ReportView, amount, excluded_lines
from lit_wsl.structure.description import shape_text
from lit_wsl.structure.running import Call
from lit_wsl.transfer.api import OnData, prepare_transfer
from lit_wsl.transfer.sides import Source, Target


def map_(options: Any) -> int:
    """Run ``map``."""
    old = build_from(options.source_model, options.source_model_args) if options.source_model else None
    data_module = data_from_config(options.config) if options.config and options.proof == "auto" else None
    model = build_model(options, meta=options.sample is None and data_module is None)
    call = sample_call(options.sample, model)
    samples = [_where_the_model_is(call, model)] if call else []
    source = Source.open(options.checkpoint, options.checkpoint_weights, old=old, samples=samples)
    data = _data(model, data_module) if data_module is not None else []
    matching = matching_options(options)
    prepared = prepare_transfer(source, Target.of(model, samples), matching, min_coverage=0.0, data=data)
    report = replace(prepared.report(), applied=False)
    if options.json != "-":
        _show(report)
    if options.plan:
        report.plan.save(options.plan)
        remark(f"plan: {options.plan} ({len(report.plan)} entries)")
    if options.html:
        report.save_html(options.html)
        remark(f"report: {options.html}")
    if options.json:
        put_json(report.to_dict(), options.json)
    share = prepared.coverage.floor_share
    if share < options.min_coverage:
        cause = likely_cause(prepared.plan, prepared.source, prepared.target)
        remark(f"lit-wsl map: coverage {share:.1%} is below --min-coverage {options.min_coverage:.1%}. {cause}")
        return 1
    return 0


def _data(model: nn.Module, data_module: Any) -> list[OnData]:
    """The config's own model and data: ways to prove the mapping, as the callback would find them."""
    import logging

    import lightning.pytorch as pl

    from lit_wsl.callbacks.proof import ways_to_prove

    if not isinstance(model, pl.LightningModule):
        return []
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.strategy.connect(model)
    trainer._data_connector.attach_data(model, datamodule=data_module)  # what Trainer.fit begins with
    data_module.prepare_data()
    data_module.setup("fit")
    ways, why = ways_to_prove(trainer, model, "fit", None)
    if why:
        remark(f"note: {why}")
    return ways


def _show(report: TransferReport) -> None:
    """Print the plan: tables on a terminal, else one line of tab-separated cells for each family."""
    if on_terminal():
        from rich.console import Console

        view = ReportView(report, "Mapping", modules=False, mapping=MappingView(report.plan, max_rows=30))
        Console().print(view)
        return
    coverage = report.coverage
    counts = [("checkpoint", coverage.source), ("model", coverage.target)]
    counts += [("buffers", coverage.target_buffers)] if coverage.target_buffers.of_tensors else []
    for label, count in counts:
        say(f"{label}\t{amount(count)}")
    document = plan_to_document(report.plan)
    for line in document["entries"]:
        operations = "+".join(op if isinstance(op, str) else next(iter(op)) for op in line.get("ops", ())) or "exact"
        source, _, target = line.get("map", f"{line.get('sources')} -> {line.get('targets')}").partition(" -> ")
        say(f"entry\t{_score(line.get('score', document['defaults']['score']))}\t{operations}\t{source}\t{target}")
    for question in open_questions(report.plan):
        candidates = " | ".join(name for _, name in question.candidates)
        say(f"ambiguous\t{', '.join(question.targets)}\t{candidates}\t{question.reason}")
    sides: tuple[Side, ...] = ("source", "target")
    for side in sides:
        for gap in gaps(report.plan, side, *report.sides):
            near = f"{gap.nearest.name} {shape_text(gap.nearest.shape)}" if gap.nearest else ""
            say(f"unmatched {side}\t{gap.text}\t{gap.reason}\t{near}\t{gap.advice}")
    for line in excluded_lines(report.plan, report.sides[1])[:1]:
        remark(f"note: buffers: {line}")
    for text in (*(f"warning: {text}" for text in report.warnings), *(f"note: {text}" for text in report.notes)):
        remark(text)


def _score(value: float | list[list[float]]) -> str:
    """The lowest score of a family."""
    return f"{value if isinstance(value, float) else min(score for _, score in value):.2f}"


def _where_the_model_is(call: Call, model: nn.Module) -> Call:
    """The sample on the model's device; on the meta device only shapes count."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved: Call = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, call)
    return moved
