"""Leave no trace: put random generators and Python state back to what they were."""

from __future__ import annotations

import collections
import random
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_LIMIT = 10_000  # objects looked at; beyond that a graph is data, not state
_SKIP = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)


@contextmanager
def preserved_rng(module: nn.Module | None = None) -> Iterator[None]:
    """Put the generators of Python, NumPy and torch (CPU, and the devices of the module) back at the end.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> with preserved_rng():
    ...     first = torch.rand(2)
    >>> torch.equal(first, torch.rand(2))
    True
    """
    import numpy

    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


@contextmanager
def preserved_objects(*roots: Any) -> Iterator[None]:
    """Put back the Python state of some objects and of what they hold: attributes, containers, generators.

    Tensors and arrays are taken for data and not looked at, neither are modules; what is inside them is another
    guard's task. Containers of many elements are data too.

    Args:
        *roots: Data sets, samplers, data modules...; ``None`` is skipped.

    >>> class Counting:
    ...     reads = 0
    >>> box = Counting()
    >>> with preserved_objects(box):
    ...     box.reads += 1
    >>> box.reads
    0
    """
    restorers = list(_walk(list(roots)))
    try:
        yield
    finally:
        for restore in restorers:
            restore()


def _walk(queue: list[Any]) -> Iterator[Callable[[], None]]:
    """Visit the objects reachable through attributes and small containers; yield what restores each."""
    import numpy

    seen: set[int] = set()
    pending = collections.deque(queue)
    while pending and len(seen) < _LIMIT:
        value = pending.popleft()
        if isinstance(value, types.MethodType):  # a bound method is its object's state
            value = value.__self__
        if isinstance(value, (*_SKIP, torch.Tensor, numpy.ndarray)) or id(value) in seen or _is_code(value):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Generator):
            yield _setter(value.set_state, value.get_state())
        elif isinstance(value, numpy.random.Generator):
            yield _setter(lambda s, g=value: setattr(g.bit_generator, "state", s), value.bit_generator.state)
        elif isinstance(value, numpy.random.RandomState):
            yield _setter(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield _setter(value.setstate, value.getstate())
        elif isinstance(value, (list, collections.deque)) and len(value) <= _LIMIT:
            yield _setter(lambda s, c=value: (c.clear(), c.extend(s)), list(value))
            pending.extend(value)
        elif isinstance(value, dict) and len(value) <= _LIMIT:
            yield _setter(lambda s, c=value: (c.clear(), c.update(s)), dict(value))
            pending.extend(value.values())
        elif isinstance(value, set) and len(value) <= _LIMIT:
            yield _setter(lambda s, c=value: (c.clear(), c.update(s)), set(value))
        elif isinstance(value, (tuple, frozenset)) and len(value) <= _LIMIT:
            pending.extend(value)
        elif isinstance(getattr(value, "__dict__", None), dict):
            attributes = vars(value)
            yield _setter(lambda s, c=attributes: (c.clear(), c.update(s)), dict(attributes))
            if not _is_engine(value):
                pending.extend(attributes.values())


def _is_code(value: Any) -> bool:
    """Whether a value is code, not state: functions, classes and modules of Python."""
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type))


def _is_engine(value: Any) -> bool:
    """Whether to stop at an object: networks and the trainer have guards of their own."""
    return isinstance(value, nn.Module) or hasattr(value, "fit_loop")


def _setter(put: Callable[[Any], Any], state: Any) -> Callable[[], None]:
    def restore() -> None:
        put(state)

    return restore
