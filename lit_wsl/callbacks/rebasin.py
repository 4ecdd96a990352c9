"""``RebasinCallback``: when a fine-tuning ends, line its task vector up with another run's, compare, and merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_wsl.callbacks.sample import find_samples, quiet
from lit_wsl.checkpoint import atomic_write_text, open_checkpoint
from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.job import (
    REPORT_FILE,
    AlignOptions,
    Matcher,
    Matching,
    Merge,
    On,
    RebasinReport,
    align,
    names_of,
    write_results,
)
from lit_wsl.rebasin.job_model import (
    SHARDED,
    UNPROVEN,
    best_matcher,
    completed,
    find_spec,
    read_run,
    repaired,
    resolve_outputs,
    train_batches,
    whole_state,
)
from lit_wsl.rebasin.responses import has_batch_statistics
from lit_wsl.rebasin.spec.spec import PermutationSpec
from lit_wsl.structure.description import require_path
from lit_wsl.structure.running import Call, has_sharded_tensors, preserved_rng

if TYPE_CHECKING:
    import lightning.pytorch as pl

Update = Literal["aligned", "merged"]
RUN = "run"


class RebasinCallback(Callback):
    """Align this run's task vector, and those of other runs, to a reference run's when the fit ends.

    The permutation symmetries of the model are inferred from one forward pass on a sample of the training data, and
    proven before use. Metrics of the task vectors against the reference's go to every logger, before and after the
    alignment (``rebasin/run/before/cosine``, ...); ``rebasin.json`` with all layers, the aligned checkpoints and, on
    request, the merged one are written to ``trainer.log_dir``.

    Aligning *task vectors* is for comparing them. Whatever is saved for use or merged is aligned by permutations
    found on *whole weights*: two fine-tunings of one initialisation nearly always have their units in the same order
    already, and the share of units that stay in place (``identity_share``) says so.

    The fitted model is not changed unless ``update_model`` says so. Nothing that goes wrong here costs the fit: it is
    warned about, written to ``rebasin.json`` with ``perm_matching: false``, and the run ends normally. With several
    processes rank zero does the work; distributed tensors (``ModelParallelStrategy``) are gathered for it, and the
    symmetries of such a model are read from ``spec``. With weight averaging the averaged weights are used, as they are
    what the fit leaves in the model.

    Args:
        pretrained: Checkpoint that all runs started from; None only with on="weights".
        reference: Checkpoint of the run that the others are aligned to. It can't be left out; it has a default only
            because pretrained in front of it has one, which a config file leaves out.
        others: Checkpoints of further runs.
        on: What is compared: "task_vectors" or "weights". YAML reads a bare on as true, so a config file
            needs quotes around the key: "on": weights.
        max_iter: Most sweeps over all groups for each start of the matching.
        seed: Seed of the matching's random orders.
        restarts: Further starts where the first one leaves room for doubt.
        merge: "average" or "task_arithmetic" of all models to write a merged checkpoint; None for none.
        merge_scale: Factor of each task vector in task arithmetic; None for one over their number.
        merge_weights: How much each model counts in the merged one: the reference, this run, then "others" in their
            order; relative to their sum. None for equally.
        matching: "weights", or "best" to match whole weights also on how units respond to training batches,
            and keep what merges best; worth its time where layers are narrow or runs had different seeds.
        repair_batches: Training batches for that, and for the batch norm statistics of the merged model; 0 keeps
            their mean.
        update_model: Load the run's "aligned" or the "merged" weights into the fitted model; None leaves it.
        spec: JSON file of a permutation spec, in place of the inference. A sharded model needs one.
        outputs: What has to stay as it is of what the model returns, lambda output: output.logits; from YAML the
            import path of a function. By default all floating tensors but hidden states, attention maps and caches
            that come beside others.
        verify: Whether to prove an inferred spec (23 forward passes).
        spectra: Whether to compute the metrics that need singular value decompositions.
        log_layers: Whether loggers get the metrics of every layer too; the JSON always has them.
        save_weights: Whether to write aligned checkpoints.
        device: Where similarity matrices are computed; by default the GPU that was trained on, else the CPU.
        perm_matching: False compares the models as they are.
        perm_matching_max_iter: Another name of max_iter.

    Attributes:
        report: The :class:`~lit_wsl.rebasin.job.RebasinReport` of the last fit, None before it and after a failure.

    Raises:
        RebasinError: An option has a value that is not allowed.

    Example::

        rebasin = RebasinCallback("pretrained.ckpt", "runs/a/last.ckpt", merge="average")
        Trainer(callbacks=[rebasin]).fit(model, datamodule=data)
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        reference: str | Path | None = None,
        others: Sequence[str | Path] = (),
        *,
        on: On = "task_vectors",
        max_iter: int = 100,
        seed: int = 0,
        restarts: int = 2,
        merge: Merge | None = None,
        merge_scale: float | None = None,
        merge_weights: Sequence[float] | None = None,
        matching: Matching = "weights",
        repair_batches: int = 32,
        update_model: Update | None = None,
        spec: str | Path | None = None,
        outputs: Callable[[Any], Any] | str | None = None,
        verify: bool = True,
        spectra: bool = True,
        log_layers: bool = False,
        save_weights: bool = True,
        device: str | None = None,
        perm_matching: bool = True,
        perm_matching_max_iter: int | None = None,
    ) -> None:
        super().__init__()
        self.options = AlignOptions(
            on=on,
            max_iter=max_iter if perm_matching_max_iter is None else perm_matching_max_iter,
            seed=seed,
            restarts=restarts,
            spectra=spectra,
            merge=merge,
            merge_scale=merge_scale,
            merge_weights=None if merge_weights is None else tuple(merge_weights),
            matching=matching,
            device=device,
        )
        if reference is None:
            raise RebasinError(
                "there is nothing to align to: give the checkpoint of a reference run, reference='a.ckpt'"
            )
        if pretrained is None and (on == "task_vectors" or merge == "task_arithmetic"):
            raise RebasinError("task vectors need the pretrained checkpoint: give it, or choose on='weights'")
        if repair_batches < 0:
            raise RebasinError(f"repair_batches={repair_batches} is no number of batches: 0 keeps the mean statistics")
        if update_model is not None and update_model not in get_args(Update):
            raise RebasinError(f"update_model={update_model!r} is not known: 'aligned', 'merged' or None")
        if update_model == "merged" and merge is None:
            raise RebasinError("update_model='merged' needs merge='average' or merge='task_arithmetic'")
        for name, path in (("reference", reference), ("pretrained", pretrained)):
            if path is not None:
                require_path(path, name)
        if isinstance(others, (str, Path)):
            others = (others,)
        if merge is not None:
            self.options.shares(2 + len(others))
        self.pretrained, self.reference, self.others = pretrained, reference, tuple(others)
        self.repair_batches, self.update_model = repair_batches, update_model
        self.spec_file, self.verify, self.outputs = spec, verify, resolve_outputs(outputs)
        self.log_layers, self.save_weights = log_layers, save_weights
        self.perm_matching = perm_matching
        self.report: RebasinReport | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do it all; never raises."""
        self.report = None
        folder: str | None = None
        try:
            folder = trainer.log_dir  # a collective call: on all ranks
            if getattr(trainer, "fast_dev_run", False):
                return
            own = whole_state(pl_module)  # collective too, where the weights are sharded
            if not trainer.is_global_zero:
                return
            with preserved_rng(pl_module):
                self.report = self._work(trainer, pl_module, own, folder)
        except Exception as error:
            self._fail(trainer, folder, error)

    # ---- the work ----------------------------------------------------------------------------------------------------

    def _work(
        self, trainer: pl.Trainer, module: pl.LightningModule, own: dict[str, Tensor], folder: str | None
    ) -> RebasinReport:
        paths = [self.reference, *self.others]
        loaded = {
            name: read_run(module, open_checkpoint(path), str(path)) for name, path in zip(names_of(paths), paths)
        }
        loaded = {f"{name}_checkpoint" if name == RUN else name: state for name, state in loaded.items()}
        reference, *rest = loaded
        models = {reference: loaded[reference], RUN: own, **{name: loaded[name] for name in rest}}
        shared = [n for n in own if all(n in state for state in models.values())]
        models = {name: {n: state[n] for n in shared} for name, state in models.items()}
        base = None
        if self.pretrained is not None:
            base = read_run(module, open_checkpoint(self.pretrained), str(self.pretrained), complete=False)
        call, spec, reason, remarks = self._spec(trainer, module)
        if reason and self.perm_matching:
            rank_zero_warn(f"Rebasin: the models are compared as they are, not aligned: {reason}")
        options = self.options
        if options.device is None and trainer.strategy.root_device.type == "cuda":
            options = replace(options, device=str(trainer.strategy.root_device))
        parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        matcher, note = self._matcher(trainer, module, spec, call)
        report = align(models, base, spec, options, parameters=parameters, reason=reason, matcher=matcher)
        remarks += (note,) if note else ()
        report = completed(replace(report, notes=(*remarks, *report.notes)), RUN, own)
        report = self._repair(trainer, module, report, call)
        self._log(trainer, report)
        if folder is not None:
            report = write_results(report, folder, weights=self.save_weights)
        self._update(module, report)
        if report.perm_matching:
            shares = {name: m.compared.identity_share for name, m in report.models.items() if m.compared}
            shown = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            rank_zero_info(f"Rebasin: aligned to {report.reference}; units that stay in place: {shown}.")
        return report

    def _spec(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> tuple[Call | None, PermutationSpec | None, str | None, tuple[str, ...]]:
        """The call that worked, the spec, why there is none, and remarks."""
        if not self.perm_matching:
            return None, None, "perm_matching=False asks for no alignment", ()
        given = PermutationSpec.from_json(Path(self.spec_file)) if self.spec_file is not None else None
        if given is not None and not self.verify:
            return None, given, None, ()
        if has_sharded_tensors(module):
            return (None, None, SHARDED, ()) if given is None else (None, given, None, (UNPROVEN,))
        calls, why = find_samples(trainer, module, "fit")
        if not calls and given is None:
            return None, None, f"{why}; a sample is needed to infer the permutation symmetries", ()
        with quiet(trainer, module):
            return find_spec(module, calls, self.outputs, given=given, verify=self.verify)

    def _matcher(
        self, trainer: pl.Trainer, module: pl.LightningModule, spec: PermutationSpec | None, call: Call | None
    ) -> tuple[Matcher | None, str | None]:
        """What matches on data, if asked for; or a remark why it can't."""
        if spec is None or self.options.matching != "best":
            return None, None
        try:
            batches = list(islice(train_batches(trainer, module), self.repair_batches))
            return best_matcher(module, spec, self.options, batches, call, self.outputs), None
        except Exception as error:
            note = f"matched on weights alone, not on data: {error}"
            rank_zero_warn(f"Rebasin: {note}")
            return None, note

    def _repair(
        self, trainer: pl.Trainer, module: pl.LightningModule, report: RebasinReport, call: Call | None
    ) -> RebasinReport:
        """Estimate the batch norm statistics of the merged model on training data."""
        if report.merged is None or not has_batch_statistics(module):
            return report
        try:
            if self.repair_batches < 1:
                raise RebasinError("repair_batches is 0")
            if has_sharded_tensors(module):
                raise RebasinError("the model is sharded and cannot run on one rank")
            return repaired(module, report, train_batches(trainer, module), call, self.repair_batches)
        except Exception as error:
            note = f"batch norm statistics of the merged model could not be estimated anew: {error}"
            rank_zero_warn(f"Rebasin: {note}")
            return replace(report, notes=(*report.notes, note))

    def _log(self, trainer: pl.Trainer, report: RebasinReport) -> None:
        """To every logger directly: ``self.log`` is closed by now."""
        values = report.scalars(layers=self.log_layers)
        for logger in trainer.loggers:
            try:
                logger.log_metrics(values, step=trainer.global_step)
                logger.save()
            except Exception as error:
                rank_zero_warn(f"Rebasin: {type(logger).__name__} could not log the metrics: {error}")

    def _update(self, module: pl.LightningModule, report: RebasinReport) -> None:
        state = report.merged if self.update_model == "merged" else report.models[RUN].state_dict
        if self.update_model is not None and state is not None and has_sharded_tensors(module):
            rank_zero_warn(f"Rebasin: update_model={self.update_model!r} is left out: the model is sharded.")
        elif self.update_model is not None and state is not None:
            module.load_state_dict(state, strict=False)

    def _fail(self, trainer: pl.Trainer, folder: str | None, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        rank_zero_warn(f"Rebasin failed, the fit is not affected: {reason}")
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            with suppress(Exception):
                logger.log_metrics({"rebasin/perm_matching": 0.0}, step=trainer.global_step)
        if folder is not None:
            content = {"perm_matching": False, "reason": reason, "on": self.options.on, "models": {}}
            with suppress(Exception):
                Path(folder).mkdir(parents=True, exist_ok=True)
                atomic_write_text(Path(folder) / REPORT_FILE, json.dumps(content, indent=2) + "\n")
