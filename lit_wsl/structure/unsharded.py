"""A copy of a sharded model that can be run for its execution order: whole tensors without memory, no communication."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_HOOKS = (  # what gathers, scatters and reshards around each call; state-dict hooks stay, for the names
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with the same tree and code, all tensors whole and on the meta device, and no forward hooks.

    Engines that shard in place (``fully_shard``, ``parallelize_module``) do so through the tensors and forward hooks;
    the modules' code still is that of the whole model. What is neither module nor tensor is shared with the original.

    Args:
        module: The module, sharded or not.

    >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> copy = meta_copy(net)
    >>> copy(torch.empty(5, 3, device="meta")).shape, copy[0].weight.is_meta, net[0].weight.is_meta
    (torch.Size([5, 2]), True, False)
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}  # tied ones stay tied

    def tensor_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in tensors:
            made = torch.empty(value.shape, dtype=value.dtype, device="meta")
            is_parameter = isinstance(value, nn.Parameter)
            tensors[id(value)] = nn.Parameter(made, requires_grad=value.requires_grad) if is_parameter else made
        return tensors[id(value)]

    def copy_of(original: nn.Module | None) -> nn.Module | None:
        if original is None or id(original) in modules:
            return None if original is None else modules[id(original)]
        made: nn.Module = object.__new__(type(original))
        modules[id(original)] = made
        own = {name: tensor_of(value) for name, value in vars(original).items()}
        own |= {name: OrderedDict() for name in _HOOKS if name in own}
        for name in ("_parameters", "_buffers"):
            own[name] = {key: tensor_of(value) for key, value in own[name].items()}
        own["_modules"] = {key: copy_of(child) for key, child in own["_modules"].items()}
        if isinstance(own.get("_device"), torch.device):  # what ``LightningModule.device`` tells
            own["_device"] = torch.device("meta")
        vars(made).update(own)
        return made

    copied = copy_of(module)
    assert copied is not None
    return copied


def on_meta(value: Any) -> Any:
    """Nested lists, tuples and dicts with their tensors on the meta device."""
    return tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, value)


__all__ = ["meta_copy", "on_meta"]
