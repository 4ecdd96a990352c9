"""Going on with the training of an old checkpoint inside a run: optimizers, schedulers, and all the rest.

``"optimizer"`` carries what decides the next step: the states of the optimizers, of their schedulers, and of the
precision plugin (the gradient scaler). Epochs and steps count from zero, callbacks and data start fresh.

``"all"`` carries everything, as if the old checkpoint had been converted and given to ``trainer.fit(ckpt_path=...)``:
also epoch and step, loops, callbacks and the datamodule.

Where each process holds the whole model, the checkpoint is converted as a whole. Where the model is sharded
(:mod:`lit_wsl.convert.resume`), a rank goes through the states one by one and keeps its part of each. Where
it is flattened, torch's own engine cuts them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_wsl.checkpoint.edit import with_entries
from lit_wsl.checkpoint.reader import Checkpoint
from lit_wsl.checkpoint.records import as_mapping, contains_foreign
from lit_wsl.convert.checkpoint import convert_document, lightning_optimizers, remembered_files
from lit_wsl.convert.optimizer_state import Keep, NotCarriedError
from lit_wsl.convert.optimizers import convert_optimizers
from lit_wsl.convert.saved_optimizer import NewGroup, NewOrder, groups_of, kind_of
from lit_wsl.convert.weights import find_twin, new_order, old_parameters
from lit_wsl.errors import CheckpointError
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure import ModelDescription
from lit_wsl.transfer.apply import copy_into
from lit_wsl.transfer.ranks import Ranks, has_sharded_tensors, is_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl


Layout = list[list[NewGroup]]


def is_flattened(engine: object) -> TypeGuard[nn.Module]:
    """Whether a strategy's model is a ``FullyShardedDataParallel``."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(engine, FullyShardedDataParallel)


@contextmanager
def _whole_states(engine: Any) -> Iterator[Any]:
    from torch.distributed.fsdp import (
        FullOptimStateDictConfig,
        FullStateDictConfig,
        FullyShardedDataParallel,
        StateDictType,
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would rather have us use FSDP2
        configs = FullStateDictConfig(), FullOptimStateDictConfig(rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(engine, StateDictType.FULL_STATE_DICT, *configs):
            yield FullyShardedDataParallel


def groups_of_flattened(engine: nn.Module, optimizers: Sequence[Optimizer]) -> Layout:
    """The parameter groups of optimizers, by the names that parameters had before flattening; a collective call."""
    with _whole_states(engine) as fsdp:
        told = [fsdp.optim_state_dict(engine, optimizer)["param_groups"] for optimizer in optimizers]
    return [
        [NewGroup(tuple(group["params"]), {k: v for k, v in group.items() if k != "params"}) for group in groups]
        for groups in told
    ]


def order_in_flattened(optimizers: Sequence[Optimizer], layout: Layout, target: ModelDescription) -> NewOrder:
    """The order in which the parameters were registered; where they have been joined, that of the joined ones.

    Args:
        optimizers: The optimizers.
        layout: Their groups.
        target: The model before it was flattened.
    """
    from torch.distributed.fsdp import FlatParameter

    if any(isinstance(p, FlatParameter) for o in optimizers for group in o.param_groups for p in group["params"]):
        return NewOrder(tuple(name for groups in layout for group in groups for name in group.names), known=True)
    return NewOrder(tuple(info.name for info in target.parameters if info.kind == "parameter"), known=True)


def load_into_flattened(
    engine: nn.Module, optimizers: Sequence[Optimizer], states: Sequence[dict[str, Any]], layout: Layout
) -> None:
    """Give the optimizers their parts of whole states; a collective call.

    Raises:
        CheckpointError: If torch cannot cut them, as where only some of the parameters that it has joined have a state.
    """
    for optimizer, state, groups in zip(optimizers, states, layout, strict=True):
        keys = [key for group in state["param_groups"] for key in group["params"]]
        name = dict(zip(keys, (name for group in groups for name in group.names), strict=True))
        named = {
            "state": {name[key]: value for key, value in state["state"].items()},
            "param_groups": [{**g, "params": [name[key] for key in g["params"]]} for g in state["param_groups"]],
        }
        try:
            with _whole_states(engine) as fsdp:
                optimizer.load_state_dict(fsdp.optim_state_dict_to_load(engine, optimizer, named))
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"FullyShardedDataParallel does not take the optimizer's states: {error}. With "
                "FSDPStrategy(use_orig_params=True) parameters that it joins may have states of their own."
            ) from error


def convert_for_shards(
    trainer: pl.Trainer, model: pl.LightningModule, checkpoint: Checkpoint, plan: TransferPlan, mode: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a sharded run goes on with: everything in the checkpoint but the weights, which the model has already.

    Args:
        trainer: The run, whose optimizers exist.
        model: The sharded model.
        checkpoint: The old checkpoint, a file or a folder.
        plan: What filled the model.
        mode: ``"optimizer"`` or ``"all"``.

    Returns:
        The content, with this rank's part of ``optimizer_states``, and remarks.

    Raises:
        CheckpointError: If something cannot be carried.
    """
    keep = partial(_part, dict(model.named_parameters(remove_duplicate=False)))
    groups = groups_of(trainer.optimizers, model)
    return convert_without_weights(checkpoint, plan, mode, groups, new_order(plan, model), keep)


def convert_without_weights(
    checkpoint: Checkpoint,
    plan: TransferPlan,
    mode: str,
    groups: Sequence[Sequence[NewGroup]],
    order: NewOrder,
    keep: Keep | None = None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """:func:`convert_for_shards`, for parameter groups and an order that are known, keeping what ``keep`` says."""
    places, saved = lightning_optimizers(checkpoint.unread) or ((), ())
    if mode == "all":
        twin = next((k for k, v in checkpoint.unread.items() if find_twin(v, checkpoint, plan) is not None), None)
        if twin is not None:
            raise CheckpointError(
                f"{checkpoint.path}: {twin!r} is a copy of the weights (of WeightAveraging?), which cannot be restored "
                "into a sharded run. Use resume='optimizer', or resume in one process."
            )
    states, notes = convert_optimizers(saved, plan, old_parameters(checkpoint, plan), order, groups=groups, keep=keep)
    rest = {key: checkpoint.content[key] for key in checkpoint.unread if key not in places}
    if mode == "all":
        notes += remembered_files(rest.get("callbacks"))
    return {**rest, "optimizer_states": states}, (*checkpoint.notes, *notes)


def _part(parameters: Mapping[str, nn.Parameter], name: str, key: str, value: Tensor) -> Tensor:
    """What this rank holds of a value of a parameter's state: one value per weight lies as the weights lie."""
    parameter = parameters[name]
    kind = kind_of(key, value, tuple(parameter.shape))
    if kind == "same":
        dtype = parameter.dtype if parameter.is_floating_point() else value.dtype
        held = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        copy_into(held, value)
        return held
    if kind != "scalar" and is_sharded(parameter):
        raise NotCarriedError(
            f"{key!r} {tuple(value.shape)} is a mean over rows or columns, of which it is not known how the optimizer "
            "keeps it for a sharded parameter"
        )
    return value.clone()


def load_into_optimizers(optimizers: Sequence[Optimizer], states: Sequence[dict[str, Any]]) -> None:
    """Give the optimizers their states; sharded strategies of Lightning do this while they read a file of their own."""
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)


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
