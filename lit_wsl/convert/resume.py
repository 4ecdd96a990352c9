"""Resuming the training of an old checkpoint inside a run: optimizers, schedulers, and all the rest.

``"optimizer"`` carries what decides the next step: the states of the optimizers, of their schedulers, and of the
precision plugin (the gradient scaler). Epochs and steps count from zero, callbacks and data start fresh.

``"all"`` carries everything, as if the old checkpoint had been converted and given to ``trainer.fit(ckpt_path=...)``:
also epoch and step, loops, callbacks and the datamodule.

:class:`Resume` checks what the file alone tells before a weight moves, and then works at the places where Lightning
restores a checkpoint: module, datamodule and callbacks once the model is built; loops, optimizers and schedulers after
every ``on_fit_start``, since callbacks regroup parameters there. What of it depends on where the parameters lie is in
the engines of ``engines.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_wsl.checkpoint.document import build_plain
from lit_wsl.checkpoint.reader import Checkpoint
from lit_wsl.checkpoint.records import ForeignName, as_mapping, first_foreign
from lit_wsl.convert.checkpoint import (
    ARGUMENTS,
    lightning_optimizers,
    recorded_names,
    remembered_files,
    without_dropped,
)
from lit_wsl.convert.copies import CopyConverter, spell
from lit_wsl.convert.engines import (
    Engine,
    Flattened,
    Sharded,
    Whole,
    is_flattened,
    name_before_wrapping,
    whole_tensors,
)
from lit_wsl.convert.optimizers import Carried, CarryOptions, convert_optimizers
from lit_wsl.convert.saved_optimizer import SavedOptimizer, assign_names
from lit_wsl.convert.schedulers import carry_schedulers
from lit_wsl.convert.weights import Translation
from lit_wsl.errors import CheckpointError
from lit_wsl.structure.running import exchanged, has_sharded_tensors
from lit_wsl.transfer.apply import copy_into
from lit_wsl.transfer.ranks import Ranks
from lit_wsl.transfer.undo import UndoLog

if TYPE_CHECKING:
    import lightning.pytorch as pl


_OLDEST = "0.9.0"  # a version of Lightning before all its migrations


@dataclass(frozen=True)
class ResumeOptions:
    """What of a checkpoint a run resumes."""

    mode: Literal["optimizer", "all"]  # ``"optimizer"`` or ``"all"``
    carry: CarryOptions = field(default_factory=CarryOptions)  # what the user decides about optimizers
    drop: tuple[str, ...] = ()  # entries of the checkpoint that are left out


class Resume:
    """One run that resumes the training of an old checkpoint; all of its processes make every call."""

    def __init__(self, trainer: pl.Trainer, sides: Translation, options: ResumeOptions, ranks: Ranks) -> None:
        assert sides.target is not None
        self.trainer, self.sides, self.options, self.ranks = trainer, sides, options, ranks
        self.model, self.checkpoint = sides.target, sides.checkpoint
        self.notes: list[str] = []
        self._content: dict[Any, Any] = {}
        self._ours: dict[str, Any] = {}  # what Lightning restores from
        self._buffers: dict[str, Tensor] = {}
        self._recorded: list[list[str] | None] = []
        self._configured: int | None = None  # schedulers that configure_optimizers gave
        self._uninstall: Callable[[], None] | None = None
        self._failed: Callable[[BaseException], BaseException] | None = None

    # -- before a weight moves -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what the file alone tells to be impossible. Changes nothing."""
        self.ranks.together(self._check)
        # moving a model to a device makes new buffers, so the way back of these is by name
        self._buffers = {n: b.detach().clone() for n, b in self.model.named_buffers() if not nn.parameter.is_lazy(b)}

    def _check(self) -> None:
        checkpoint, mode = self.checkpoint, self.options.mode
        if not isinstance(checkpoint, Checkpoint):
            raise CheckpointError(
                f"resume={mode!r} needs the file of a checkpoint, since only it has optimizer states."
            )
        connector = getattr(self.trainer, "_checkpoint_connector", None)
        if not hasattr(connector, "_loaded_checkpoint") or not hasattr(connector, "restore_training_state"):
            raise CheckpointError(
                f"this version of Lightning restores checkpoints in another way than resume={mode!r} knows. Convert "
                "the file (plan.convert_checkpoint) and resume from it with trainer.fit(..., ckpt_path=...)."
            )
        if "restore_training_state" in vars(connector):
            raise CheckpointError("one run can resume one training only: give all transfers but one resume='weights'.")
        content = dict(
            as_mapping(without_dropped(dict(checkpoint.unread), self.options.drop, str(checkpoint.path))) or {}
        )
        found = lightning_optimizers(content)
        schedulers_needed = self.options.carry.schedule == "checkpoint"
        lacking = "lr_schedulers" if schedulers_needed and "lr_schedulers" not in content else ""
        lacking = "optimizer_states" if found is None else lacking
        if lacking == "lr_schedulers" and lacking in checkpoint.unread:
            raise CheckpointError(
                "a resume without the schedulers of the checkpoint is schedule='run', not drop=[...]."
            )
        if lacking or found is None:
            raise CheckpointError(
                f"{checkpoint.path} has no {lacking!r}, so resume={mode!r} finds nothing to resume (was it saved "
                "with save_weights_only=True?). Use resume='weights'."
            )
        keys, states = found
        content = {key: value for key, value in content.items() if key not in keys}
        content["optimizer_states"] = states
        self._content = self._needed(checkpoint, content)
        copies = self._convert_copies(checkpoint)
        saved = self._content["optimizer_states"]
        self._recorded = recorded_names(saved, copies)[0]
        assign_names(
            [SavedOptimizer.read(data, f"optimizer {number}") for number, data in enumerate(saved)],
            self.sides.old_parameters,
            self._carry_options.parameter_names,
            self.sides.doubtful,
        )
        if mode == "all":
            self.notes += remembered_files(self._content.get("callbacks"))

    @property
    def _carry_options(self) -> CarryOptions:
        own = self.options.carry
        told = own.parameter_names is not None or not any(self._recorded)
        return own if told else replace(own, parameter_names=self._recorded)

    def _needed(self, checkpoint: Checkpoint, content: dict[Any, Any]) -> dict[Any, Any]:
        """Build what Lightning restores; objects of foreign classes elsewhere are in no one's way."""
        trainer = self.trainer
        plugin = type(trainer.precision_plugin).__qualname__
        needed: set[Any] = {"optimizer_states", "lr_schedulers", plugin}
        if self.options.mode == "all":
            needed |= {"loops", "native_amp_scaling_state", "epoch", "global_step"}
            data = trainer.datamodule  # type: ignore[attr-defined]
            if data is not None:
                needed.add(type(data).__qualname__)
        made = {key: build_plain(value) for key, value in content.items()}
        for key in sorted(needed & set(made), key=str):
            self._refuse_foreign(checkpoint, (key,), made[key])
        callbacks = made.get("callbacks")
        if self.options.mode == "all" and isinstance(callbacks, Mapping):
            made["callbacks"] = self._callbacks(checkpoint, callbacks)
        return made

    def _callbacks(self, checkpoint: Checkpoint, callbacks: Mapping[Any, Any]) -> dict[Any, Any]:
        """The states of callbacks; those of this run have to be whole. Very old files name their classes."""
        made: dict[Any, Any] = {}
        for key, state in callbacks.items():
            mine = [c for c in self.trainer.callbacks if _is_state_of(c, key)]  # type: ignore[attr-defined]
            known = mine[0].state_key if mine and isinstance(key, ForeignName) else key
            made[str(known) if isinstance(known, ForeignName) else known] = state
            if mine:
                self._refuse_foreign(checkpoint, ("callbacks", key), state)
        return made

    def _refuse_foreign(self, checkpoint: Checkpoint, path: tuple[Any, ...], value: Any) -> None:
        found = first_foreign(value)
        if found is not None:
            inside, name = found
            raise CheckpointError(
                f"{checkpoint.path}: {spell((*path, *inside))!r} holds an object of the foreign class {name}, which is "
                f"never built here, and resume={self.options.mode!r} needs the entry. Leave it out with "
                f"drop=[{spell(path)!r}]; or, if you trust the file, convert it (plan.convert_checkpoint) and resume "
                "with trainer.fit(..., ckpt_path=..., weights_only=False)."
            )

    def _convert_copies(self, checkpoint: Checkpoint) -> CopyConverter:
        """Give what speaks of the old model's tensors the new names, in entries that this run restores."""
        sharded = has_sharded_tensors(self.model) or not self.trainer.strategy.lightning_restore_optimizer
        sharded = sharded or self.options.mode != "all"  # then only the names count
        copies = CopyConverter(self.sides, sharded=sharded)
        for key in self._content:
            if key in ("optimizer_states", "lr_schedulers", "loops"):
                continue
            self._content[key] = copies.convert((key,), self._content[key])
        if self.options.mode != "all":
            return copies
        problem = next((p for p in copies.problems if p.grave and self._is_restored(p.path)), None)
        if problem is not None:
            raise CheckpointError(f"{checkpoint.path}: {problem} {problem.remedy}")
        self.notes += copies.notes
        self.notes += [f"{p} It was left as it is." for p in copies.problems]
        return copies

    def _is_restored(self, path: tuple[Any, ...]) -> bool:
        if path[0] == "callbacks" and len(path) > 1:
            return any(_is_state_of(c, path[1]) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        return path[0] not in ARGUMENTS

    def restores(self, callback: Any) -> bool:
        """Whether a callback of the run gets its state of the checkpoint back."""
        return self.options.mode == "all" and any(_is_state_of(callback, k) for k in self._content.get("callbacks", ()))

    # -- at Lightning's own places -------------------------------------------------------------------------------------

    def begin(
        self,
        undo: UndoLog,
        done: Callable[[tuple[str, ...]], None],
        failed: Callable[[BaseException], BaseException],
        *,
        late: bool,
    ) -> None:
        """Let Lightning restore the rest, now that the model is filled."""
        undo.later("buffers", self._put_buffers_back)
        connector = self.trainer._checkpoint_connector
        restore = connector.restore_training_state

        def restore_training_state() -> None:
            if connector._loaded_checkpoint and connector._loaded_checkpoint is not self._ours:
                restore()  # a finder of learning rates or batch sizes puts back what it saved when the fit began
                return
            self.abandon(keep_content=True)
            connector._loaded_checkpoint = self._ours
            try:
                remarks = self.ranks.together(lambda: self._restore_training(undo, restore))
            except BaseException as error:
                connector._loaded_checkpoint = {}
                raise self._undone(error, undo, failed) from error.__cause__
            done(remarks)

        ways_back = ExitStack()
        self._uninstall, self._failed = ways_back.close, failed
        ways_back.callback(exchanged(connector, "restore_training_state", restore_training_state))
        ways_back.callback(self._count_schedulers())
        if self.options.mode == "all":
            try:
                self._ours = connector._loaded_checkpoint = self._for_lightning()
                if late and not self.trainer.strategy.restore_checkpoint_after_setup:
                    connector.restore_model()
                    connector.restore_datamodule()
                    connector.restore_callbacks()
            except BaseException as error:
                self.abandon()
                raise failed(error) from error.__cause__

    def _undone(
        self, error: BaseException, undo: UndoLog, failed: Callable[[BaseException], BaseException]
    ) -> BaseException:
        """Take everything back, on all processes at once; a model that was flattened since is made whole for it."""
        engine = self.trainer.strategy.model
        if not is_flattened(engine):
            return failed(error)
        with whole_tensors(engine) as whole:
            undo.moved(whole)
            return failed(error)

    def _put_buffers_back(self) -> None:
        for name, buffer in self.model.named_buffers():
            name = name_before_wrapping(name)
            if name in self._buffers:
                copy_into(buffer, self._buffers[name])

    def give_up(self, error: BaseException) -> None:
        """Something else failed before training state was restored: everything is as it was before the transfer."""
        if self._uninstall is not None and self._failed is not None:
            self.abandon()
            told = self._failed(error)
            if told is not error:  # the error of another is not ours to replace
                warnings.warn(f"Weight transfer: {told}", stacklevel=2)

    def abandon(self, *, keep_content: bool = False) -> None:
        """Leave nothing behind in the trainer."""
        if self._uninstall is None:
            return
        self._uninstall()
        self._uninstall = None
        if not keep_content:
            self.trainer._checkpoint_connector._loaded_checkpoint = {}

    def _count_schedulers(self) -> Callable[[], None]:
        """Note how many schedulers were configured: SWA takes them out of a resumed run before they are restored."""
        strategy = self.trainer.strategy
        setup_optimizers = strategy.setup_optimizers
        if self.trainer.lr_scheduler_configs or self.trainer.optimizers:  # made already
            self._configured = len(self.trainer.lr_scheduler_configs)
            return lambda: None

        def counted(trainer: pl.Trainer) -> None:
            take_back()
            setup_optimizers(trainer)
            self._configured = len(trainer.lr_scheduler_configs)

        take_back = exchanged(strategy, "setup_optimizers", counted)
        return take_back

    def _for_lightning(self) -> dict[str, Any]:
        """The checkpoint as Lightning would have read it from ``ckpt_path``, with the new model's weights."""
        from lightning.pytorch import __version__

        content = dict(self._content)
        # a file without a version is brought up to date, unless it has loops or nothing to make them from
        old = "loops" not in content and {"epoch", "global_step"} <= set(content)
        content.setdefault("pytorch-lightning_version", _OLDEST if old else __version__)
        if not has_sharded_tensors(self.model) and self.trainer.strategy.lightning_restore_optimizer:
            weights = {
                name: value.detach().clone() if isinstance(value, Tensor) else value
                for name, value in self.model.state_dict().items()
            }
            content["state_dict"] = weights
        content.setdefault("lr_schedulers", [])
        if self.options.carry.schedule == "run":
            content["lr_schedulers"] = []
        try:
            from lightning.pytorch.utilities.migration.utils import _pl_migrate_checkpoint
        except ImportError:  # checkpoints of this very version need no migration
            pass
        else:
            content = _pl_migrate_checkpoint(content, str(self.checkpoint.path))
        if "loops" not in content:
            self.notes.append("the checkpoint does not tell how far its loops were: epochs and steps count from zero")
        return content

    def _restore_training(self, undo: UndoLog, restore: Callable[[], None]) -> tuple[str, ...]:
        """Optimizers, schedulers and what comes with them, after every callback's ``on_fit_start``."""
        trainer, mode = self.trainer, self.options.mode
        engine = self._engine()
        content = trainer._checkpoint_connector._loaded_checkpoint if mode == "all" else self._content
        if not content.get("optimizer_states"):
            restore()
            return (*self.notes, "a hook took the optimizers' states out of the checkpoint; none were restored")
        carried, schedulers = self.ranks.together(lambda: self._carry(engine, content))
        _remember(trainer, undo)
        states = sum(len(state["state"]) for state in carried.states)
        self.ranks.together(lambda: engine.load(carried.states))
        content["lr_schedulers"] = schedulers
        if mode == "all":
            # they are in the optimizers already; Lightning would load those of other engines from the file itself
            content["optimizer_states"] = []
            restore()
        else:
            for config, state in zip(trainer.lr_scheduler_configs, schedulers):
                config.scheduler.load_state_dict(state)
            plugin = trainer.precision_plugin
            plugin_state = content.get(type(plugin).__qualname__)
            if plugin_state is not None:
                plugin.load_state_dict(plugin_state)
            restore()
        what = ["optimizers", *(["schedulers"] if self.options.carry.schedule == "checkpoint" else [])]
        what += ["loops"] if mode == "all" and "loops" in content else []
        what += ["callbacks", "data"] if mode == "all" else []
        return (
            *self.notes,
            *carried.notes,
            f"training continues: {', '.join(what)} were restored ({states} parameters have an optimizer state)",
        )

    def _carry(self, engine: Engine, content: Mapping[str, Any]) -> tuple[Carried, list[Any]]:
        """States for the run's optimizers and schedulers. Changes nothing and communicates nothing."""
        carried = convert_optimizers(
            content["optimizer_states"],
            self.sides.plan,
            self.sides.old_parameters,
            replace(engine.order, groups=engine.groups),
            options=self._carry_options,
            doubtful=self.sides.doubtful,
            keep=engine.keep,
        )
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if self.options.carry.schedule == "run":
            return carried, []
        saved = content.get("lr_schedulers") or []
        if self._configured and not schedulers:
            self.notes.append("a callback took the schedulers out, and restores its own")
            return carried, saved
        states, remarks = carry_schedulers(
            saved,
            schedulers,
            self.trainer.optimizers,
            carried,
            self.options.carry.settings,
            str(self.checkpoint.path),
        )
        self.notes += remarks
        return carried, states

    def _engine(self) -> Engine:
        model, trainer = self.trainer.strategy.model, self.trainer
        if model is not None and is_flattened(model):
            assert self.sides.new is not None
            return Flattened(model, trainer.optimizers, self.sides.new)
        if has_sharded_tensors(self.model):
            return Sharded(trainer, self.model, self.sides.order)
        if not trainer.strategy.lightning_restore_optimizer:
            raise CheckpointError(
                f"resume={self.options.mode!r} cannot carry optimizer states into a model that "
                f"{type(trainer.strategy).__name__} has partitioned. Convert the file first (plan.convert_checkpoint, "
                "or the convert command), and resume from that."
            )
        return Whole(trainer, self.model, self.sides.order)


def _is_state_of(callback: Any, key: Any) -> bool:
    """Whether a callback's state is under a key: its own, or in very old files the class itself."""
    if isinstance(key, ForeignName):
        cls = type(callback)
        return key.name == cls.__qualname__ and key.module.split(".")[-1] == cls.__module__.split(".")[-1]
    return key in (callback.state_key, callback._legacy_state_key)


def _remember(trainer: pl.Trainer, undo: UndoLog) -> None:
    """Register the ways back of what is restored now."""

    def back(thing: Any) -> Callable[[], None]:
        before = dict(vars(thing))

        def put_back() -> None:
            vars(thing).clear()
            vars(thing).update(before)

        return put_back

    for number, optimizer in enumerate(trainer.optimizers):
        before = optimizer.state, optimizer.param_groups

        def put_back(optimizer: Optimizer = optimizer, before: tuple[Any, Any] = before) -> None:
            optimizer.state, optimizer.param_groups = before

        undo.later(f"optimizer {number}", put_back)
    for number, config in enumerate(trainer.lr_scheduler_configs):
        for scheduler in (config.scheduler, *(getattr(config.scheduler, "_schedulers", ()) or ())):
            undo.later(f"scheduler {number}", back(scheduler))
    plugin = trainer.precision_plugin
    state = plugin.state_dict()
    if state:
        undo.later("precision plugin", partial(plugin.load_state_dict, state))
