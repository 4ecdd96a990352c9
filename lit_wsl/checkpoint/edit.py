"""Putting another state dict into a checkpoint's tree, with everything else as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from lit_wsl.checkpoint.records import ForeignObject, as_mapping
from lit_wsl.errors import CheckpointError


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
