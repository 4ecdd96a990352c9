"""Several processes, one transfer: agreement between ranks, and copies into sharded tensors.

The engine is ``torch.distributed``; nothing here starts processes or moves weights between them. Every rank reads the
checkpoint itself (a memory-mapped file costs no memory until it is touched), the plan is made once on rank zero and
broadcast, and a rank writes only the slice of a tensor that it holds. So no rank ever holds the whole model.

What one rank finds, all ranks know before anything is written: a file that is missing on one machine of eight stops
all eight with the same error, instead of seven that wait for the eighth.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_wsl import errors
from lit_wsl.errors import LitWslError, TransferError, counted
from lit_wsl.structure.running import has_sharded_tensors, is_sharded

T = TypeVar("T")
_SAMPLED = 64  # tensors of which values are compared between ranks
_ENDS = 256  # values at either end of each


@dataclass(frozen=True)
class Ranks:
    """The processes that make one transfer together.

    Every method is a collective where ``size`` is above 1: all ranks call it, in the same order.
    """

    rank: int = 0  # this process's place, 0 to ``size - 1``
    size: int = 1  # how many there are; 1 makes every method a plain call

    @classmethod
    def of_run(cls) -> Ranks:
        """The ranks of the default process group; a single one where no group has been made."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size())

    @classmethod
    def of_model(cls, model: nn.Module) -> Ranks:
        """All ranks for a model with sharded tensors, which all of them have to fill; otherwise this process alone."""
        return cls.of_run() if has_sharded_tensors(model) else ALONE

    @property
    def is_zero(self) -> bool:
        """Whether this process makes the plan and writes the reports."""
        return self.rank == 0

    def together(self, step: Callable[[], T]) -> T:
        """Run a step on every rank; if it fails on one of them, raise the same error on all."""
        try:
            result, error = step(), None
        except BaseException as raised:
            result, error = None, raised
        self.agree(error)
        return result  # type: ignore[return-value]

    def once(self, step: Callable[[], T]) -> T:
        """Run a step on rank zero only and give its result to all ranks."""
        if self.size == 1:
            return step()
        found: list[T] = []

        def work() -> bytes:
            if not self.is_zero:
                return b""
            found.append(step())
            return pickle.dumps(found[0])  # here, where a failure still reaches everyone

        box = [self.together(work)]
        dist.broadcast_object_list(box, src=0)
        return found[0] if self.is_zero else pickle.loads(box[0])

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of a work that the ranks divide: every ``size``-th item."""
        return items[self.rank :: self.size] if self.size > 1 else items

    def agree(self, error: BaseException | None) -> None:
        """Tell the other ranks whether this one failed; if any did, raise its error here too."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        told = self.gather(None if error is None else (type(error).__name__, str(error)))
        failed = [rank for rank, what in enumerate(told) if what is not None]
        if not failed:
            return
        if error is not None and not isinstance(error, Exception):  # Ctrl-C, sys.exit: its own way out
            raise error
        kind, message = told[failed[0]]  # type: ignore[misc]
        family = getattr(errors, kind, None)
        if not (isinstance(family, type) and issubclass(family, LitWslError)):
            family, message = TransferError, f"{kind}: {message}"
        where = "" if len(failed) == self.size else f" (on rank {counted(failed, 8)} of {self.size})"
        raise family(f"{message}{where}") from error


ALONE = Ranks()


def held_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: the tensor itself, or a sharded one's local part, without a copy."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return part


def copy_into_shard(target: Tensor, value: Tensor) -> None:
    """Copy this rank's part of a whole value into a ``DTensor``, in place and without communication.

    Each rank reads the slice it holds, so of a memory-mapped value nothing else is touched. Needs FSDP2's
    ``fully_shard``, ``parallelize_module``, both on one mesh, or any other ``Shard`` and ``Replicate`` placements.
    """
    from torch.distributed.tensor import DTensor

    assert isinstance(target, DTensor)
    with torch.no_grad():
        if isinstance(value, DTensor):
            target.copy_(value)
            return
        if target.device_mesh.get_coordinate() is None:  # this rank holds nothing of it
            return
        local = target.to_local()
        part = local_part(value, target)
        if part.shape != local.shape:
            raise TransferError(
                f"this rank holds a part of shape {tuple(local.shape)}, but placements {target.placements} on "
                f"{target.device_mesh} give {tuple(part.shape)} of {tuple(value.shape)}."
            )
        local.copy_(part)


def local_part(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this rank holds of ``like``; a view where every placement is plain.

    ``Shard(dim)`` follows ``torch.chunk``; placements apply from the first mesh dimension to the last.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    assert isinstance(like, DTensor)
    mesh, placements = like.device_mesh, like.placements
    if any(p.is_partial() for p in placements):
        raise TransferError(f"its placements {placements} are partial sums, so there is no one value to fill in.")
    if all(type(p) in (Shard, Replicate) for p in placements):
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        part = value
        for dimension, placement in enumerate(placements):
            if isinstance(placement, Shard):
                part = _chunk(part, placement.dim, coordinate[dimension], mesh.size(dimension))
        return part
    # FSDP2 on top of tensor parallelism shards one axis twice, inner mesh dimension first: torch knows that order.
    whole = value.detach().contiguous()
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()


def _chunk(tensor: Tensor, dim: int, index: int, count: int) -> Tensor:
    """Chunk ``index`` of ``count`` as ``torch.chunk`` cuts them, empty ones at the end included."""
    length = tensor.size(dim)
    size = -(-length // count)
    start = min(index * size, length)
    return tensor.narrow(dim, start, min(start + size, length) - start)


def check_same_source(ranks: Ranks, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Make sure that all ranks read the same values, where each reads a file of its own: a node may have an older one.

    A few values of a few tensors are compared; training changes all of them.
    """
    if ranks.size == 1:
        return
    looked_at = names[:: max(1, len(names) // _SAMPLED)]
    seen = ranks.gather(ranks.together(lambda: [_digest(tensors[name]) for name in looked_at]))
    other = [rank for rank, digests in enumerate(seen) if digests != seen[0]]
    if other:
        name = next(n for n, a, b in zip(looked_at, seen[0], seen[other[0]]) if a != b)
        raise TransferError(
            f"rank {counted(other, 8)} of {ranks.size} reads other values of {name} {tuple(tensors[name].shape)} than "
            "rank 0: the files are not the same. Put one and the same checkpoint on every node. Nothing was changed."
        )


def _digest(tensor: Tensor) -> str:
    if is_sharded(tensor):  # refused later, with the remedy
        return ""
    return hashlib.sha256(ends_of(tensor, _ENDS)).hexdigest()


def ends_of(tensor: Tensor, count: int) -> bytes:
    """The first and the last values of a tensor."""
    flat = tensor.detach().reshape(-1)
    return torch.cat([flat[:count], flat[-count:]]).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def refuse_wrapped(model: nn.Module, strategy: object = None) -> None:
    """Refuse models whose parameters another engine has flattened or taken over: writing them would be lost.

    Such a model is filled before it is wrapped, which happens by itself where its modules are made in ``__init__``,
    ``setup`` or ``configure_model`` on a real device.
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
