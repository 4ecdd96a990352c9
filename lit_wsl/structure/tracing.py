"""Execution order: in which order does one sample call use the tensors of a model?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle


class _FirstUse(TorchFunctionMode):
    """Note the first use of each tensor in a torch call, for parameters that no module call announces."""

    def __init__(self, names: Mapping[int, str], seen: dict[str, None]) -> None:
        super().__init__()
        self._names = names
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in _tensors((args, kwargs or {})):
            name = self._names.get(id(value))
            if name is not None:
                self._seen.setdefault(name)
        return func(*args, **(kwargs or {}))


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, depth - 1)


def trace_execution_order(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Run one sample call and note the order in which it first uses the module's tensors.

    A leaf module's tensors come at its first call, in registration order; a tensor used without a call of its
    module (``F.linear(x, self.weight)``, a class token) comes where a torch function first takes it. Modules
    called several times count once; modules never called are absent from the result.

    The call runs without gradients, in eval mode, and leaves the RNG, the mode of every sub-module and all
    buffers as they were.

    Args:
        module: The model to run.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        State-dict name -> place in execution order, from 0.

    Raises:
        Exception: Whatever the model's own forward raises.

    >>> class Swapped(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.second, self.first = nn.Linear(3, 2), nn.Linear(4, 3)
    ...     def forward(self, x):
    ...         return self.second(self.first(x))
    >>> sorted(trace_execution_order(Swapped(), (torch.ones(1, 4),)).items(), key=lambda kv: kv[1])[0]
    ('first.weight', 0)
    """
    state = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    names: dict[int, str] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), name)
    seen: dict[str, None] = {}

    def announce(sub: nn.Module, *_: Any) -> None:
        own = [*sub.named_parameters(recurse=False), *sub.named_buffers(recurse=False)]
        for _name, tensor in own:
            name = names.get(id(tensor))
            if name is not None:
                seen.setdefault(name)

    leaves = [sub for sub in module.modules() if not any(True for _ in sub.children())]
    handles: list[RemovableHandle] = [leaf.register_forward_pre_hook(announce) for leaf in leaves]
    try:
        with undisturbed(module), torch.no_grad(), _FirstUse(names, seen):
            module(*args, **(kwargs or {}))
    finally:
        for handle in handles:
            handle.remove()
    return {name: place for place, name in enumerate(seen)}


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put the module in eval mode, and leave modes, buffers and every RNG as they were."""
    modes = [(sub, sub.training) for sub in module.modules()]
    buffers = [(b, b.detach().clone()) for b in module.buffers() if not b.is_meta]
    devices = sorted({t.device.index or 0 for t in module.parameters() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        module.eval()
        try:
            yield
        finally:
            for sub, training in modes:
                sub.training = training
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
