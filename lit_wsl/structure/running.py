"""Run models and leave no trace: generators, modes, buffers and Python state are put back; outputs are compared."""

from __future__ import annotations

import collections
import hashlib
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache, partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_LIMIT = 10_000  # objects looked at; beyond that a graph is data, not state
_SKIP = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)


@contextmanager
def preserved_rng(module: nn.Module | None = None) -> Iterator[tuple[Any, Any]]:
    """Put the generators of Python, NumPy and torch (CPU, and the devices of the module) back at the end.

    Yields:
        The states of Python's and of NumPy's.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> with preserved_rng():
    ...     first = torch.rand(2)
    >>> torch.equal(first, torch.rand(2))
    True
    """
    import numpy

    generators = [torch.default_generator, *map(torch.cuda.default_generators.__getitem__, cuda_devices(module))]
    states = [generator.get_state() for generator in generators]
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        yield python, arrays
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        for generator, state in zip(generators, states):
            generator.set_state(state)


def seed(number: int, devices: Sequence[int] = ()) -> None:
    """Seed torch's generators on the CPU and on some CUDA devices, and no others.

    ``torch.manual_seed`` also seeds devices that nobody has used yet, when they are first used: by the run, then.
    """
    torch.default_generator.manual_seed(number)
    for device in devices:
        torch.cuda.default_generators[device].manual_seed(number)


def cuda_devices(module: nn.Module | None) -> list[int]:
    """Numbers of the CUDA devices that a module is on."""
    if module is None or not torch.cuda.is_initialized():  # then nothing is there
        return []
    tensors = (*module.parameters(), *module.buffers())
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


@dataclass(frozen=True)
class Undisturbed:
    """What can be said and done about a module while it is kept as it was."""

    wrote: Callable[[], bool]  # tells whether an operation wrote to one of its tensors
    changed: Callable[[], bool]  # tells whether its modules' attributes, or containers there, hold something else
    put_back: Callable[[], None]  # puts attributes, containers and buffers back for another run in eval mode
    numbers: tuple[Any, Any]  # states of the generators of Python and NumPy at the start


@contextmanager
def undisturbed(module: nn.Module, *, guard: bool = True) -> Iterator[Undisturbed]:
    """Put a module in eval mode to run it, and leave it and the world as they were.

    Put back at the end, whatever the run did: the mode of every sub-module; attributes, buffers and parameters that
    were assigned, lists and dicts that were changed (states of metrics); values of buffers, and of any other tensor
    of the module that an operation wrote to (``Embedding(max_norm=...)`` rescales its weight in ``forward``);
    gradients and ``requires_grad``; generators of Python, NumPy and torch. Nothing is copied beforehand but buffers;
    what is overwritten is kept at the first write to it. Compiled modules run uncompiled.

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

    def restore_buffers() -> None:
        for buffer, value in buffers:  # batch norm writes its statistics without declaring it
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)

    with ExitStack() as stack:
        numbers = stack.enter_context(preserved_rng(module))
        changed, restore_modules = stack.enter_context(_preserved_modules(module))
        if hasattr(torch.compiler, "set_stance") and "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        writes = stack.enter_context(WriteGuard(module)) if guard else None

        def put_back() -> None:
            restore_buffers()
            restore_modules()
            module.eval()

        try:
            torch.backends.mha.set_fastpath_enabled(False)
            module.eval()
            yield Undisturbed(lambda: writes is not None and writes.wrote, changed, put_back, numbers)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            if writes is not None:
                writes.restore()
            restore_buffers()
            for sub, training in modes:  # scripted modules keep theirs where no dict shows it
                if sub.training != training:
                    sub.training = training
            for parameter, requires_grad, grad in flags:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
                if parameter.grad is not grad:
                    parameter.grad = grad


class WriteGuard(TorchDispatchMode):
    """Copy on write: keep the memory behind a module's tensors when an operation is about to write to it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._known = {s.data_ptr(): s for t in _all_tensors(module) if (s := _storage_of(t)) is not None}
        self._kept: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, name in _written(func):
            value = args[place] if place < len(args) else kwargs.get(name)
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


