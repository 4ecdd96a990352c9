"""What people do today, written as they write it. Each takes a target and a state dict and fills the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Peer = Callable[[nn.Module, Mapping[str, Tensor]], None]


def strict_false(target: nn.Module, source: Mapping[str, Tensor]) -> None:
    """``load_state_dict(strict=False)``: equal names; it raises on an equal name of another shape, having copied."""
    try:
        target.load_state_dict(dict(source), strict=False)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise


def zip_by_order(target: nn.Module, source: Mapping[str, Tensor]) -> None:
    """The n-th tensor of one state dict goes to the n-th of the other where the shapes agree."""
    with torch.no_grad():
        for ours, theirs in zip(target.state_dict().values(), source.values()):
            if ours.shape == theirs.shape:
                ours.copy_(theirs)


def longest_suffix(target: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Names whose one is the dotted end of the other; of several the longest; skipped where the shapes differ."""
    with torch.no_grad():
        for name, ours in target.state_dict().items():
            found = [key for key in source if f".{name}".endswith(f".{key}") or f".{key}".endswith(f".{name}")]
            if not found:
                continue
            best = max(found, key=lambda key: (min(len(key), len(name)), -len(key)))
            if source[best].shape == ours.shape:
                ours.copy_(source[best])


PEERS: dict[str, Peer] = {
    "strict=False": strict_false,
    "zip by order": zip_by_order,
    "longest suffix": longest_suffix,
}
