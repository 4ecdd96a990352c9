"""The whole content of a checkpoint as one tree, with tensors that are read when asked for; its parts exchanged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.records import ForeignObject, as_mapping
from lit_wsl.errors import CheckpointError


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


def replace_at(tree: Any, path: Sequence[str], value: Any) -> Any:
    """Give a copy of a tree with another value at a path of keys; what is off the path is shared, not copied.

    Args:
        tree: nested dicts, or records of dict subclasses.
        path: keys from the top.
        value: what to put there.

    Raises:
        CheckpointError: if the path is not in the tree.

    Example:
        >>> replace_at({"a": {"b": 1, "c": 2}, "d": 3}, ("a", "b"), 9)
        {'a': {'b': 9, 'c': 2}, 'd': 3}
    """
    if not path:
        return value
    entries = as_mapping(tree)
    if entries is None or path[0] not in entries:
        raise CheckpointError(f"The checkpoint has no entry {path[0]!r} to replace.")
    return with_entries(tree, {**entries, path[0]: replace_at(entries[path[0]], path[1:], value)})


def with_entries(container: Any, entries: Mapping[Any, Any]) -> Any:
    """Give a container of the same kind (dict, OrderedDict with its ``_metadata``, record) with other items."""
    if isinstance(container, ForeignObject):
        first = next((at for at, order in enumerate(container.orders) if order[0] == "setitem"), len(container.orders))
        rest = [order for order in container.orders if order[0] != "setitem"]
        items = [("setitem", key, value) for key, value in entries.items()]
        orders = [*rest[:first], *items, *rest[first:]]
        return ForeignObject(container.func, container.args, container.kwargs, container.how, orders)
    if isinstance(container, OrderedDict):
        result: OrderedDict[Any, Any] = OrderedDict(entries)
        if hasattr(container, "_metadata"):
            result._metadata = container._metadata  # type: ignore[attr-defined]
        return result
    return dict(entries)
