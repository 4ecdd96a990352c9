"""Where the parameters of a resumed run lie, and how its optimizers take states there.

Each process holds the whole model; its part of each tensor; or a part of tensors that have been flattened into one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_wsl.convert.saved_optimizer import NewGroup, NewOrder, groups_of, kind_of
from lit_wsl.convert.weights import Keep, NotCarriedError
from lit_wsl.errors import CheckpointError
from lit_wsl.structure import ModelDescription
from lit_wsl.structure.running import is_sharded
from lit_wsl.transfer.apply import copy_into

if TYPE_CHECKING:
    import lightning.pytorch as pl

Layout = list[list[NewGroup]]


class Whole:
    """Each process holds the whole model."""

    keep: Keep | None = None

    def __init__(self, trainer: pl.Trainer, model: nn.Module, order: NewOrder) -> None:
        self.trainer = trainer
        self.groups = groups_of(trainer.optimizers, model)
        self.order = order  # that of the model that the plan fills

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """As Lightning does, devices included."""
        self.trainer.strategy.load_optimizer_state_dict({"optimizer_states": states})


class Sharded(Whole):
    """FSDP2, tensor parallelism: each rank keeps its part of each tensor.

    The states of the old optimizer are read one value of one parameter after the other, go through the operations of
    the plan, and are cut to the part that this rank holds of the parameter; the rest is let go before the next is read.
    So no rank ever holds the whole optimizer, and nothing is sent between ranks.
    """

    def __init__(self, trainer: pl.Trainer, model: nn.Module, order: NewOrder) -> None:
        super().__init__(trainer, model, order)
        self.keep = partial(part_of, dict(model.named_parameters(remove_duplicate=False)))

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Lightning does this while it reads a file of its own."""
        for optimizer, state in zip(self.trainer.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def part_of(parameters: Mapping[str, nn.Parameter], name: str, key: str, value: Tensor) -> Tensor:
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


class Flattened:
    """``FSDPStrategy``, which has flattened the parameters: through torch's own whole form.

    ``FullyShardedDataParallel`` takes optimizer states whole, by name, and cuts them itself. It asks for all of them on
    every rank, so unlike in :class:`Sharded` each rank goes through whole states; those that are only renamed lie over
    the mapped file. Making one, and loading, are collective calls.
    """

    keep: Keep | None = None

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], target: ModelDescription) -> None:
        from torch.distributed.fsdp import FlatParameter

        self.model, self.optimizers = model, optimizers
        with _whole_states(model) as fsdp:
            told = [fsdp.optim_state_dict(model, optimizer)["param_groups"] for optimizer in optimizers]
        self.groups: Layout = [
            [NewGroup(tuple(group["params"]), {k: v for k, v in group.items() if k != "params"}) for group in groups]
            for groups in told
        ]
        # in which the parameters were registered; where they have been joined, that of the joined ones
        names = [info.name for info in target.parameters if info.kind == "parameter"]
        held = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
        if any(isinstance(p, FlatParameter) for p in held):
            names = [name for groups in self.groups for group in groups for name in group.names]
        self.order = NewOrder(tuple(names), known=True)

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Give the optimizers their parts of whole states."""
        for optimizer, state, groups in zip(self.optimizers, states, self.groups, strict=True):
            keys = [key for group in state["param_groups"] for key in group["params"]]
            name = dict(zip(keys, (name for group in groups for name in group.names), strict=True))
            named = {
                "state": {name[key]: value for key, value in state["state"].items()},
                "param_groups": [{**g, "params": [name[key] for key in g["params"]]} for g in state["param_groups"]],
            }
            try:
                with _whole_states(self.model) as fsdp:
                    optimizer.load_state_dict(fsdp.optim_state_dict_to_load(self.model, optimizer, named))
            except (ValueError, KeyError, RuntimeError) as error:
                raise CheckpointError(
                    f"FullyShardedDataParallel does not take the optimizer's states: {error}. With "
                    "FSDPStrategy(use_orig_params=True) parameters that it joins may have states of their own."
                ) from error


Engine = Whole | Flattened
"""What depends on how a strategy holds the model: the groups, the order, how states are loaded."""


def is_flattened(engine: object) -> bool:
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


@contextmanager
def whole_tensors(engine: Any) -> Iterator[dict[str, Tensor]]:
    """The tensors of a flattened model as they were before, by name, to read and write; a collective call."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(engine):
        named = (*engine.named_buffers(remove_duplicate=False), *engine.named_parameters(remove_duplicate=False))
        yield {name_before_wrapping(name): tensor for name, tensor in named}


def name_before_wrapping(name: str) -> str:
    """What a tensor was called before its module, or one around it, was wrapped."""
    return name.replace("_fsdp_wrapped_module.", "")
