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
        lazy: whether the tree holds lazy tensors.
        keep: what holds the files, where they are a temporary copy.
    """

    format: str
    tree: Any
    stubbed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] | None = None
    lossy: bool = False
    lazy: bool = False
    keep: Any = None

    def read(self, part: Any) -> Any:
        """Read the lazy tensors of a part of the tree, if the reader makes any."""
        return materialize(part) if self.lazy else part


def materialize(tree: Any) -> Any:
    """Read every lazy tensor of nested plain dicts and lists.

    Only readers of folders and safetensors make lazy tensors, in trees of their own making, which hold no cycles; a
    tree without any is given back as it is.
    """
    if isinstance(tree, LazyTensor):
        return tree.read()
    if type(tree) is dict and any(isinstance(value, (LazyTensor, dict, list)) for value in tree.values()):
        return {key: materialize(value) for key, value in tree.items()}
    if type(tree) is list and any(isinstance(value, (LazyTensor, dict, list)) for value in tree):
        return [materialize(value) for value in tree]
    return tree
