"""Going on with the training of an old checkpoint inside a run: optimizers, schedulers, and all the rest.

``"optimizer"`` carries what decides the next step: the states of the optimizers, of their schedulers, and of the
precision plugin (the gradient scaler). Epochs and steps count from zero, callbacks and data start fresh.

``"all"`` carries everything, as if the old checkpoint had been converted and given to ``trainer.fit(ckpt_path=...)``:
also epoch and step, loops, callbacks and the datamodule.

Where each process holds the whole model, the checkpoint is converted as a whole. Where the model is sharded
(:mod:`lit_wsl.callbacks.resume_sharded`), a rank goes through the states one by one and keeps its part of each. Where
it is flattened (:mod:`lit_wsl.callbacks.resume_flattened`), torch's own engine cuts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_wsl.callbacks.resume_flattened import (
    Layout,
    groups_of_flattened,
    is_flattened,
    load_into_flattened,
    order_in_flattened,
)
from lit_wsl.callbacks.resume_sharded import convert_for_shards, convert_without_weights, load_into_optimizers
from lit_wsl.checkpoint.convert import convert_document, lightning_optimizers
from lit_wsl.checkpoint.edit import with_entries
from lit_wsl.checkpoint.inert import as_mapping, contains_foreign
from lit_wsl.checkpoint.reader import Checkpoint
from lit_wsl.errors import CheckpointError
from lit_wsl.structure import ModelDescription
from lit_wsl.transfer.distributed import Ranks, has_sharded_tensors
from lit_wsl.transfer.plan import TransferPlan

if TYPE_CHECKING:
    import lightning.pytorch as pl


def resume_training(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    checkpoint: object,
    plan: TransferPlan,
    target: ModelDescription,
    mode: str,
    ranks: Ranks,
) -> tuple[str, ...]:
    """Carry the training state of a checkpoint into a run whose optimizers exist, at ``on_fit_start``.

    Args:
        trainer: The run.
        model: The model, filled by the plan.
        checkpoint: The opened checkpoint.
        plan: What filled the model.
        target: The model as it was then: an engine may have flattened it since.
        mode: ``"optimizer"`` or ``"all"``.
        ranks: The processes of the run, all of which make this call.

    Returns:
        Remarks for the report.

    Raises:
        CheckpointError: If the checkpoint has no training state, or it cannot be carried; the message says why.
    """
    engine = trainer.strategy.model
    layout = groups_of_flattened(engine, trainer.optimizers) if is_flattened(engine) else None  # a collective call
    content, container, notes = ranks.together(lambda: _convert(trainer, model, checkpoint, plan, target, mode, layout))
    assert isinstance(checkpoint, Checkpoint)
    states = sum(len(state["state"]) for state in content["optimizer_states"])
    if layout is not None and engine is not None:
        load_into_flattened(engine, trainer.optimizers, content.pop("optimizer_states"), layout)
    elif container is None:
        ranks.together(lambda: load_into_optimizers(trainer.optimizers, content.pop("optimizer_states")))
    if mode == "all":
        _restore_all(trainer, model, checkpoint, with_entries(container, content) if container is not None else content)
    else:
        _restore_optimizers(trainer, content)
    what = "optimizers and schedulers" if mode == "optimizer" else "optimizers, schedulers, loops, callbacks and data"
    return (*notes, f"training goes on: {what} were restored ({states} parameters have an optimizer state)")


def _convert(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    checkpoint: object,
    plan: TransferPlan,
    target: ModelDescription,
    mode: str,
    layout: Layout | None,
) -> tuple[dict[str, Any], Any, tuple[str, ...]]:
    """The checkpoint's content for this run, remarks, and what contained it where nothing has been taken out.

    Changes nothing and communicates nothing.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise CheckpointError(f"resume={mode!r} needs the file of a checkpoint, since only it has optimizer states.")
    sharded = has_sharded_tensors(model)
    if not sharded and layout is None and not trainer.strategy.lightning_restore_optimizer:
        raise CheckpointError(
            f"resume={mode!r} cannot carry optimizer states into a model that {type(trainer.strategy).__name__} "
            "has partitioned. Convert the file first (plan.convert_checkpoint, or the convert command), and resume "
            "from that."
        )
    lacking = "lr_schedulers" if "lr_schedulers" not in checkpoint.unread else ""
    lacking = "optimizer_states" if lightning_optimizers(checkpoint.unread) is None else lacking
    if lacking:
        raise CheckpointError(
            f"{checkpoint.path} has no {lacking!r}, so resume={mode!r} finds nothing to go on with (was it saved "
            "with save_weights_only=True?). Use resume='weights'."
        )
    container: Any = None
    if layout is not None:
        order = order_in_flattened(trainer.optimizers, layout, target)
        content, notes = convert_without_weights(checkpoint, plan, mode, layout, order)
    elif sharded:
        content, notes = convert_for_shards(trainer, model, checkpoint, plan, mode)
    else:
        container, done = convert_document(checkpoint, plan, target=model, optimizers=trainer.optimizers)
        content, notes = dict(as_mapping(container) or {}), done.notes
        for key in ("state_dict", checkpoint.prefix[0]):  # what has no source stays as it is
            content[key] = {**model.state_dict(), **(as_mapping(content.get(key)) or {})}
    _check(trainer, checkpoint, content, mode)
    return content, container, notes


