"""Going on with training where the model is sharded (FSDP2, tensor parallelism): each rank keeps its part.

The states of the old optimizer are read one value of one parameter after the other, go through the operations of the
plan, and are cut to the part that this rank holds of the parameter; the rest is let go before the next is read. So no
rank ever holds the whole optimizer, and nothing is sent between ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_wsl.checkpoint.convert import lightning_optimizers, remembered_files
from lit_wsl.checkpoint.convert_weights import find_twin
from lit_wsl.checkpoint.optimizer import NewGroup, NewOrder, convert_optimizers, groups_of
from lit_wsl.checkpoint.optimizer_names import kind_of
from lit_wsl.checkpoint.optimizer_state import Keep, NotCarriedError
from lit_wsl.checkpoint.parameter_order import new_order, old_parameters
from lit_wsl.checkpoint.reader import Checkpoint
from lit_wsl.errors import CheckpointError
from lit_wsl.transfer.apply import copy_into
from lit_wsl.transfer.distributed import is_sharded
from lit_wsl.transfer.plan import TransferPlan

if TYPE_CHECKING:
    import lightning.pytorch as pl


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


__all__ = ["convert_for_shards", "convert_without_weights", "load_into_optimizers"]
