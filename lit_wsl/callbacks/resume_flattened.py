"""Going on with training under ``FSDPStrategy``, which has flattened the parameters: through torch's own whole form.

``FullyShardedDataParallel`` takes optimizer states whole, by name, and cuts them itself. It asks for all of them on
every rank, so unlike in :mod:`lit_wsl.callbacks.resume_sharded` each rank goes through whole states; those that are
only renamed lie over the mapped file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lit_wsl.checkpoint.optimizer import NewGroup, NewOrder
from lit_wsl.errors import CheckpointError
from lit_wsl.structure import ModelDescription

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


__all__ = ["Layout", "groups_of_flattened", "is_flattened", "load_into_flattened", "order_in_flattened"]
