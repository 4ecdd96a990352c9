"""``lit-wsl map``: match a checkpoint to a model, print the coverage, write the plan and the report."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_wsl.cli.console import remark
from lit_wsl.cli.models import Call, build_from, build_model, sample_call
from lit_wsl.mapper.options import MatchingOptions
from lit_wsl.report.tables import ResultView
from lit_wsl.transfer.api import open_source, prepare_transfer
from lit_wsl.transfer.floor import likely_cause


def run(options: Any) -> int:
    """Run the command."""
    matching = MatchingOptions.make(
        buffers=options.buffers,
        strategy=options.strategy,
        threshold=options.threshold,
        weights=options.weights,
        incompatible_pairs=[tuple(map(set, pair)) for pair in options.incompatible_pairs or ()],  # type: ignore[misc]
        adapt=options.adapt,
    )
    tensors = open_source(options.checkpoint, options.checkpoint_weights)
    model = build_model(options, meta=options.sample is None)
    call = sample_call(options.sample, model)
    prepared = prepare_transfer(
        model,
        tensors,
        options.checkpoint,
        matching,
        samples=[_where_the_model_is(call, model)] if call else [],
        min_coverage=0.0,
        old=build_from(options.source_model, options.source_model_args) if options.source_model else None,
    )
    from dataclasses import replace

    report = replace(prepared.report(), applied=False)
    Console().print(ResultView(report.plan, report.coverage, report.warnings, report.notes))
    if options.plan:
        report.plan.save(options.plan)
        remark(f"plan: {options.plan} ({len(report.plan)} entries)")
    if options.html:
        report.save_html(options.html)
        remark(f"report: {options.html}")
    if options.json:
        report.to_json(options.json)
        remark(f"report: {options.json}")
    share = prepared.coverage.floor_share
    if share < options.min_coverage:
        cause = likely_cause(prepared.plan, prepared.source, prepared.target)
        remark(f"lit-wsl map: coverage {share:.1%} is below --min-coverage {options.min_coverage:.1%}. {cause}")
        return 1
    return 0


def _where_the_model_is(call: Call, model: nn.Module) -> Call:
    """The sample on the model's device; on the meta device only shapes count."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved: Call = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, call)
    return moved
