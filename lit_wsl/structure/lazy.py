"""Lazy modules (``nn.LazyLinear``) have no shapes before their first call: a copy of the model is called instead.

The copy's shapes and first values are then taken over, and can be given back: a transfer that fails leaves the model as
lazy as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy as is_lazy_tensor

_HANDLES = ("_initialize_hook", "_load_hook")  # of the hooks that a lazy module takes off at its first call
_KINDS: dict[Any, Any] = {nn.Parameter: nn.UninitializedParameter, Tensor: nn.UninitializedBuffer}


def is_lazy(module: nn.Module) -> bool:
    """Whether some tensors have no shape before the first call."""
    return any(is_lazy_tensor(tensor) for tensor in (*module.parameters(), *module.buffers()))


def lazy_copy(module: nn.Module) -> nn.Module:
    """A deep copy of a module with lazy parts; PyTorch can copy lazy parameters, but not lazy buffers.

    What a module leaves out of its copies, such as a LightningModule its trainer, is shared.
    """
    memo: dict[int, Any] = {}
    for buffer in module.buffers():
        if is_lazy_tensor(buffer):
            memo[id(buffer)] = nn.UninitializedBuffer(device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]
    copied = copy.deepcopy(module, memo)
    for original, made in zip(module.modules(), copied.modules(), strict=True):
        for name, value in vars(original).items():
            if value is not None and vars(made).get(name) is None:
                vars(made)[name] = value
    return copied


def take_shapes(module: nn.Module, shaped: nn.Module) -> Callable[[], None]:
    """Give lazy modules the shapes and first values of a copy that has been called.

    Args:
        module: The module, whose tensors stay the objects they are.
        shaped: Its copy.

    Returns:
        What makes them lazy again.

    >>> net = nn.LazyLinear(2)
    >>> twin = lazy_copy(net)
    >>> _ = twin(torch.ones(1, 3))
    >>> put_back = take_shapes(net, twin)
    >>> net
    Linear(in_features=3, out_features=2, bias=True)
    >>> put_back()
    >>> net
    LazyLinear(in_features=0, out_features=2, bias=True)
    """
    steps: list[Callable[[], None]] = []
    for sub, twin in list(zip(module.modules(), shaped.modules(), strict=True)):
        lazy = [t for t in (*sub._parameters.values(), *sub._buffers.values()) if t is not None and is_lazy_tensor(t)]
        if lazy or type(sub) is not type(twin):
            steps.append(_way_back(sub, lazy))
            _take(sub, twin)

    def put_back() -> None:
        while steps:
            steps.pop()()

    return put_back


def _take(sub: nn.Module, twin: nn.Module) -> None:
    for own, others in ((sub._parameters, twin._parameters), (sub._buffers, twin._buffers)):
        for name, value in others.items():
            mine: Any = own.get(name)
            if value is not None and mine is not None and is_lazy_tensor(mine):
                mine.materialize(tuple(value.shape))
                with torch.no_grad():
                    mine.copy_(value)
            elif value is not None and mine is None:  # made at the first call
                own[name] = copy.deepcopy(value)  # type: ignore[assignment]
    for handle in _HANDLES:
        if handle in vars(sub) and handle not in vars(twin):
            vars(sub).pop(handle).remove()
    for name, value in vars(twin).items():
        if isinstance(value, (bool, int, float, str, tuple, torch.Size)) and name != "training":
            vars(sub)[name] = value
    sub.__class__ = type(twin)


def _way_back(sub: nn.Module, lazy: list[Any]) -> Callable[[], None]:
    kind, attributes = type(sub), dict(vars(sub))
    contents = [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]

    def put_back() -> None:
        for tensor in lazy:
            if not is_lazy_tensor(tensor):
                tensor.data = torch.empty(0, device=tensor.device, dtype=tensor.dtype)
                tensor.__class__ = _KINDS[type(tensor)]
        sub.__class__ = kind
        for container, content in [(vars(sub), attributes), *contents]:
            container.clear()
            container.update(content)

    return put_back