@lru_cache(maxsize=4096)
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((k, a.name) for k, a in arguments if a.alias_info is not None and a.alias_info.is_write)


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
def _preserved_modules(module: nn.Module) -> Iterator[tuple[Callable[[], bool], Callable[[], None]]]:
    """Put back what the modules' attributes refer to, and the content of containers and objects there, also at call.

    Yields:
        What tells whether an attribute or a container holds something else than in eval mode, and what puts all back.
    """
    saved: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    containers: list[tuple[Any, Any]] = []
    others: list[Any] = []
    for sub in module.modules():
        saved.append((sub, type(sub), dict(vars(sub))))
        for value in vars(sub).values():
            if isinstance(value, (dict, list, set, collections.deque)):
                containers.append((value, dict(value) if isinstance(value, dict) else value.copy()))
                inside = value.values() if isinstance(value, dict) else value
                others.extend(inside if len(value) <= _LIMIT else ())
            else:
                others.append(value)
    plain = (*_SKIP, Tensor, nn.Module)
    objects = list(_walk([value for value in others if not isinstance(value, plain)]))

    def changed() -> bool:
        mode = {"training": False}
        held = ((vars(sub), own | mode if "training" in own else own) for sub, _, own in saved)
        same = all(type(sub) is kind for sub, kind, _ in saved)
        return not same or not all(_holds(*both) for both in (*held, *containers))

    def restore() -> None:
        for sub, kind, attributes in saved:
            if type(sub) is not kind:
                sub.__class__ = kind
            _refill(vars(sub), attributes)
        for container, content in containers:
            _refill(container, content)
        for put_back in objects:
            put_back()

    try:
        yield changed, restore
    finally:
        restore()


def _refill(container: Any, content: Any) -> None:
    """Put the content of a list, deque, set or dict back, keeping the container itself."""
    if _holds(container, content):  # never empty, not even for a moment, what another thread may be reading
        return
    container.clear()
    container.extend(content) if hasattr(container, "extend") else container.update(content)


def _holds(container: Any, content: Any) -> bool:
    """Whether a container still holds the very same objects."""
    if len(container) != len(content) or not content:
        return not container and not content
    if isinstance(container, dict):
        return list(container) == list(content) and all(map(is_, container.values(), content.values()))
    if isinstance(container, set):
        return bool(container == content)
    return all(map(is_, container, content))


@contextmanager
def preserved_objects(*roots: Any) -> Iterator[None]:
    """Put back the Python state of some objects and of what they hold: attributes, containers, generators.

    Tensors, arrays and containers of many elements are data, and modules have guards of their own: not looked at.

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
    code = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
    plain = (*_SKIP, torch.Tensor, numpy.ndarray, *code)
    pending = collections.deque(queue)
    while pending and len(seen) < _LIMIT:
        value = pending.popleft()
        if isinstance(value, types.MethodType):  # a bound method is its object's state
            value = value.__self__
        if isinstance(value, plain) or id(value) in seen:
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
                yield partial(_refill, value, value.copy())
                pending.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, (tuple, frozenset)):
            pending.extend(value if len(value) <= _LIMIT else ())
        elif isinstance(value, partial):
            pending.extend((value.func, value.args, value.keywords))
        elif _belongs_to_the_process(value):
            continue
        elif isinstance(getattr(value, "__dict__", None), dict):
            attributes = vars(value)
            yield partial(_refill, attributes, dict(attributes))
            if not isinstance(value, nn.Module) and not hasattr(value, "fit_loop"):  # the trainer has guards of its own
                pending.extend(attributes.values())


def _belongs_to_the_process(value: Any) -> bool:
    """Whether an object is the standard library's own, such as loggers, locks, files and threads: no state of ours."""
    home = type(value).__module__.partition(".")[0]
    return home in sys.stdlib_module_names and not isinstance(value, types.SimpleNamespace) and home != "__main__"


