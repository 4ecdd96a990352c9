"""``RebasinCallback``: when a fine-tuning ends, line its task vector up with another run's, compare, and merge."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_wsl.callbacks.sample import Call, find_samples, ways_to_call
from lit_wsl.checkpoint import atomic_write_text, open_checkpoint
from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.inference import infer_permutation_spec
from lit_wsl.rebasin.job import (
    MEAN_STATISTICS,
    REPORT_FILE,
    AlignOptions,
    Merge,
    On,
    RebasinReport,
    align,
    fit_names,
    names_of,
    write_results,
)
from lit_wsl.rebasin.merging import has_batch_statistics, reestimate_batchnorm
from lit_wsl.rebasin.spec import PermutationSpec
from lit_wsl.structure.preserving import preserved_rng
from lit_wsl.structure.tracing import only_child

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
    processes rank zero does the work. With weight averaging the averaged weights are used, as they are what the fit
    leaves in the model.

    Args:
        pretrained: Checkpoint that all runs started from; None only with ``on="weights"``.
        reference: Checkpoint of the run that the others are aligned to.
        others: Checkpoints of further runs.
        on: What is compared: ``"task_vectors"`` or ``"weights"``. YAML reads a bare ``on`` as true, so a config file
            needs quotes around the key: ``"on": weights``.
        max_iter: Most sweeps over all groups for each start of the matching.
        seed: Seed of the matching's random orders.
        restarts: Further starts where the first one leaves room for doubt.
        merge: ``"average"`` or ``"task_arithmetic"`` of all models to write a merged checkpoint; None for none.
        merge_scale: Factor of each task vector in task arithmetic; None for one over their number.
        repair_batches: Training batches for the batch norm statistics of the merged model; 0 keeps their mean.
        update_model: Load the run's ``"aligned"`` or the ``"merged"`` weights into the fitted model; None leaves it.
        spec: JSON file of a permutation spec, in place of the inference.
        verify: Whether to prove an inferred spec (two more forward passes).
        spectra: Whether to compute the metrics that need singular value decompositions.
        log_layers: Whether loggers get the metrics of every layer too; the JSON always has them.
        save_weights: Whether to write aligned checkpoints.
        device: Where similarity matrices are computed; by default the GPU that was trained on, else the CPU.

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
        pretrained: str | Path | None,
        reference: str | Path,
        others: Sequence[str | Path] = (),
        *,
        on: On = "task_vectors",
        max_iter: int = 100,
        seed: int = 0,
        restarts: int = 2,
        merge: Merge | None = None,
        merge_scale: float | None = None,
        repair_batches: int = 32,
        update_model: Update | None = None,
        spec: str | Path | None = None,
        verify: bool = True,
        spectra: bool = True,
        log_layers: bool = False,
        save_weights: bool = True,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.options = AlignOptions(
            on=on,
            max_iter=max_iter,
            seed=seed,
            restarts=restarts,
            spectra=spectra,
            merge=merge,
            merge_scale=merge_scale,
            device=device,
        )
        if pretrained is None and (on == "task_vectors" or merge == "task_arithmetic"):
            raise RebasinError("task vectors need the pretrained checkpoint: give it, or choose on='weights'")
        if update_model is not None and update_model not in get_args(Update):
            raise RebasinError(f"update_model={update_model!r} is not known: 'aligned', 'merged' or None")
        if update_model == "merged" and merge is None:
            raise RebasinError("update_model='merged' needs merge='average' or merge='task_arithmetic'")
        if isinstance(others, (str, Path)):
            others = (others,)
        self.pretrained, self.reference, self.others = pretrained, reference, tuple(others)
        self.repair_batches, self.update_model = repair_batches, update_model
        self.spec_file, self.verify = spec, verify
        self.log_layers, self.save_weights = log_layers, save_weights
        self.report: RebasinReport | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do it all; never raises."""
        self.report = None
        folder: str | None = None
        try:
            folder = trainer.log_dir  # a collective call: on all ranks
            if getattr(trainer, "fast_dev_run", False):
                return
            own = _whole_state(pl_module)  # collective too, where the weights are sharded
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
        shapes = {name: tensor.shape for name, tensor in own.items()}
        loaded = {
            name: fit_names(open_checkpoint(path), shapes, str(path)) for name, path in zip(names_of(paths), paths)
        }
        loaded = {f"{name}_checkpoint" if name == RUN else name: state for name, state in loaded.items()}
        reference, *rest = loaded
        _refuse_gaps(loaded, module)
        models = {reference: loaded[reference], RUN: own, **{name: loaded[name] for name in rest}}
        shared = [n for n in own if all(n in state for state in models.values())]
        models = {name: {n: state[n] for n in shared} for name, state in models.items()}
        base = None
        if self.pretrained is not None:
            base = fit_names(open_checkpoint(self.pretrained), shapes, str(self.pretrained))
        call, spec, reason = self._spec(trainer, module)
        if reason:
            rank_zero_warn(f"Rebasin: the models are compared as they are, not aligned: {reason}")
        options = self.options
        if options.device is None and trainer.strategy.root_device.type == "cuda":
            options = replace(options, device=str(trainer.strategy.root_device))
        parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        report = align(models, base, spec, options, parameters=parameters, reason=reason)
        report = self._complete(report, own)
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
    ) -> tuple[Call | None, PermutationSpec | None, str | None]:
        """The call that worked, the spec, and why there is none."""
        from lit_wsl.callbacks.weight_transfer import quiet

        if self.spec_file is not None:
            return None, PermutationSpec.from_json(Path(self.spec_file)), None
        calls, why = find_samples(trainer, module, "fit")
        if not calls:
            return None, None, f"{why}; a sample is needed to infer the permutation symmetries"
        callee, prefix = _callee(module)
        reasons = []
        with quiet(trainer, module):
            for args, kwargs in calls:
                try:
                    spec = infer_permutation_spec(callee, args, kwargs, verify=self.verify)
                except Exception as error:
                    reasons.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
                    continue
                if not spec.groups:
                    reasons.append("no group of units of this model can be permuted")
                    continue
                return (args, kwargs), _prefixed(spec, prefix), None
        return None, None, reasons[0]

    def _complete(self, report: RebasinReport, own: Mapping[str, Tensor]) -> RebasinReport:
        """Give the run's aligned weights and the merged ones what only the run has."""
        models = dict(report.models)
        state = models[RUN].state_dict
        if state is not None:
            models[RUN] = replace(models[RUN], state_dict={n: state.get(n, t) for n, t in own.items()})
        merged = report.merged
        if merged is not None:
            merged = {n: merged.get(n, t) for n, t in own.items()}
        return replace(report, models=models, merged=merged)

    def _repair(
        self, trainer: pl.Trainer, module: pl.LightningModule, report: RebasinReport, call: Call | None
    ) -> RebasinReport:
        """Estimate the batch norm statistics of the merged model on training data."""
        if report.merged is None or not has_batch_statistics(module):
            return report
        try:
            if self.repair_batches < 1:
                raise RebasinError("repair_batches is 0")
            probe = copy.deepcopy(module)
            probe.load_state_dict(report.merged, strict=False)
            callee, _ = _callee(probe)

            def forward(_: Any, batch: Any) -> None:
                _call_like(callee, batch, call)

            count = reestimate_batchnorm(
                probe, _train_batches(trainer, probe), forward=forward, max_batches=self.repair_batches
            )
            state = {n: t.detach().clone() for n, t in probe.state_dict().items() if isinstance(t, Tensor)}
            note = f"batch norm statistics of the merged model were estimated on {count} training batches"
            notes = tuple(n for n in report.notes if n != MEAN_STATISTICS)
            return replace(report, merged=state, notes=(*notes, note))
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
        if self.update_model is not None and state is not None:
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


