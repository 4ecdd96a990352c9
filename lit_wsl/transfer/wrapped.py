"""Models that another engine has taken over: what is written into their parameters would be lost, so it is refused."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from lit_wsl.errors import TransferError


def refuse_wrapped(model: nn.Module, strategy: object = None) -> None:
    """Refuse models whose parameters another engine has flattened or taken over: writing them would be lost.

    Such a model is filled before it is wrapped, which happens by itself where its modules are made in ``__init__``,
    ``setup`` or ``configure_model`` on a real device.

    Args:
        model: The model to fill.
        strategy: Lightning's strategy, where there is one.

    Raises:
        TransferError: If it is wrapped by ``FullyShardedDataParallel`` or by DeepSpeed.
    """
    remedy = (
        "Make its modules in __init__, setup or configure_model without sharding or wrapping them there and on a real "
        "device, so that the transfer comes before the wrapping; or use ModelParallelStrategy with fully_shard."
    )
    engine = getattr(strategy, "model", None)
    if dist.is_available():
        from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel

        outer = engine if isinstance(engine, nn.Module) else model
        if any(isinstance(m, FullyShardedDataParallel) for part in (outer, model) for m in part.modules()) or any(
            isinstance(p, FlatParameter) for p in model.parameters()
        ):
            raise TransferError(
                "The model is wrapped by FullyShardedDataParallel, which keeps flattened parts of its parameters, "
                f"so they cannot be filled one by one. {remedy}"
            )
    partitioned = next((name for name, p in model.named_parameters() if hasattr(p, "ds_id")), None)
    if partitioned is not None:
        raise TransferError(
            f"DeepSpeed (ZeRO stage 3) has partitioned {partitioned} and all other parameters. {remedy}"
        )
    if type(engine).__module__.partition(".")[0] == "deepspeed":
        raise TransferError(
            "DeepSpeed has been set up already and keeps a copy of the parameters in its optimizer, which would undo "
            f"the transfer at the first step. {remedy}"
        )
