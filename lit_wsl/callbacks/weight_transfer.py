"""``WeightTransferCallback``: a refactored Lightning model starts from its old checkpoint."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lit_wsl.callbacks.lifecycle import has_trained_elsewhere, is_whole, needs_memory, resumed_path, when_whole
from lit_wsl.callbacks.proof import Recorded, recorded_score, ways_to_prove
from lit_wsl.callbacks.remarks import (
    ON_PURPOSE,
    Before,
    announce,
    given,
    remarked,
    report_nothing,
    transfer_progress,
    write_report,
)
from lit_wsl.callbacks.sample import find_samples, quiet
from lit_wsl.callbacks.state_dicts import extend_state_dicts
from lit_wsl.convert.engines import is_flattened
from lit_wsl.convert.optimizers import CarryOptions, OnLost
from lit_wsl.convert.resume import Resume as Resuming
from lit_wsl.convert.resume import ResumeOptions
from lit_wsl.convert.saved_optimizer import Wins
from lit_wsl.convert.weights import Translation
from lit_wsl.errors import MappingError, TransferError, listed
from lit_wsl.matching.options import BufferMode, MatchingOptions, Strategy, one_of
from lit_wsl.plan.coverage import valid_floor
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.report import TransferReport
from lit_wsl.structure.description import require_module, require_path
from lit_wsl.structure.execution_order import is_lazy
from lit_wsl.structure.running import Call, has_sharded_tensors
from lit_wsl.transfer.api import OnData, Prepared, finish_transfer, prepare_transfer
from lit_wsl.transfer.apply import holds
from lit_wsl.transfer.memory import (
    Held,
    Memory,
    given_by_hand,
    glance,
    look_at_values,
    marks_of,
    note_trained,
    put_marks,
    recall,
    remember,
    shown,
    transfer_key,
    was_trained_here,
    watch_optimizers,
)
from lit_wsl.transfer.ranks import ALONE, Ranks, refuse_wrapped
from lit_wsl.transfer.sides import OLD_MODEL, Source, Target
from lit_wsl.transfer.undo import UndoLog, admit_loss, only_filler

if TYPE_CHECKING:
    import lightning.pytorch as pl

extend_state_dicts()
watch_optimizers()

CHECKPOINT_KEY = "lit_wsl"  # what a checkpoint tells of the transfers that its weights started from
Resume = Literal["weights", "optimizer", "all"]


class WeightTransferCallback(Callback):
    """Fill the model from a checkpoint of another version of it, once, before training or evaluation starts.

    The transfer happens as soon as the model is built: at ``setup`` for models built in ``__init__``, after
    ``LightningModule.setup`` and ``configure_model`` for models that override these, and in any case before the
    optimizers are made. It is done once per model, and the model itself remembers it, for whichever trainer, callback
    or copy comes next: a ``test`` after a ``fit``, or a second ``fit``, continues with the weights that training left;
    only layers that were built anew since are filled again. A model that was trained in this process without a transfer
    is filled by a ``fit`` only, with a warning. Another checkpoint may follow as long as nothing was trained. Where the
    run itself restores a checkpoint (``ckpt_path``), that one takes precedence and nothing is transferred.

    Nothing else changes: random generators, the order and augmentation of the data, modes, buffers, metrics and
    gradients are as they would be without the callback.

    A model made by ``load_from_checkpoint`` is not filled either, nor a module to which ``load_state_dict`` gave
    weights that were saved after a transfer, in whatever process. Other weights that you gave a module by
    ``load_state_dict`` are kept by an evaluation and replaced by a ``fit``; those that a LightningModule loads while it
    is built are replaced. A warning says so.

    List it before callbacks that copy the model, such as ``WeightAveraging``.

    Args:
        checkpoint: The old checkpoint, of any format that open_checkpoint reads.
        buffers: "exclude" ignores buffers, "lenient" takes them along where they fit, "strict" asks that
            all of a module's buffers match.
        strategy: "best_match", "conservative" (scores of at least 0.75) or "shape_only" (ignores names).
        threshold: Minimum score of a match, 0 to 1.
        weights: Weights of shape, name and hierarchy in the score, scaled to a sum of 1.
        incompatible_pairs: Pairs of sets of name chunks that must not match across, both ways, such as
            [({"backbone"}, {"head"})].
        shape_tolerance: Relative difference up to which the sizes of two buffers count as near (0.1: a tenth). What
            is near is not loaded, but "strict" does not refuse its module for it. Parameters never match across
            different shapes.
        plan: A plan, or the path of one, to replay instead of matching.
        min_coverage: Minimum share, 0 to 1, of the elements that must find a place; below it the run stops.
        source_module: The module the checkpoint was saved from, for users who still have the old code.
        adapt: Operations that change values, asked for by name.
        assume_layouts: You know that both models order the rows of queries and keys alike, and cut patches alike.
            Without, what only the function could show stays ambiguous, unless the old model and a sample prove it.
        only: Patterns ("encoder.*") of names of the model, or of its modules: only these are filled.
        skip: Patterns of names of the model that are never filled.
        source_prefix: Only what stands under this name in the checkpoint takes part, such as "student.backbone".
        checkpoint_weights: Which weights of the file: the "model"'s, its "ema", or what it marks as its own.
        resume: "weights" starts training afresh; "optimizer" carries the states of optimizers, schedulers and
            the gradient scaler along; "all" also epoch, step, loops, callbacks and the datamodule, as if the
            checkpoint had been converted and given to trainer.fit(ckpt_path=...).
        optimizer_settings: With resume, whose weight decays, betas, step sizes of schedulers, ... count where they
            differ: the "checkpoint"'s, or those of this "run". What differs is named in the report.
        schedule: With resume, whose learning rates and schedulers count. "run" carries the old moments into a
            schedule that starts anew.
        parameter_names: With resume, for each optimizer of the checkpoint the old names in index order, where they
            can't be inferred.
        on_lost: With resume, what to do where an optimizer's state can't go through the operation of its parameter:
            "refuse", or "initialize" it.
        drop: With resume, entries of the checkpoint to leave out, by their keys joined with /
            ("callbacks/EMA"; * stands for any text).
        again: Whether to fill a model once more that was filled before, by another callback or transfer_weights,
            though training may be undone. Each callback does so once per model.
        proof: "auto" lets the module's own loss on its training data decide what names leave open, and checks the
            whole mapping by it; "off" or False makes no trial.
        proof_batches: Maximum number of batches for it; more than two are read only where mappings are close rivals.
        proof_seconds: Maximum number of seconds for it; on a busy machine up to three times as many.
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
        shape_tolerance: float = 0.0,
        adapt: Sequence[str] = (),
        assume_layouts: bool = False,
        only: Sequence[str] = (),
        skip: Sequence[str] = (),
        source_prefix: str | None = None,
        checkpoint_weights: Literal["auto", "model", "ema"] = "auto",
        resume: Resume = "weights",
        optimizer_settings: Wins = "checkpoint",
        schedule: Wins = "checkpoint",
        parameter_names: Sequence[Sequence[str]] | None = None,
        on_lost: OnLost = "refuse",
        drop: Sequence[str] = (),
        again: bool = False,
        proof: Literal["auto", "off"] | bool = "auto",
        proof_batches: int = 8,
        proof_seconds: float = 60.0,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(proof, bool):  # YAML reads a bare off as false
            proof = "auto" if proof else "off"
        self.options = MatchingOptions.of(locals())
        for option, value, allowed in (
            ("resume", resume, get_args(Resume)),
            ("checkpoint_weights", checkpoint_weights, ("auto", "model", "ema")),
            ("optimizer_settings", optimizer_settings, get_args(Wins)),
            ("schedule", schedule, get_args(Wins)),
            ("on_lost", on_lost, get_args(OnLost)),
            ("proof", proof, ("auto", "off")),
        ):
            one_of(option, value, allowed)
        numbers = isinstance(proof_batches, int | float) and isinstance(proof_seconds, int | float)
        if not numbers or proof_batches < 1 or not proof_seconds >= 0:
            raise MappingError(
                "proof_batches must be at least 1 and proof_seconds at least 0; "
                f"got {proof_batches!r} and {proof_seconds!r}."
            )
        if not isinstance(checkpoint, Mapping | nn.Module):
            require_path(checkpoint, "checkpoint")  # told now, not when the data is ready
        if isinstance(plan, str):
            require_path(plan, "plan")
        if source_module is not None:
            require_module(source_module, "source_module", OLD_MODEL)
        self.checkpoint = checkpoint
        self.proof = proof
        self.proof_batches = proof_batches
        self.proof_seconds = proof_seconds
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
        self.again = again
        self._filled: weakref.ref[nn.Module] | None = None  # what the report is about
        self._recorded: Recorded | None = None  # the score of the old run
        self._take_back: Callable[[], None] | None = None
        self._before: Held = {}  # the model's parameters before its own hooks
        self._passed_on: list[dict[str, Any]] = []  # what a resumed checkpoint tells of transfers
        self._wins = ""  # what this run restores
        self._fresh = False  # transferred in this very run
        self._foreseen = True  # whether setup could tell what this run restores

    # -- hooks of Lightning ----------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Transfer now if the model is built, else as soon as it is."""
        self._forget_request()
        self._before, self._wins, self._fresh = glance(pl_module), "", False
        self._foreseen, resumed = resumed_path(trainer)
        if resumed is not None:
            self._wins = shown(resumed)
            self._yield_to(pl_module, f"this run restores {self._wins}, which takes precedence")
            write_report(trainer, self.report)
        elif has_trained_elsewhere(trainer):
            self._yield_to(pl_module, "an earlier fit of this trainer, in processes of its own, has trained")
        elif is_whole(pl_module):
            self._serve(trainer, pl_module, stage)
        else:
            self._take_back = when_whole(
                trainer.strategy,
                lambda: self._serve(trainer, pl_module, stage, late=True),
                lambda: needs_memory(pl_module) or has_sharded_tensors(pl_module),
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so where a checkpoint was restored over the transfer, which :meth:`setup` could not foresee."""
        unforeseen = self._fresh and not self._foreseen and trainer.ckpt_path
        if unforeseen and self.report is not None and self.report.applied:
            self._wins = shown(trainer.ckpt_path)
            note = f"the checkpoint restored from {self._wins} takes precedence over the transferred weights"
            self.report = replace(self.report, applied=False).with_remarks(notes=(note,))
            rank_zero_info(f"Weight transfer: {note}.")
        self._fresh = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the model remember what it was given in this run, now that everything is restored."""
        if self._wins:
            remember(pl_module, self._wins, self._wins)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same for runs that train nothing."""
        self.on_fit_start(trainer, pl_module)
        self.on_train_start(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a checkpoint tell what its weights once started from; a run resumed without this callback needs nothing.

        An entry of ``callbacks`` would be asked for when the run is resumed, so it is one of its own.
        """
        note_trained(pl_module)
        told = checkpoint.setdefault(CHECKPOINT_KEY, [])
        own = [self._told()] if self.report is not None and self.report.applied else []
        told.extend(entry for entry in (*self._passed_on, *own) if entry not in told)
        if not told:
            del checkpoint[CHECKPOINT_KEY]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Pass on what a resumed checkpoint tells."""
        self._passed_on = list(checkpoint.get(CHECKPOINT_KEY, ()))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the score that the old run recorded beside the first one that is measured now."""
        score = self._recorded
        if (
            score is None
            or trainer.sanity_checking
            or self.report is None
            or score.monitor not in trainer.callback_metrics
        ):
            return
        self._recorded = None
        now = float(trainer.callback_metrics[score.monitor])
        note = f"{score.monitor} {score.value:.4g} recorded by the old run, {now:.4g} measured now"
        self.report = self.report.with_remarks(notes=(note,))
        rank_zero_info(f"Weight transfer: {note}.")
        write_report(trainer, self.report)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind but the model's memory of what it holds now."""
        self._forget_request()
        if recall(pl_module) is not None:
            remember(pl_module)
            note_trained(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same where a run was broken off; a resume that was not finished leaves neither weights nor a report."""
        if self._resuming is not None:
            self._resuming.give_up(exception)
        self.teardown(trainer, pl_module, "")

    @property
    def state_key(self) -> str:
        """Tells this callback from others of its kind by the checkpoint's name; the same on every machine."""
        return self._generate_state_key(checkpoint=shown(self.checkpoint))

    def __getstate__(self) -> dict[str, Any]:
        """Weak references and requests stay in their process."""
        return {**self.__dict__, "_filled": None, "_take_back": None, "_before": {}, "_resuming": None}

    # -- the transfer ------------------------------------------------------------------------------------------------

    def _told(self) -> dict[str, Any]:
        """What a checkpoint tells of the transfer: primitives only."""
        assert self.report is not None
        coverage = self.report.coverage
        return {
            "checkpoint": shown(self.checkpoint),
            "target_coverage": float(coverage.target.share),
            "source_coverage": float(coverage.source.share),
            "tensors": len(self.report.loaded),
        }

    def _forget_request(self) -> None:
        if self._take_back is not None:
            self._take_back()
            self._take_back = None
        if self._resuming is not None:
            self._resuming.abandon()
            self._resuming = None

    @property
    def _key(self) -> str:
        return transfer_key(self.checkpoint, self.options.to_dict(), self.plan, self.checkpoint_weights)

    def _serve(self, trainer: pl.Trainer, model: pl.LightningModule, stage: str, *, late: bool = False) -> None:
        """Fill what was never filled, and nothing that was trained: the model remembers which is which."""
        self._take_back = None
        ranks = Ranks.of_run() if trainer.world_size > 1 else ALONE  # trainers of one device each share nothing
        evaluates = trainer.state.fn != "fit" and not self.again
        look_at_values(model)
        memory = recall(model, self._before, given=evaluates)
        if any(ranks.gather(evaluates and memory is None and was_trained_here(model))):
            why = f"{type(model).__name__} was trained before in this process, and this run only evaluates it"
            self._yield_to(model, f"{why}; {ON_PURPOSE}")
            return
        only = self._to_fill(trainer, model, memory)
        if any(told != only for told in ranks.gather(only)):
            raise TransferError(
                "the processes of this run do not hold the same model: parts of it were filled, or built anew, on some "
                "of them only. Make the model in the same way on all. Nothing was changed."
            )
        if memory is not None and memory.replaced and only is not None:
            names = listed(memory.replaced, 5)
            rank_zero_info(f"Weight transfer: {names} were exchanged since the transfer and are left as they are.")
        resumes = self._resume_options is not None and trainer.state.fn == "fit"
        if only is None or only or resumes:
            ranks.together(lambda: refuse_wrapped(model, trainer.strategy))
            with only_filler(model):
                made = self._prepare(trainer, model, stage, ranks)
                new = only or frozenset()
                if only is not None and resumes and ranks.together(lambda: made.holds(new)):
                    only = None  # nothing was trained yet: to resume from there is to fill all of it
                if only is None or only:
                    self._transfer(trainer, made, only, late=late)
                    return
        assert memory is not None
        if not memory.transfers:
            why = f"{given(given_by_hand(model), model)}, and this run only evaluates it; {ON_PURPOSE}"
            self._yield_to(model, why, say=rank_zero_warn)
            return
        known = memory.transfers.keys() == {self._key}
        verb, trained = ("was filled from", "before") if known else ("holds weights of", "which may be trained by now")
        why = f"{type(model).__name__} {verb} {memory.words()}{' ' if known else ', '}{trained}"
        self._yield_to(model, f"{why} (again=True fills it once more)")

    def _to_fill(self, trainer: pl.Trainer, model: pl.LightningModule, memory: Memory | None) -> frozenset[str] | None:
        """The names of the tensors to fill; ``None`` for all that the plan fills."""
        if memory is None or (self.again and not self._has_filled(model)):
            return None
        if self._key not in memory.transfers and memory.untouched:
            return None  # another checkpoint, over weights that nothing was done to
        try:
            refuse_wrapped(model, trainer.strategy)
        except TransferError:  # an engine has taken the filled model over
            return frozenset()
        return memory.fresh

    def _has_filled(self, model: nn.Module) -> bool:
        return self._filled is not None and self._filled() is model

    def _prepare(self, trainer: pl.Trainer, model: pl.LightningModule, stage: str, ranks: Ranks) -> _Made:
        source, target, remark = self._sides(trainer, model, stage, ranks)
        data, untested = self._data(trainer, model, stage, source, ranks)
        with quiet(trainer, model):
            prepared = prepare_transfer(
                source, target, self.options, plan=self.plan, min_coverage=self.min_coverage, ranks=ranks, data=data
            )
        return _Made(model, source, target, prepared, remark or untested, ranks)

    def _transfer(self, trainer: pl.Trainer, made: _Made, only: frozenset[str] | None, *, late: bool) -> None:
        """Apply, report, and resume the old training if asked to."""
        model, prepared, file = made.model, made.prepared, shown(self.checkpoint)
        before = Before.look(model, only, again=self.again)
        resuming, undo = None, None
        if self._resume_options is not None and trainer.state.fn == "fit" and only is None:
            tensors: Any = made.source.tensors  # refused by check() if they are those of no file
            sides = Translation(tensors, prepared.plan, model, made.source.file, prepared.target)
            resuming = Resuming(trainer, sides, self._resume_options, made.ranks)
            resuming.check()
            undo = UndoLog(spill=True)
            undo.later("the report", partial(setattr, self, "report", self.report))
            undo.later("what the model remembers", partial(put_marks, model, marks_of(model)))
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not nn.parameter.is_lazy(t))
        report = None
        try:
            with transfer_progress(size, enabled=self.verbose and trainer.is_global_zero) as progress:
                report = finish_transfer(
                    prepared,
                    made.source.tensors,
                    made.target,
                    progress=progress,
                    ranks=made.ranks,
                    only=only,
                    undo=undo,
                )
            remember(model, self._key, file, filled=only is None, only=only)
            if made.remark:
                report = report.with_remarks(notes=(made.remark,))
            told = partial(remarked, report, trainer, self, model, before, late=late, resuming=resuming)
            self.report = made.ranks.together(told)
            self._filled, self._fresh = weakref.ref(model), True
            if resuming is not None and undo is not None:
                self._resuming = resuming
                ends = partial(self._resumed, trainer, undo), partial(self._failed, trainer, undo)
                resuming.begin(undo, *ends, late=late)
        except BaseException as error:
            if resuming is not None and undo is not None:
                resuming.abandon()
                raise (
                    error if getattr(error, "not_restored", ()) else self._failed(trainer, undo, error)
                ) from error.__cause__
            raise (error if report is None else admit_loss(error, report.loaded, whole=True)) from error.__cause__
        if resuming is None:
            announce(trainer, self.report, verbose=self.verbose)

    def _resumed(self, trainer: pl.Trainer, undo: UndoLog, remarks: tuple[str, ...]) -> None:
        """Report what was restored."""
        self._resuming = None
        undo.close()
        assert self.report is not None
        self.report = self.report.with_remarks(notes=remarks)
        for remark in remarks:
            if "the checkpoint's counts" in remark:  # and not what this run asks for
                rank_zero_warn(f"Weight transfer: {remark}.")
        rank_zero_info(f"Weight transfer: {remarks[-1]}.")
        announce(trainer, self.report, verbose=self.verbose)

    def _failed(self, trainer: pl.Trainer, undo: UndoLog, error: BaseException) -> BaseException:
        """Put back what was there before a resume that cannot be; what was flattened since may be out of reach."""
        flattened = self.report.loaded if self.report is not None and is_flattened(trainer.strategy.model) else ()
        self._resuming, self._filled, self._fresh = None, None, False
        told = undo.take_back(error, flattened)
        undo.close()
        return told

    def _data(
        self, trainer: pl.Trainer, model: pl.LightningModule, stage: str, source: Source, ranks: Ranks
    ) -> tuple[list[OnData], str]:
        """Ways to prove the mapping on the run's own data, or a remark why there are none."""
        self._recorded = recorded_score(source.tensors)
        if self.proof == "off" or self.plan is not None:
            return [], ""
        if has_sharded_tensors(model):
            return [], "not tested on data: a model spread over several processes is not run by one of them"
        if not ranks.is_zero:
            return [], ""
        return ways_to_prove(
            trainer,
            model,
            stage,
            self._recorded,
            count=self.proof_batches,
            seconds=self.proof_seconds,
            verbose=self.verbose,
        )

    def _sides(
        self, trainer: pl.Trainer, model: pl.LightningModule, stage: str, ranks: Ranks
    ) -> tuple[Source, Target, str]:
        """Open the checkpoint and describe the model, with a sample where there is one, or a remark why not."""
        opened = ranks.together(lambda: Source.open(self.checkpoint, self.checkpoint_weights, old=self.source_module))
        if self.plan is not None and not is_lazy(model):
            samples: list[Call] = []  # a plan is replayed as it is: no need to run anything
            remark = ""
        else:
            samples, remark = find_samples(trainer, model, stage)
        with quiet(trainer, model):
            return replace(opened, samples=samples), Target.of(model, samples), remark

    def _yield_to(self, model: pl.LightningModule, why: str, say: Callable[[str], Any] = rank_zero_info) -> None:
        """Report that other weights win, such as those of a resumed checkpoint, or those that training made."""
        file = shown(self.checkpoint)
        note = f"{why}; nothing was transferred" + (f" from {file}" if file not in why else "")
        if not self._has_filled(model) or self._wins:
            self.report = report_nothing(model, shown(self.checkpoint), self.options, note)
        say(f"Weight transfer: {note}.")


class _Made(NamedTuple):
    """A transfer that is planned and checked."""

    model: pl.LightningModule
    source: Source
    target: Target
    prepared: Prepared
    remark: str
    ranks: Ranks

    def holds(self, apart_from: frozenset[str]) -> bool:
        """Whether the model has all the checkpoint's values already, but for some tensors."""
        return holds(self.prepared.plan, self.source.tensors, self.model, apart_from)