def _check(trainer: pl.Trainer, checkpoint: Checkpoint, content: Mapping[str, Any], mode: str) -> None:
    """Refuse what cannot be restored, before anything is."""
    theirs, ours = len(content["lr_schedulers"]), len(trainer.lr_scheduler_configs)
    if theirs != ours:
        raise CheckpointError(
            f"{checkpoint.path} has {theirs} learning rate schedulers, the run {ours}; configure as many, or use "
            "resume='weights'."
        )
    if mode != "all":
        return
    foreign = [str(key) for key, value in content.items() if key != "hyper_parameters" and contains_foreign(value)]
    if foreign:
        raise CheckpointError(
            f"{checkpoint.path}: {', '.join(foreign)} hold objects of foreign classes "
            f"({', '.join(checkpoint.stubbed[:3])}), which are never built here. Convert the file "
            "(plan.convert_checkpoint) and resume from the converted one with trainer.fit(..., ckpt_path=..., "
            "weights_only=False) if you trust it."
        )
    connector = getattr(trainer, "_checkpoint_connector", None)
    if connector is None or not hasattr(connector, "_loaded_checkpoint"):
        raise CheckpointError(
            "this version of Lightning restores checkpoints in another way than resume='all' knows. Convert the file "
            "(plan.convert_checkpoint) and resume from it with trainer.fit(..., ckpt_path=...)."
        )


def _restore_optimizers(trainer: pl.Trainer, content: dict[str, Any]) -> None:
    if trainer.strategy.lightning_restore_optimizer:
        trainer.strategy.load_optimizer_state_dict(content)
    for config, state in zip(trainer.lr_scheduler_configs, content["lr_schedulers"]):
        config.scheduler.load_state_dict(state)
    plugin = trainer.precision_plugin
    plugin_state = content.get(type(plugin).__qualname__)
    if plugin_state is not None:
        plugin.load_state_dict(plugin_state)


def _restore_all(trainer: pl.Trainer, model: pl.LightningModule, checkpoint: Checkpoint, loaded: Any) -> None:
    """Give Lightning the converted checkpoint as if it had read it from ``ckpt_path``.

    The hook ``on_fit_start`` is followed by Lightning's own restoring of precision, loops, optimizers and schedulers,
    which does nothing unless a checkpoint is loaded; what comes before in ``Trainer._run`` is done here.
    """
    try:
        from lightning.pytorch.utilities.migration.utils import _pl_migrate_checkpoint

        loaded = _pl_migrate_checkpoint(loaded, str(checkpoint.path))
    except ImportError:  # checkpoints of this very version need no migration
        pass
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = loaded
    connector.restore_model()
    connector.restore_datamodule()
    connector.restore_callbacks()


__all__ = ["resume_training"]