def exchanged(thing: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Give an object another method; what gives its own back, unless somebody else has exchanged it since.

    >>> net = nn.ReLU()
    >>> put_back = exchanged(net, "extra_repr", lambda: "another")
    >>> net
    ReLU(another)
    >>> put_back()
    >>> net
    ReLU()
    """
    before = vars(thing).get(name)
    setattr(thing, name, method)

    def put_back() -> None:
        if vars(thing).get(name) is not method:
            return
        if before is None:
            delattr(thing, name)
        else:
            setattr(thing, name, before)

    return put_back


TOLERANCE = 1e-3
Call = tuple[tuple[Any, ...], dict[str, Any]]
Trace = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One run of a model."""

    outputs: tuple[Tensor, ...]  # the floating-point tensors it returned, in order
    # sorted values of the first output of each leaf module, in order of execution. Sorted, so that layouts (channels
    # first or last, a token axis before or after a batch axis) compare equal.
    trace: Trace


def as_call(sample: Any) -> Call:
    """A sample call from what users write: a dict is keyword arguments, a tuple or list positional ones.

    >>> as_call({"x": 1}), as_call((1, 2)), as_call("batch")
    (((), {'x': 1}), ((1, 2), {}), (('batch',), {}))
    """
    if isinstance(sample, Mapping):
        return (), dict(sample)
    if isinstance(sample, (tuple, list)):
        return tuple(sample), {}
    return (sample,), {}


def ways_to_call(module: nn.Module, batch: Any) -> list[Call]:
    """How ``forward`` may take a batch: as it is, its inputs without the labels, unpacked, by name.

    >>> class Net(nn.Module):
    ...     def forward(self, image, mask=None):
    ...         return image
    >>> [(len(a), sorted(k)) for a, k in ways_to_call(Net(), {"image": torch.ones(1), "label": torch.ones(1)})]
    [(0, ['image']), (1, []), (1, [])]
    """
    calls: list[Call] = []
    if isinstance(batch, Mapping):
        parameters = inspect.signature(module.forward).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            calls.append(((), dict(batch)))
        known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        named = {key: value for key, value in batch.items() if key in known}
        if named:
            calls.append(((), named))
        calls.append(((batch,), {}))
        first = next((value for value in batch.values() if isinstance(value, Tensor)), None)
        if first is not None:
            calls.append(((first,), {}))
        return calls
    calls.append(((batch,), {}))
    if isinstance(batch, (tuple, list)) and batch:
        calls += ways_to_call(module, batch[0])
        if len(batch) > 1:
            calls.append((tuple(batch), {}))
            if len(batch) > 2:
                calls.append((tuple(batch[:-1]), {}))
    return calls


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, of which this rank holds only a part (or a replica)."""
    # No DTensor can exist before its module is imported; importing it to ask would take a second.
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def has_sharded_tensors(model: nn.Module) -> bool:
    """Whether any parameter or buffer of a model is a ``DTensor``."""
    return any(is_sharded(t) for t in model.parameters()) or any(is_sharded(t) for t in model.buffers())


def hindrance(module: nn.Module) -> str:
    """Why a module cannot be run here, if so."""
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            return "a lazy module has no shapes yet"
        if isinstance(tensor, Tensor) and tensor.is_meta:
            return "a model on the meta device cannot run"
        if is_sharded(tensor):
            return "a model spread over several processes is not run by one of them"
    return ""


def source_calls(old: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    """Ways to give the old module what the new one takes: the same call, by position, by the old names, and bare.

    A model that takes more (a decoder's input beside an encoder's) gets its first input again for what it misses.
    """
    yield args, kwargs
    values = [*args, *kwargs.values()]
    yield tuple(values), {}
    names = [n for n in inspect.signature(old.forward).parameters if n not in ("args", "kwargs", "self")]
    yield (), dict(zip(names, values))
    tensors = [v for v in values if isinstance(v, Tensor)]
    if tensors:
        yield (tensors[0],), {}
        needed = [n for n in names if inspect.signature(old.forward).parameters[n].default is inspect.Parameter.empty]
        yield (), dict(zip(needed, [*values, *tensors[:1] * len(needed)]))


def run_with(module: nn.Module, state: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """Run a module with other weights, in eval mode, and record its leaf modules."""
    trace: Trace = {}
    with undisturbed(module), torch.no_grad(), lent(module, state), _recorded(module, trace):
        module.eval()
        result = module(*args, **kwargs)
    return Run(tuple(tensors_in(result)), trace)


@contextmanager
def lent(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Lend a module other values for its tensors.

    The tensors stay the objects they are, so that whoever else holds them (a layer that is in a list and in an
    unregistered attribute) sees the values too, which ``torch.func.functional_call`` would not do.
    """
    with lent_to(lendable(module), state):
        yield


def lendable(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a module that other values can be lent to, by all of their names."""
    held = {id(t) for t in (*module.parameters(), *module.buffers())}
    return [(name, tensor) for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) in held]


@contextmanager
def lent_to(tensors: Sequence[tuple[str, Tensor]], state: Mapping[str, Tensor]) -> Iterator[None]:
    """Lend tensors other values, each by the first of its names that has one."""
    own: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        for name, tensor in tensors:
            if name in state and id(tensor) not in own:
                own[id(tensor)] = tensor, tensor.data
                tensor.data = state[name].to(tensor)
        yield
    finally:
        for tensor, data in own.values():
            tensor.data = data


@contextmanager
def _recorded(module: nn.Module, trace: Trace) -> Iterator[None]:
    def hook(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = next(iter(tensors_in(output)), None)
            if tensor is not None and path not in trace:
                trace[path] = tensor.detach().flatten().double().sort().values

        return record

    leaves = [
        (path, sub)
        for path, sub in module.named_modules()
        if any(True for _ in sub.parameters(recurse=False)) and not any(True for _ in sub.children())
    ]
    handles = [sub.register_forward_hook(hook(path)) for path, sub in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def named_nested(value: Any, names: tuple[str, ...] = (), depth: int = 6) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Tensors of nested lists, tuples, mappings and dataclasses, in order, each with the names that lead to it."""
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Tensor):
        yield names, value
    elif isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        inside = zip(value._fields, value)
    elif isinstance(value, (list, tuple)):
        inside = ((None, item) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        inside = ((item.name, getattr(value, item.name)) for item in fields(value))
    for key, item in inside if depth else ():
        yield from named_nested(item, names if key is None else (*names, str(key)), depth - 1)


def nested_tensors(value: Any) -> Iterator[Tensor]:
    """Tensors of nested lists, tuples, mappings and dataclasses, in order; other objects are passed over."""
    return (tensor for _, tensor in named_nested(value))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model returned, in order."""
    return (tensor.detach() for tensor in nested_tensors(value) if tensor.is_floating_point())


def comparable(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The largest outputs of equal shape; models may return more than they have in common."""
    pairs = [(x, y) for x in a for y in b if x.shape == y.shape and x.numel() > 1]
    largest = max((x.numel() for x, _ in pairs), default=0)
    return [(x, y) for x, y in pairs if x.numel() == largest]


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree to ``TOLERANCE`` of the largest value; zeros and what is not finite prove nothing."""
    a, b = a.double().flatten(), b.double().flatten()
    scale = float(a.abs().max()) if a.numel() else 0.0
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()) or scale == 0.0:
        return bool(torch.equal(a, b)) and scale != 0.0
    return float((a - b).abs().max()) <= TOLERANCE * scale


def shaken_state(module: nn.Module, salt: str = "source") -> dict[str, Tensor]:
    """The module's state, perturbed the same way every time: no ones, no zeros, no two alike."""
    shaken: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        if not tensor.is_floating_point():
            shaken[name] = tensor.detach()
            continue
        if id(tensor) not in known:
            seed = int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:4], "little")
            generator = torch.Generator().manual_seed(seed)
            value = tensor.detach().to("cpu", torch.float32)
            spread = 0.1 * float(value.std()) if value.numel() > 1 else 0.0
            noise = torch.randn(value.shape, generator=generator) * (spread or 0.05)
            moved = value + noise
            kept = moved.abs().clamp_min(0.05) if name.endswith("var") else moved
            known[id(tensor)] = kept.to(tensor.device, tensor.dtype)
        shaken[name] = known[id(tensor)]
    return shaken
