"""``WeightTransferCallback``: a refactored Lightning model starts from its old checkpoint."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lit_wsl.callbacks.lifecycle import (
    announce,
    has_trained_elsewhere,
    is_whole,
    mind_copies,
    needs_memory,
    report_nothing,
    resumed_path,
    when_whole,
    write_report,
)
from lit_wsl.callbacks.sample import find_samples, quiet
from lit_wsl.convert.optimizers import CarryOptions, OnLost
from lit_wsl.convert.resume import Resume as Resuming
from lit_wsl.convert.resume import ResumeOptions
from lit_wsl.convert.saved_optimizer import Wins
from lit_wsl.errors import MappingError
from lit_wsl.matching.options import BufferMode, MatchingOptions, Strategy
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.progress import transfer_progress
from lit_wsl.report.report import TransferReport
from lit_wsl.structure.execution_order import is_lazy
from lit_wsl.structure.running import Call
from lit_wsl.transfer.api import finish_transfer, prepare_transfer
from lit_wsl.transfer.floor import valid_floor
from lit_wsl.transfer.ranks import ALONE, Ranks, has_sharded_tensors, refuse_wrapped
from lit_wsl.transfer.sides import Source, Target, open_source
from lit_wsl.transfer.undo import UndoLog

if TYPE_CHECKING:
    import lightning.pytorch as pl

Resume = Literal["weights", "optimizer", "all"]


class WeightTransferCallback(Callback):
    """Fill the model from a checkpoint of another version of it, once, before training or evaluation starts.

    The transfer happens as soon as the model is whole: at ``setup`` for models built in ``__init__``, after
    ``LightningModule.setup`` and ``configure_model`` for models that override these, and in any case before the
    optimizers are made. It is done once per model: a ``test`` after a ``fit``, or a second ``fit``, goes on with the
    weights that training left. Where the run itself restores a checkpoint (``ckpt_path``), that one wins and nothing
    is transferred.

    Nothing else changes: random generators, the order and augmentation of the data, modes, buffers, metrics and
    gradients are as they would be without the callback.

    List it before callbacks that copy the model, such as ``WeightAveraging``.

    Args:
        checkpoint: The old checkpoint, of any format that :func:`lit_wsl.checkpoint.open_checkpoint` reads.
        buffers: ``"exclude"`` ignores buffers, ``"lenient"`` takes them along where they fit, ``"strict"`` asks that
            all of a module's buffers match.
        strategy: ``"best_match"``, ``"conservative"`` (scores of at least 0.75) or ``"shape_only"`` (ignores names).
        threshold: Least score of a match, 0 to 1.
        weights: Weights of ``shape``, ``name`` and ``hierarchy`` in the score.
        incompatible_pairs: Pairs of sets of name chunks that must not match across.
        plan: A plan, or the path of one, to replay instead of matching.
        min_coverage: Least share, 0 to 1, of parameter elements that must find a place; below it the run stops.
        source_module: The module the checkpoint was saved from, for users who still have the old code.
        adapt: Operations that change values, asked for by name.
        assume_layouts: You know that both models order the rows of queries and keys alike, and cut patches alike.
            Without, what only the function could show stays ambiguous, unless ``source_module`` and a sample prove it.
        checkpoint_weights: Which weights of the file: the ``"model"``'s, its ``"ema"``, or what it marks as its own.
        resume: ``"weights"`` starts training afresh; ``"optimizer"`` carries the states of optimizers, schedulers and
            the gradient scaler along; ``"all"`` also epoch, step, loops, callbacks and the datamodule, as if the
            checkpoint had been converted and given to ``trainer.fit(ckpt_path=...)``.
        optimizer_settings: With ``resume``, whose weight decays, betas, step sizes of schedulers, ... count where they
            differ: the ``"checkpoint"``'s, or those of this ``"run"``. What differs is named in the report.
        schedule: With ``resume``, whose learning rates and schedulers count. ``"run"`` carries the old moments into a
            schedule that starts anew.
        parameter_names: With ``resume``, for each optimizer of the checkpoint the old names in index order, where they
            can't be inferred.
        on_lost: With ``resume``, what to do where an optimizer's state can't go through the operation of its parameter:
            ``"refuse"``, or ``"initialize"`` it.
        drop: With ``resume``, entries of the checkpoint to leave out, by their keys joined with ``/``
            (``"callbacks/EMA"``; ``*`` stands for any text).
        verbose: Whether to print the coverage.

    Attributes:
        report: The :class:`~lit_wsl.report.report.TransferReport` of the last transfer, ``None`` before it.

    Raises:
        MappingError: If an option has a value that is not allowed.

    Example::

        trainer = Trainer(callbacks=[WeightTransferCallback("old.ckpt", buffers="exclude")])
        trainer.fit(model, datamodule=data)
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        buffers: BufferMode = "lenient",
        strategy: Strategy = "best_match",
        threshold: float = 0.6,
        weights: Mapping[str, float] | None = None,
        incompatible_pairs: Sequence[tuple[set[str], set[str]]] | None = None,
        plan: str | Path | TransferPlan | None = None,
        min_coverage: float = 0.5,
        source_module: nn.Module | None = None,
        adapt: Sequence[str] = (),
        assume_layouts: bool = False,
        checkpoint_weights: Literal["auto", "model", "ema"] = "auto",
        resume: Resume = "weights",
        optimizer_settings: Wins = "checkpoint",
        schedule: Wins = "checkpoint",
        parameter_names: Sequence[Sequence[str]] | None = None,
        on_lost: OnLost = "refuse",
        drop: Sequence[str] = (),
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self.options = MatchingOptions.make(
            buffers=buffers,
            strategy=strategy,
            threshold=threshold,
            weights=weights,
            incompatible_pairs=incompatible_pairs,
            adapt=adapt,
            assume_layouts=assume_layouts,
        )
        for option, value, allowed in (
            ("resume", resume, get_args(Resume)),
            ("checkpoint_weights", checkpoint_weights, ("auto", "model", "ema")),
            ("optimizer_settings", optimizer_settings, get_args(Wins)),
            ("schedule", schedule, get_args(Wins)),
            ("on_lost", on_lost, get_args(OnLost)),
        ):
            if value not in allowed:
                raise MappingError(f"{option} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")
        self.checkpoint = checkpoint
        self.plan = plan
        self.min_coverage = valid_floor(min_coverage)
        self.source_module = source_module
        self.checkpoint_weights = checkpoint_weights
        self.resume = resume
        self._resume_options: ResumeOptions | None = None
        if resume != "weights":
            carry = CarryOptions(parameter_names, on_lost, optimizer_settings, schedule)
            self._resume_options = ResumeOptions(resume, carry, tuple(drop) if not isinstance(drop, str) else (drop,))
        self._resuming: Resuming | None = None
        self.verbose = verbose
        self.report: TransferReport | None = None
        self._served: weakref.ref[nn.Module] | None = None
        self._take_back: Callable[[], None] | None = None
        self._remembered: dict[str, Any] | None = None  # from a resumed checkpoint
        self._fresh = False  # transferred in this very run
        self._foreseen = True  # whether setup could tell what this run restores

    # -- hooks of Lightning ----------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Transfer now if the model is whole, else as soon as it is."""
        self._forget_request()
        if self._served is not None and self._served() is pl_module:
            return
        self._foreseen, resumed = resumed_path(trainer)
        if resumed is not None:
            self._served = weakref.ref(pl_module)
            self._yield_to(trainer, pl_module, f"this run restores {resumed}, which wins")
            write_report(trainer, self.report)
        elif has_trained_elsewhere(trainer):
            self._yield_to(trainer, pl_module, "an earlier fit of this trainer, in processes of its own, has trained")
        elif is_whole(pl_module):
            self._transfer(trainer, pl_module, stage)
        else:
            self._take_back = when_whole(
                trainer.strategy,
                lambda: self._transfer(trainer, pl_module, stage, late=True),
                lambda: needs_memory(pl_module) or has_sharded_tensors(pl_module),
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so where a checkpoint was restored over the transfer, which :meth:`setup` could not foresee."""
        unforeseen = self._fresh and not self._foreseen and trainer.ckpt_path
        if unforeseen and self.report is not None and self.report.applied:
            note = f"the checkpoint restored from {trainer.ckpt_path} wins over the transferred weights"
            self.report = replace(self.report, applied=False).with_remarks(notes=(note,))
            rank_zero_info(f"Weight transfer: {note}.")
        self._fresh = False

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._forget_request()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._forget_request()

    @property
    def state_key(self) -> str:
        """Two transfers, from two checkpoints, may stand in one trainer."""
        return self._generate_state_key(checkpoint=self._label)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers of the transfer: primitives only; resumed runs pass it on."""
        if self._remembered is not None and (self.report is None or not self.report.applied):
            return dict(self._remembered)
        if self.report is None:
            return {"checkpoint": self._label, "transferred": False}
        coverage = self.report.coverage
        return {
            "checkpoint": self._label,
            "transferred": self.report.applied,
            "target_coverage": float(coverage.target.share),
            "source_coverage": float(coverage.source.share),
            "tensors": len(self.report.loaded),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the transfer that a resumed run once started from."""
        self._remembered = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Weak references and requests stay in their process."""
        return {**self.__dict__, "_served": None, "_take_back": None}

    # -- the transfer ------------------------------------------------------------------------------------------------

    @property
    def _label(self) -> str:
        if isinstance(self.checkpoint, (str, os.PathLike)):
            return os.fspath(self.checkpoint)
        return type(self.checkpoint).__name__

    def _forget_request(self) -> None:
        if self._take_back is not None:
            self._take_back()
            self._take_back = None
        if self._resuming is not None:
            self._resuming.abandon()
            self._resuming = None

    def _transfer(self, trainer: pl.Trainer, model: pl.LightningModule, stage: str, *, late: bool = False) -> None:
        """Plan, apply, report."""
        self._take_back = None
        ranks = _ranks_of(trainer)
        ranks.together(lambda: refuse_wrapped(model, trainer.strategy))
        source, target, remark = self._sides(trainer, model, stage, ranks)
        with quiet(trainer, model):
            prepared = prepare_transfer(
                source, target, self.options, plan=self.plan, min_coverage=self.min_coverage, ranks=ranks
            )
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not nn.parameter.is_lazy(t))
        resuming, undo = None, None
        if self._resume_options is not None and trainer.state.fn == "fit":
            options = self._resume_options
            resuming = Resuming(trainer, model, source.tensors, prepared.plan, prepared.target, options, ranks)
            resuming.check()
            undo = UndoLog(spill=True)
        with transfer_progress(size, enabled=self.verbose and trainer.is_global_zero) as progress:
            report = finish_transfer(prepared, source.tensors, target, progress=progress, ranks=ranks, undo=undo)
        if remark:
            report = report.with_remarks(notes=(remark,))
        warnings, notes = mind_copies(trainer, model, self, report.loaded, late=late)
        report = report.with_remarks(warnings=warnings, notes=notes)
        self._served, self._fresh = weakref.ref(model), True
        self.report = report
        announce(trainer, report, verbose=self.verbose)
        if resuming is not None and undo is not None:
            self._resuming = resuming
            resuming.begin(undo, partial(self._resumed, trainer, undo), partial(self._failed, undo), late=late)

    def _resumed(self, trainer: pl.Trainer, undo: UndoLog, remarks: tuple[str, ...]) -> None:
        """Report what training goes on with."""
        self._resuming = None
        undo.close()
        assert self.report is not None
        self.report = self.report.with_remarks(notes=remarks)
        for remark in remarks:
            if "_settings=" in remark or "schedule=" in remark:  # one side's wish was not followed
                rank_zero_warn(f"Weight transfer: {remark}.")
        rank_zero_info(f"Weight transfer: {remarks[-1]}.")
        write_report(trainer, self.report)

    def _failed(self, undo: UndoLog, error: BaseException) -> BaseException:
        """Put back what was there before a resume that cannot be."""
        self._resuming, self._served, self._fresh = None, None, False
        if self.report is not None:
            self.report = replace(self.report, applied=False)
        told = undo.take_back(error)
        undo.close()
        return told

    def _sides(
        self, trainer: pl.Trainer, model: pl.LightningModule, stage: str, ranks: Ranks
    ) -> tuple[Source, Target, str]:
        """Open the checkpoint and describe the model, with a sample where there is one, or a remark why not."""
        opened = ranks.together(lambda: open_source(self.checkpoint, self.checkpoint_weights))
        if self.plan is not None and not is_lazy(model):
            samples: list[Call] = []  # a plan is replayed as it is: no need to run anything
            remark = ""
        else:
            samples, remark = find_samples(trainer, model, stage)
        with quiet(trainer, model):
            return Source(self.checkpoint, opened, self.source_module, samples), Target.of(model, samples), remark

    def _yield_to(self, trainer: pl.Trainer, model: pl.LightningModule, why: str) -> None:
        """Report that other weights win, such as those of a resumed checkpoint."""
        note = f"{why}; nothing was transferred from {self._label}"
        self.report = report_nothing(model, self._label, self.options, note)
        rank_zero_info(f"Weight transfer: {note}.")


def _ranks_of(trainer: pl.Trainer) -> Ranks:
    """The processes that run this trainer together; trainers of one device each share nothing."""
    return Ranks.of_run() if trainer.world_size > 1 else ALONE
