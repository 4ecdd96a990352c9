"""``lit-wsl rebasin``: align models, compare and merge them."""

from __future__ import annotations

from typing import Any

from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.cli.console import print_json, remark, say, table
from lit_wsl.cli.models import UsageError, build_model, sample_call
from lit_wsl.rebasin.inference import infer_permutation_spec
from lit_wsl.rebasin.job import AlignOptions, On, RebasinReport, align, fit_names, names_of, write_results


def run(options: Any) -> int:
    """Run the command."""
    if len(options.checkpoints) < 2:
        raise UsageError("give two checkpoints at least; the first is the reference.")
    on: On = options.on or ("task_vectors" if options.base else "weights")
    settings = AlignOptions(
        on=on, max_iter=options.max_iter, seed=options.seed, merge=options.merge, merge_scale=options.merge_scale
    )
    model = build_model(options, meta=False)
    call = sample_call(options.sample, model)
    if call is None:
        raise UsageError(
            "which units may be permuted is read from one call of the model: name a function that gives a sample input "
            "with --sample my.models:batch, or give the model an example_input_array."
        )
    spec = infer_permutation_spec(model, *call)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if hasattr(tensor, "shape")}

    def read(path: str) -> dict[str, Any]:
        return fit_names(open_checkpoint(path, weights=options.checkpoint_weights), wanted, path)

    models = dict(zip(names_of(options.checkpoints), map(read, options.checkpoints)))
    report = align(models, read(options.base) if options.base else None, spec, settings)
    if options.output:
        report = write_results(report, options.output)
    if options.json:
        print_json(report.to_dict())
    else:
        _show(report)
    for note in report.notes:
        remark(f"note: {note}")
    for kind, file in report.files.items():
        remark(f"{kind}: {options.output}/{file}")
    return 0 if report.perm_matching else 1


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
