"""The places of a checkpoint's tree that hold named tensors; optimizer states are left out by their structure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lit_wsl.checkpoint.document import LazyTensor
from lit_wsl.checkpoint.inert import ForeignObject, as_mapping
from lit_wsl.checkpoint.modules import attributes, is_module, module_state_dict, numpy_tensor

Leaf = Tensor | LazyTensor

MAX_NEST = 6
AVERAGE_WORDS = frozenset({"ema", "average", "averaged", "averaging", "avg", "swa", "shadow", "polyak"})


@dataclass(frozen=True)
class Nest:
    """A place in the tree that holds named tensors.

    Attributes:
        path: the keys that lead there.
        tensors: names and tensors.
        extra: its entries that are no tensors, such as ``_extra_state``.
        module: whether it is a whole pickled module.
    """

    path: tuple[str, ...]
    tensors: dict[str, Leaf]
    extra: dict[Any, Any] = field(default_factory=dict)
    module: bool = False

    @property
    def numel(self) -> int:
        """Number of elements of all its tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def averaged(self) -> bool:
        """Whether a word on its path says that it is a running average of the weights."""
        return any(words_of(part) & AVERAGE_WORDS for part in self.path)

    @property
    def label(self) -> str:
        """Its path as text."""
        return ".".join(self.path) or "state_dict"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, without a leading ``module.`` that all names share."""
        names = list(self.tensors)
        common = "module." if all(name.startswith("module.") or "." not in name for name in names) else ""
        return {name.removeprefix(common): tuple(tensor.shape) for name, tensor in self.tensors.items()}


def words_of(text: str) -> set[str]:
    """Cut a key into lower-case words: ``state_dict_ema``, ``EMACallback``, ``modelEma``."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)
    return {part.lower() for part in parts}


def find_nests(tree: Any) -> list[Nest]:
    """List every place of the tree that holds named tensors, in the file's order; optimizer states are left out."""
    found: list[Nest] = []
    seen: set[int] = set()
    stack: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while stack:
        path, value = stack.pop()
        if id(value) in seen or len(path) > MAX_NEST:
            continue
        seen.add(id(value))
        if is_module(value):
            tensors = module_state_dict(value)
            if tensors:
                found.append(Nest(path, dict(tensors), module=True))
                continue
        entries = attributes(value)
        if _is_optimizer(entries):
            continue
        nest = _nest(path, entries)
        if nest.tensors:
            found.append(nest)
        inner = [(path + (key,), child) for key, child in entries.items() if isinstance(key, str)]
        stack.extend(reversed([item for item in inner if _is_container(item[1])]))
    return found


def _is_container(value: Any) -> bool:
    return as_mapping(value) is not None or isinstance(value, ForeignObject)


def _is_optimizer(entries: Mapping[Any, Any]) -> bool:
    """Tell an optimizer's state dict by its two parts, nested or flattened into dotted names."""
    if "param_groups" in entries and "state" in entries:
        return True
    return any(isinstance(key, str) and key.startswith("param_groups.") for key in entries)


def _nest(path: tuple[str, ...], entries: Mapping[Any, Any]) -> Nest:
    tensors: dict[str, Leaf] = {}
    extra: dict[Any, Any] = {}
    for key, value in entries.items():
        name = key.decode("utf-8", "replace") if isinstance(key, bytes) else key
        leaf = value if isinstance(value, (Tensor, LazyTensor)) else numpy_tensor(value)
        if isinstance(name, str) and leaf is not None:
            tensors[name] = leaf
        else:
            extra[key] = value
    return Nest(path, tensors, extra)
