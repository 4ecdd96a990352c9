"""``lit-wsl convert`` and ``lit-wsl rename``: write a checkpoint for the new model, or the same under other names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_wsl.cli import NO
from lit_wsl.cli.console import progress, put_json, remark, say, table
from lit_wsl.cli.models import UsageError, build_model, matching_options, read_yaml, wanted
from lit_wsl.convert.checkpoint import convert_checkpoint
from lit_wsl.errors import CoverageError
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.renamer import WeightRenamer
from lit_wsl.report.terminal import gap_lines
from lit_wsl.structure.families import fold


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
    from lit_wsl.transfer.api import prepare_transfer
    from lit_wsl.transfer.sides import Source, Target

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