def _whole_state(module: pl.LightningModule) -> dict[str, Tensor]:
    """The model's state dict on the CPU, sharded tensors gathered (a collective call then), nothing shared with it."""
    state = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        state[name] = whole.detach().cpu().clone()
    return state


def _refuse_gaps(loaded: Mapping[str, Mapping[str, Tensor]], module: pl.LightningModule) -> None:
    """Every run must have every parameter, in the model's shape."""
    for name, state in loaded.items():
        gaps = [n for n, _ in module.named_parameters() if n not in state]
        if gaps:
            shape = tuple(module.get_parameter(gaps[0]).shape)
            raise RebasinError(
                f"{name} lacks {len(gaps)} parameters of the model, such as {gaps[0]!r} of shape {shape}: is it a "
                "fine-tuning of the same architecture? Otherwise convert it first (lit-wsl map, lit-wsl convert)."
            )


def _callee(module: pl.LightningModule) -> tuple[Any, str]:
    """The module that a sample is for, and the prefix of its names: the model, or the network it wraps."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    path = None if is_overridden("forward", module) else only_child(module)
    return (module, "") if path is None else (module.get_submodule(path), f"{path}.")


def _prefixed(spec: PermutationSpec, prefix: str) -> PermutationSpec:
    """The spec of a submodule under the names of the whole model."""
    if not prefix:
        return spec
    return replace(
        spec,
        axes={prefix + name: axes for name, axes in spec.axes.items()},
        shapes={prefix + name: shape for name, shape in spec.shapes.items()},
        parameters=tuple(prefix + name for name in spec.parameters),
        frozen={prefix + name: why for name, why in spec.frozen.items()},
    )


def _train_batches(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[Any]:
    """Training batches on the CPU, after the transfer hooks."""
    loaders = trainer.train_dataloader
    if loaders is None:
        raise RebasinError("the trainer has no training batches any more")
    for batch in loaders:
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield module._apply_batch_transfer_handler(batch, device=torch.device("cpu"), dataloader_idx=0)


def _call_like(callee: Any, batch: Any, call: Call | None) -> None:
    """Call the model on a batch in the way that worked for the sample."""
    errors = []
    for args, kwargs in ways_to_call(callee, batch):
        if call is not None and (len(args), sorted(kwargs)) != (len(call[0]), sorted(call[1])):
            continue
        try:
            callee(*args, **kwargs)
        except Exception as error:
            errors.append(error)
            continue
        return
    raise RebasinError(f"the model does not take a training batch: {errors[0] if errors else 'no way to call it'}")
