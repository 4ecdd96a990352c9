"""What any reader returns: the whole content of a checkpoint as one tree, with tensors that are read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of known shape and dtype whose data is read on request.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        read: gives the tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()


@dataclass(frozen=True)
class Document:
    """The content of a checkpoint file or folder.

    Attributes:
        format: what it is, such as ``"lightning"``, ``"torch"``, ``"safetensors"``.
        tree: nested dicts and lists; leaves are tensors, :class:`LazyTensor`, plain values and inert records.
        stubbed: dotted names of foreign classes and functions that became inert records.
        notes: remarks for the report.
        metadata: the ``__metadata__`` of a safetensors file.
        lossy: whether writing the tree again would lose something of the file.
    """

    format: str
    tree: Any
    stubbed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] | None = None
    lossy: bool = False


def materialize(tree: Any) -> Any:
    """Read every lazy tensor of a tree of plain dicts and lists; other values are returned as they are."""
    if isinstance(tree, LazyTensor):
        return tree.read()
    if type(tree) is dict:
        return {key: materialize(value) for key, value in tree.items()}
    if type(tree) is list:
        return [materialize(value) for value in tree]
    return tree
