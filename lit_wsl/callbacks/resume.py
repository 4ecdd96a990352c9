"""Going on with the training of an old checkpoint inside a run: optimizers, schedulers, and all the rest.

``"optimizer"`` carries what decides the next step: the states of the optimizers, of their schedulers, and of the
precision plugin (the gradient scaler). Epochs and steps count from zero, callbacks and data start fresh.

``"all"`` carries everything, as if the old checkpoint had been converted and given to ``trainer.fit(ckpt_path=...)``:
also epoch and step, loops, callbacks and the datamodule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_wsl.checkpoint.convert import Conversion, convert_document
from lit_wsl.checkpoint.edit import with_entries
from lit_wsl.checkpoint.inert import as_mapping, contains_foreign
from lit_wsl.checkpoint.reader import Checkpoint
from lit_wsl.errors import CheckpointError
from lit_wsl.transfer.distributed import has_sharded_tensors
from lit_wsl.transfer.plan import TransferPlan

if TYPE_CHECKING:
    import lightning.pytorch as pl

CARRIED = ("optimizer_states", "lr_schedulers")


def resume_training(
    trainer: pl.Trainer, model: pl.LightningModule, checkpoint: object, plan: TransferPlan, mode: str
) -> tuple[str, ...]:
    """Carry the training state of a checkpoint into a run whose optimizers exist, at ``on_fit_start``.

    Args:
        trainer: The run.
        model: The model, filled by the plan.
        checkpoint: The opened checkpoint.
        plan: What filled the model.
        mode: ``"optimizer"`` or ``"all"``.

    Returns:
        Remarks for the report.

    Raises:
        CheckpointError: If the checkpoint has no training state, or it cannot be carried; the message says why.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise CheckpointError(f"resume={mode!r} needs the file of a checkpoint, since only it has optimizer states.")
    if has_sharded_tensors(model) or not trainer.strategy.lightning_restore_optimizer:
        raise CheckpointError(
            f"resume={mode!r} cannot carry optimizer states into a model that {type(trainer.strategy).__name__} "
            "shards. Convert the file first (plan.convert_checkpoint, or the convert command), and resume from that."
        )
    lacking = [key for key in CARRIED if key not in checkpoint.content]
    if lacking:
        raise CheckpointError(
            f"{checkpoint.path} has no {lacking[0]!r}, so resume={mode!r} finds nothing to go on with (was it saved "
            "with save_weights_only=True?). Use resume='weights'."
        )
    document, done = convert_document(checkpoint, plan, target=model, optimizers=trainer.optimizers)
    content = dict(as_mapping(document) or {})
    theirs, ours = len(content["lr_schedulers"]), len(trainer.lr_scheduler_configs)
    if theirs != ours:
        raise CheckpointError(
            f"{checkpoint.path} has {theirs} learning rate schedulers, the run {ours}; configure as many, or use "
            "resume='weights'."
        )
    if mode == "all":
        _restore_all(trainer, model, checkpoint, document, content)
    else:
        _restore_optimizers(trainer, content)
    return (*done.notes, _remark(mode, done))


def _remark(mode: str, done: Conversion) -> str:
    what = "optimizers and schedulers" if mode == "optimizer" else "optimizers, schedulers, loops, callbacks and data"
    return f"training goes on: {what} were restored ({done.states} parameters have an optimizer state)"


def _restore_optimizers(trainer: pl.Trainer, content: dict[str, Any]) -> None:
    trainer.strategy.load_optimizer_state_dict(content)
    for config, state in zip(trainer.lr_scheduler_configs, content["lr_schedulers"]):
        config.scheduler.load_state_dict(state)
    plugin = trainer.precision_plugin
    plugin_state = content.get(type(plugin).__qualname__)
    if plugin_state is not None:
        plugin.load_state_dict(plugin_state)


def _restore_all(
    trainer: pl.Trainer, model: pl.LightningModule, checkpoint: Checkpoint, document: Any, content: dict[str, Any]
) -> None:
    """Give Lightning the converted checkpoint as if it had read it from ``ckpt_path``.

    The hook ``on_fit_start`` is followed by Lightning's own restoring of precision, loops, optimizers and schedulers,
    which does nothing unless a checkpoint is loaded; what comes before in ``Trainer._run`` is done here.
    """
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
    for key in ("state_dict", checkpoint.prefix[0]):  # what has no source stays as it is
        content[key] = {**model.state_dict(), **(as_mapping(content.get(key)) or {})}
    loaded = with_entries(document, content)
    try:
        from lightning.pytorch.utilities.migration.utils import _pl_migrate_checkpoint

        loaded = _pl_migrate_checkpoint(loaded, str(checkpoint.path))
    except ImportError:  # checkpoints of this very version need no migration
        pass
    connector._loaded_checkpoint = loaded
    connector.restore_model()
    connector.restore_datamodule()
    connector.restore_callbacks()


__all__ = ["resume_training"]
