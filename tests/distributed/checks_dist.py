"""What all scenarios share: files that rank zero writes, whole tensors to compare, and calls that should fail."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models_dist import expected_state, old_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def whole(net: nn.Module) -> dict[str, Tensor]:
    """Whole tensors on every rank, as plain copies."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in net.state_dict().items()
    }


def differing(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The names of what is not bit for bit as expected."""
    return sorted(name for name, tensor in expected.items() if not torch.equal(state[name], tensor))


def digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def save_old(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The old checkpoint, written by rank zero, and what the new network must hold."""
    old = old_model()
    return save(folder / "old.ckpt", {"state_dict": old.state_dict()}), expected_state(old)


def save(path: Path, content: Any) -> Path:
    """Write a file on rank zero, for all."""
    if dist.get_rank() == 0:
        torch.save(content, path)
    dist.barrier()
    return path


def attempt(net: nn.Module, action: Callable[[], object]) -> dict[str, Any]:
    """What an action raises that should fail, and whether the network is as it was, bit for bit."""
    before = whole(net)
    try:
        action()
    except Exception as error:
        unchanged = digest(whole(net)) == digest(before)
        return {"kind": type(error).__name__, "message": str(error), "unchanged": unchanged}
    return {"kind": "none"}


@contextmanager
def failing_copy(number: int) -> Iterator[None]:
    """Let the given copy of rank one, counted from one, fail."""
    import lit_wsl.transfer.apply as apply

    copy, calls = apply.copy_into, []

    def fails(target: Tensor, value: Tensor) -> None:
        calls.append(1)
        if len(calls) == number:
            raise OSError("the disk went away")
        copy(target, value)

    if dist.get_rank() == 1:
        apply.copy_into = fails
    try:
        yield
    finally:
        apply.copy_into = copy


@contextmanager
def little_memory_to_undo() -> Iterator[None]:
    """Let the undo log take next to nothing into memory, as with a model of many gigabytes."""
    import lit_wsl.transfer.apply as apply

    memory, apply._UNDO_MEMORY = apply._UNDO_MEMORY, 64
    try:
        yield
    finally:
        apply._UNDO_MEMORY = memory
