"""``lit-wsl map``, ``convert`` and ``rename``: match a checkpoint to a model, and write it with that model's names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_wsl.cli import NO
from lit_wsl.cli.console import on_terminal, progress, put_json, remark, say, table
from lit_wsl.cli.models import (
    UsageError,
    build_from,
    build_model,
    data_from_config,
    matching_options,
    read_yaml,
    sample_call,
    wanted,
)
from lit_wsl.convert.checkpoint import convert_checkpoint
from lit_wsl.errors import CoverageError
from lit_wsl.plan.coverage import likely_cause
from lit_wsl.plan.entries import Side
from lit_wsl.plan.file import plan_to_document
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.renamer import WeightRenamer
from lit_wsl.report.report import TransferReport
from lit_wsl.report.rows import gaps, open_questions
from lit_wsl.report.terminal import MappingView, ReportView, amount, excluded_lines, gap_lines
from lit_wsl.structure.description import shape_text
from lit_wsl.structure.families import fold
from lit_wsl.transfer.api import OnData, prepare_transfer
from lit_wsl.transfer.sides import Source, Target


def map_(options: Any) -> int:
    """Run ``map``."""
    old = build_from(options.source_model, options.source_model_args) if options.source_model else None
    data_module = data_from_config(options.config) if options.config and options.proof == "auto" else None
    model = build_model(options, meta=options.sample is None and data_module is None)
    call = sample_call(options.sample, model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))  # on meta only shapes count
    samples = [tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, call)] if call else []
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


def convert(options: Any) -> int:
    """Run ``convert``."""
    refuse_same(options.checkpoint, options.output)
    try:
        return _convert(options)
    except CoverageError as error:
        remark(f"lit-wsl convert: {error}")
        return NO


def _convert(options: Any) -> int:
    plan = _plan(options)
    needs_values = any(op.needs_target for entry in plan.entries for op in entry.operations)
    needs_values |= bool(plan.unmatched_target or plan.ambiguous)  # what has no source is the model's own
    model = build_model(options, meta=not needs_values) if wanted(options) else None
    alike = ("on_lost", "drop", "weights_only", "keep_foreign", "checkpoint_weights", "min_coverage")
    with progress("converting") as step:
        done = convert_checkpoint(
            options.checkpoint,
            options.output,
            plan,
            target=model,
            parameter_names=_names(options.parameter_names),
            progress=step,
            **{name: getattr(options, name) for name in alike},
        )
    for note in done.notes:
        remark(f"note: {note}")
    counts = {"parameters": done.coverage.target, "buffers": done.coverage.target_buffers} if done.coverage else {}
    if options.json:
        told = {"output": options.output, "tensors": done.tensors, "optimizers": done.optimizers, "states": done.states}
        put_json({**told, "coverage": {what: asdict(count) for what, count in counts.items()}}, options.json)
        return 0
    carried = f"{done.optimizers} optimizer{'s' if done.optimizers != 1 else ''}"
    say(
        f"{options.output}: {done.tensors} tensors"
        + (f", {carried} with the states of {done.states} parameters" if done.optimizers else "")
    )
    for what, count in counts.items():
        if count.of_tensors:
            say(
                f"  {what} of the new model with a source: {count.tensors} of {count.of_tensors} tensors, "
                f"{count.share:.1%} of {count.of_elements:,} elements"
            )
    return 0


def _plan(options: Any) -> TransferPlan:
    """The plan of ``--plan``; without one, the checkpoint is matched to the model here."""
    if options.plan is not None:
        plan = TransferPlan.load(options.plan)
        return plan.reverse() if options.reverse else plan
    if options.reverse or not wanted(options):
        raise UsageError("name the plan, --plan plan.json, or the new model to match it here: --model my.models:Net.")
    source, target = Source.open(options.checkpoint, options.checkpoint_weights), Target.of(build_model(options))
    prepared = prepare_transfer(source, target, matching_options(options), min_coverage=options.min_coverage)
    for line in gap_lines(prepared.report()):
        remark(line)
    return prepared.plan


def refuse_same(source: str, destination: str) -> None:
    """Refuse to write over what is being read."""
    if Path(source).exists() and Path(destination).exists() and Path(source).samefile(destination):
        raise UsageError(f"{destination} is the checkpoint itself; write to another file, so that you can go back.")


def _names(file: str | None) -> list[list[str]] | None:
    if file is None:
        return None
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}") from error
    if isinstance(data, list) and all(isinstance(item, str) for item in data):
        data = [data]
    if not isinstance(data, list) or not all(isinstance(o, list) and all(isinstance(n, str) for n in o) for o in data):
        raise UsageError(f'{file} must hold a list of names for each optimizer: [["a.weight", "a.bias"]].')
    return data


def rename(options: Any) -> int:
    """Run ``rename``."""
    if not options.dry_run and options.output is None:
        raise UsageError("say where to write the result: -o new.ckpt, or look only: --dry-run.")
    if options.output is not None:
        refuse_same(options.checkpoint, options.output)
    renamer = WeightRenamer(options.checkpoint)
    before = renamer.list_keys()
    _rename(renamer, options)
    changed = [(old, new) for old, new in zip(before, renamer.list_keys()) if old != new]
    if not options.json:
        table(("old", "new"), [family.patterns for family in fold(changed)])
    if changed and not options.dry_run:
        renamer.save(options.output, keep_foreign=options.keep_foreign)
        if not options.json:
            say(f"{options.output}: {len(changed)} of {len(before)} tensors renamed")
    if options.json:
        put_json({"renamed": dict(changed), "tensors": len(before)}, options.json)
    if not changed:
        remark("lit-wsl rename: no name changes")
        return 1
    return 0


def _rename(renamer: WeightRenamer, options: Any) -> None:
    if options.map:
        names: dict[str, str] = {}
        for item in options.map:
            names.update(_mapping(item))
        renamer.rename_keys(names)
    for item in options.prefix or ():
        renamer.rename_with_prefix(*_pair(item, "--prefix"))
    for item in options.remove_prefix or ():
        renamer.remove_prefix(item.rstrip("."))
    for item in options.add_prefix or ():
        renamer.add_prefix(item.rstrip("."))
    for item in options.regex or ():
        pattern, new = _pair(item, "--regex")
        try:
            compiled = re.compile(pattern)
            compiled.sub(new, "")
        except (re.error, IndexError) as error:
            raise UsageError(f"--regex {item}: {error}") from error
        renamer.rename_by(lambda name, compiled=compiled, new=new: compiled.sub(new, name))  # type: ignore[misc]


def _pair(item: str, option: str) -> tuple[str, str]:
    old, mark, new = item.partition("=")
    if not mark or not old:
        raise UsageError(f"{option} takes OLD=NEW, got {item!r}.")
    return old, new


def _mapping(item: str) -> Mapping[str, str]:
    """``old=new``, or a JSON or YAML file of old and new names."""
    if not Path(item).is_file():
        return dict([_pair(item, "--map")])
    data = read_yaml(item)
    if not isinstance(data, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in data.items()):
        raise UsageError(f"{item} must be a mapping of old to new names.")
    return data
