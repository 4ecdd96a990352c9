"""``lit-wsl rebasin``: align, compare, merge models; ``lit-wsl rebase``: carry a fine-tuning to another release."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_wsl.checkpoint import atomic_save, open_checkpoint
from lit_wsl.cli.console import fields, put_json, remark, say, table
from lit_wsl.cli.models import UsageError, build_model, look_up, sample_call
from lit_wsl.errors import LitWslError, RebasinError
from lit_wsl.rebasin import RebaseResult, rebase, task_vector
from lit_wsl.rebasin.job import AlignOptions, On, RebasinReport, align, names_of, write_results
from lit_wsl.rebasin.job_model import (
    UNPROVEN,
    MainOutputs,
    Outputs,
    best_matcher,
    call_like,
    find_spec,
    read_run,
    repaired,
)
from lit_wsl.rebasin.merging.merge import is_continuous, is_statistic
from lit_wsl.rebasin.responses import has_batch_statistics
from lit_wsl.rebasin.spec.spec import PermutationSpec
from lit_wsl.structure.execution_order import callee
from lit_wsl.structure.running import Call, ways_to_call


def rebasin(options: Any) -> int:
    """Run ``rebasin``."""
    if len(options.checkpoints) < 2:
        raise UsageError("give two checkpoints at least; the first is the reference.")
    on: On = options.on or ("task_vectors" if options.base else "weights")
    settings = AlignOptions(
        on=on,
        max_iter=options.max_iter,
        seed=options.seed,
        merge=options.merge,
        merge_scale=options.merge_scale,
        merge_weights=tuple(options.merge_weights) if options.merge_weights else None,
        matching=options.matching,
        device=options.device,
    )
    model = build_model(options, meta=False)
    call = sample_call(options.sample, model)
    _refuse_stale_statistics(options, model)
    if options.matching == "best" and options.data is None:
        raise UsageError("--matching best is judged by data: name it, --data my.models:loader.")
    spec, reason, remarks = load_spec(options, model, call)

    def read(path: str, complete: bool = True) -> dict[str, Any]:
        return read_run(model, open_checkpoint(path, weights=options.checkpoint_weights), path, complete)

    models = dict(zip(names_of(options.checkpoints), map(read, options.checkpoints)))
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    base = read(options.base, complete=False) if options.base else None
    matcher = None
    if options.matching == "best" and spec is not None:
        batches = list(islice(load_batches(options.data), options.repair_batches))
        matcher = best_matcher(model, spec, settings, batches, call, load_outputs(options))
    report = align(models, base, spec, settings, parameters=parameters, reason=reason, matcher=matcher)
    report = replace(report, notes=(*remarks, *report.notes))
    if report.merged is not None and options.data is not None and has_batch_statistics(model):
        report = repaired(model, report, load_batches(options.data), call, options.repair_batches)
    if options.output:
        report = write_results(report, options.output)
    if options.json:
        put_json(report.to_dict(), options.json)
    else:
        _show(report)
    if not report.perm_matching:
        remark(f"warning: the models are compared as they are, not aligned: {report.reason}")
    for note in report.notes:
        remark(f"note: {note}")
    for kind, file in report.files.items():
        remark(f"{kind}: {options.output}/{file}")
    return 0 if report.perm_matching else 1


def _refuse_stale_statistics(options: Any, model: nn.Module) -> None:
    """A merged model whose batch norms describe another one is not written by accident."""
    if options.merge is None or options.data is not None or options.repair_batches < 1:
        return
    if has_batch_statistics(model):
        raise UsageError(
            "the model has batch norms, and the mean of their statistics does not describe the merged model. Name "
            "training data to estimate them anew on, --data my.models:loader (a DataLoader, a LightningDataModule or a "
            "list of batches); or take the mean, which mostly ruins the model, with --repair-batches 0."
        )


def load_spec(
    options: Any, model: nn.Module, call: Call | None
) -> tuple[PermutationSpec | None, str | None, tuple[str, ...]]:
    """The spec of ``--spec``, or an inferred one; or why there is none; and remarks."""
    given = None if options.spec is None else PermutationSpec.from_json(Path(options.spec))
    if call is None and given is not None:
        return given, None, (UNPROVEN,)
    if call is None:
        raise UsageError(
            "which units may be permuted is read from one call of the model: name a function that gives a sample input "
            "with --sample my.models:batch, or give the model an example_input_array, or a spec with --spec spec.json."
        )
    _, spec, reason, remarks = find_spec(model, [call], load_outputs(options), given=given)
    return spec, reason, remarks


def load_outputs(options: Any) -> Outputs | None:
    """The function of ``--outputs``."""
    outputs = look_up(options.outputs) if options.outputs else None
    if outputs is not None and not callable(outputs):
        raise UsageError(f"{options.outputs} is a {type(outputs).__name__}, not a function.")
    return outputs


def load_batches(path: str) -> Iterable[Any]:
    """The batches of ``--data``."""
    from lightning.pytorch import LightningDataModule

    found = look_up(path)
    try:
        if isinstance(found, type) or (callable(found) and not hasattr(found, "__iter__")):
            found = found()
        if isinstance(found, LightningDataModule):
            found.prepare_data()
            found.setup("fit")
            found = found.train_dataloader()
    except Exception as error:
        raise UsageError(f"{path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(found, Iterable):
        raise UsageError(f"{path} gives a {type(found).__name__}, not a DataLoader, a LightningDataModule or batches.")
    return found


def _show(report: RebasinReport) -> None:
    if report.spec is not None:
        share = f"{report.spec.coverage:.1%} of the parameters"
        say(f"groups of units that may be permuted: {len(report.spec.groups)} ({share})")
    rows = []
    for name, model in report.models.items():
        before = model.before.to_dict()["overall"]
        after = model.after.to_dict()["overall"] if model.after is not None else {}
        for metric, value in before.items():
            if isinstance(value, (int, float)):
                then = after.get(metric)
                rows.append((name, metric, f"{value:.4g}", f"{then:.4g}" if isinstance(then, (int, float)) else ""))
    say(f"against the reference {report.reference!r}, on {report.options.on}:")
    table(("model", "metric", "before", "after"), rows, right=(2, 3))


def rebase_(options: Any) -> int:
    """Run ``rebase``."""
    model = build_model(options, meta=False)
    call = sample_call(options.sample, model)
    batches = None if options.data is None else list(islice(load_batches(options.data), options.max_batches))
    if call is None and batches and options.spec is None:
        call = _call_of(model, batches[0])
    spec, reason, remarks = load_spec(options, model, call)
    if spec is None:
        remark(f"the fine-tuning cannot be carried: {reason}")
        return 1
    tuned = read_run(model, _open(options, options.checkpoint), options.checkpoint)
    old, new = (_read_base(options, model, path) for path in (options.base, options.onto))
    fresh = {
        n: t for n, t in tuned.items() if (n not in old or n not in new) and is_continuous(t) and not is_statistic(n)
    }
    pick = load_outputs(options) or MainOutputs()
    result = rebase(
        spec,
        task_vector({n: t for n, t in tuned.items() if n not in fresh}, old, strict=False),
        old,
        new,
        model=model if batches is not None else None,
        batches=batches,
        alpha=options.alpha,
        method=options.method,
        fresh=fresh,
        seed=options.seed,
        forward=lambda network, batch: pick(call_like(callee(network)[0], batch, call)),
    )
    state = {name: result.state_dict.get(name, tensor) for name, tensor in tuned.items()}
    atomic_save(state if str(options.output).endswith(".safetensors") else {"state_dict": state}, options.output)
    _show_carried(options, result, fresh)
    for text in (*remarks, *result.warnings):
        remark(f"note: {text}")
    return 0


def _open(options: Any, path: str) -> Mapping[str, Tensor]:
    return open_checkpoint(path, weights=options.checkpoint_weights)


def _call_of(model: nn.Module, batch: Any) -> Call:
    """The way in which the model takes a batch, as the sample."""
    called, _ = callee(model)
    for args, kwargs in ways_to_call(called, batch):
        try:
            copy.deepcopy(called).eval()(*args, **kwargs)
        except Exception:  # the next way may fit
            continue
        return args, kwargs
    raise UsageError("the model does not take a batch of --data: name a function that gives one input with --sample.")


def _read_base(options: Any, model: nn.Module, path: str) -> dict[str, Tensor]:
    """A base under the model's names; of another implementation, by mapping it first. A new head may be absent."""
    opened = _open(options, path)
    try:
        found = read_run(model, opened, path, complete=False)
    except RebasinError:
        found = {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if parameters <= set(found):
        return found
    mapped = _mapped(options, model, path)
    if len(parameters & set(mapped)) > len(parameters & set(found)):
        remark(f"{path}: mapped to the model's names first, {len(mapped)} tensors")
        return mapped
    return found or read_run(model, opened, path, complete=False)


def _mapped(options: Any, model: nn.Module, path: str) -> dict[str, Tensor]:
    """What a mapping fills of the model from a checkpoint in another spelling; nothing where it fails."""
    from lit_wsl.transfer.api import transfer_weights

    probe = copy.deepcopy(model)
    try:
        report = transfer_weights(probe, path, checkpoint_weights=options.checkpoint_weights)
    except LitWslError:
        return {}
    entries = report.plan.entries
    whole = (entry for entry in entries if not any(operation.needs_target for operation in entry.operations))
    filled = {name for entry in whole for name in entry.targets}
    return {n: t.detach().clone() for n, t in probe.state_dict().items() if isinstance(t, Tensor) and n in filled}


def _show_carried(options: Any, result: RebaseResult, fresh: Mapping[str, Tensor]) -> None:
    facts = {
        "method": result.method,
        "gap": result.gap,
        "missed": result.missed,
        "identity_share": result.matching.identity_share,
        "fresh": sorted(fresh),
        "warnings": list(result.warnings),
        "output": str(options.output),
    }
    if options.json:
        put_json(facts, options.json)
        return
    pairs = [("carried by", result.method), ("units in place", f"{result.matching.identity_share:.1%}")]
    if result.gap is not None and result.missed is not None:
        pairs += [("midpoint gap", f"{result.gap:.3f}"), ("outputs' change missed", f"{result.missed:.1%}")]
    if fresh:
        pairs.append(("fresh", ", ".join(sorted(fresh))))
    fields(pairs)
    say(f"written: {options.output}")
