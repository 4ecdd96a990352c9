"""Leave no trace: put random generators and Python state back to what they were."""

from __future__ import annotations

import collections
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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
def undisturbed(module: nn.Module, *, guard: bool = True) -> Iterator[Callable[[], bool]]:
    """Put a module in eval mode to run it, and leave it and the world as they were.

    Put back at the end, whatever the run did: the mode of every sub-module; attributes, buffers and parameters that
    were assigned, lists and dicts that were changed (states of metrics); values of buffers, and of any other tensor
    of the module that an operation wrote to (``Embedding(max_norm=...)`` rescales its weight in ``forward``);
    gradients and ``requires_grad``; generators of Python, NumPy and torch. Nothing is copied beforehand but buffers;
    what is overwritten is kept at the first write to it. Compiled modules run uncompiled.

    Args:
        module: The module that will run.
        guard: Whether to watch for writes to its tensors; every operation pays for it. Without, only buffers are put
            back, for a run that was seen to write nothing else.

    Yields:
        Whether anything was written to the module's tensors.

    >>> net = nn.BatchNorm1d(2)
    >>> with undisturbed(net):
    ...     _ = net.train()(torch.randn(8, 2))
    >>> net.running_mean, net.training
    (tensor([0., 0.]), True)
    """
    modes = [(sub, sub.training) for sub in module.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    buffers = [(b, b.detach().clone()) for b in module.buffers() if not (b.is_meta or nn.parameter.is_lazy(b))]
    fast_path = torch.backends.mha.get_fastpath_enabled()  # fuses whole layers, so hides the order of their parts
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(module))
        stack.enter_context(_preserved_modules(module))
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        writes = _WriteGuard(module)
        if guard:
            stack.enter_context(writes)
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            module.eval()
            yield lambda: writes.wrote
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            writes.restore()
            for buffer, value in buffers:  # batch norm writes its statistics without declaring it
                if not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
            for sub, training in modes:  # scripted modules keep theirs where no dict shows it
                if sub.training != training:
                    sub.training = training
            for parameter, requires_grad, grad in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


class _WriteGuard(TorchDispatchMode):
    """Copy on write: keep the memory behind a module's tensors when an operation is about to write to it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._known = {s.data_ptr(): s for t in _all_tensors(module) if (s := _storage_of(t)) is not None}
        self._kept: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                storage = _storage_of(tensor) if isinstance(tensor, Tensor) else None
                key = storage.data_ptr() if storage is not None else 0
                if key in self._known and key not in self._kept:
                    self._kept[key] = self._known[key].clone()
        return func(*args, **kwargs)

    @property
    def wrote(self) -> bool:
        """Whether anything was written to."""
        return bool(self._kept)

    def restore(self) -> None:
        """Put the kept memory back."""
        for key, content in self._kept.items():
            self._known[key].copy_(content)


def _all_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, their gradients, buffers, and tensors in plain attributes, also in lists and dicts there."""
    for sub in module.modules():
        for value in list(vars(sub).values()):
            items = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            for item in items:
                if isinstance(item, Tensor):
                    yield item
                    if item.is_leaf and item.grad is not None:
                        yield item.grad


def _storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        return storage if storage.data_ptr() else None
    except (RuntimeError, NotImplementedError, ValueError):  # lazy, meta, sparse: no memory to keep
        return None


@contextmanager
def _preserved_modules(module: nn.Module) -> Iterator[None]:
    """Put back what the modules' attributes refer to, and the content of lists and dicts there."""
    saved: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    restorers: list[Callable[[], None]] = []
    others: list[Any] = []
    for sub in module.modules():
        saved.append((sub, type(sub), dict(vars(sub))))
        for value in vars(sub).values():
            if isinstance(value, dict):
                restorers.append(_refill(value, dict(value)))
            elif isinstance(value, (list, set, collections.deque)):
                restorers.append(_refill(value, value.copy()))
            elif not isinstance(value, (*_SKIP, Tensor, nn.Module)):
                others.append(value)
    with preserved_objects(*others):
        try:
            yield
        finally:
            for sub, kind, attributes in saved:
                if type(sub) is not kind:
                    sub.__class__ = kind
                _refill(vars(sub), attributes)()
            for restore in restorers:
                restore()


def _refill(container: Any, content: Any) -> Callable[[], None]:
    """What puts the content of a list, deque, set or dict back, keeping the container itself."""

    def refill() -> None:
        if _holds(container, content):  # never empty, not even for a moment, what another thread may be reading
            return
        container.clear()
        container.extend(content) if hasattr(container, "extend") else container.update(content)

    return refill


def _holds(container: Any, content: Any) -> bool:
    """Whether a container still holds the very same objects."""
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in content.items())
    if isinstance(container, set):
        return bool(container == content)
    return all(a is b for a, b in zip(container, content))


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


def _walk(queue: list[Any]) -> Iterator[Callable[[], Any]]:
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
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, numpy.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, numpy.random.RandomState):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif isinstance(value, (list, dict, set, collections.deque)):
            if len(value) <= _LIMIT:
                yield _refill(value, value.copy())
                pending.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, (tuple, frozenset)):
            pending.extend(value if len(value) <= _LIMIT else ())
        elif isinstance(value, partial):
            pending.extend((value.func, value.args, value.keywords))
        elif _belongs_to_the_process(value):
            continue
        elif isinstance(getattr(value, "__dict__", None), dict):
            attributes = vars(value)
            yield _refill(attributes, dict(attributes))
            if not _is_engine(value):
                pending.extend(attributes.values())


def _is_code(value: Any) -> bool:
    """Whether a value is code, not state: functions, classes and modules of Python."""
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type))


def _belongs_to_the_process(value: Any) -> bool:
    """Whether an object is the standard library's own, such as loggers, locks, files and threads: no state of ours."""
    home = type(value).__module__.partition(".")[0]
    return home in sys.stdlib_module_names and not isinstance(value, types.SimpleNamespace) and home != "__main__"


def _is_engine(value: Any) -> bool:
    """Whether to stop at an object: networks and the trainer have guards of their own."""
    return isinstance(value, nn.Module) or hasattr(value, "fit_loop")
