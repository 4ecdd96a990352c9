"""``lit-wsl rebase``: carry a fine-tuning to another release of its pretrained model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import islice
from typing import Any

from torch import Tensor, nn

from lit_wsl.checkpoint import atomic_save, open_checkpoint
from lit_wsl.cli.console import fields, put_json, remark, say
from lit_wsl.cli.models import UsageError, build_model, sample_call
from lit_wsl.cli.rebasing import load_batches, load_outputs, load_spec
from lit_wsl.errors import LitWslError, RebasinError
from lit_wsl.rebasin import RebaseResult, rebase, task_vector
from lit_wsl.rebasin.job_model import MainOutputs, call_like, callee, read_run
from lit_wsl.rebasin.merging.merge import is_continuous, is_statistic
from lit_wsl.structure.running import Call, ways_to_call


def run(options: Any) -> int:
    """Run the command."""
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
    _show(options, result, fresh)
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


def _show(options: Any, result: RebaseResult, fresh: Mapping[str, Tensor]) -> None:
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
