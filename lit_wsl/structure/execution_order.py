"""Execution order: in which order does one sample call use the tensors of a model?

Lazy modules (``nn.LazyLinear``) have no shapes before their first call: a copy of the model is called instead. The
copy's shapes and first values are taken over, and can be given back: a transfer that fails leaves the model lazy.
"""

from __future__ import annotations

import copy
import inspect
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy as is_lazy_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lit_wsl.structure.running import nested_tensors, preserved_rng, undisturbed

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
    """Give lazy modules the shapes and first values of a copy that has been called; returns what undoes it.

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


class _FirstUse(TorchFunctionMode):
    """Note the first use of each tensor in a torch call, for parameters that no module call announces.

    A use is a call that gives a tensor: asking for a weight's shape, dtype or device is none.
    """

    def __init__(self, names: Mapping[int, str], seen: dict[str, None]) -> None:
        super().__init__()
        self._names = names
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [name for v in nested_tensors((args, kwargs or {})) if (name := self._names.get(id(v))) is not None]
        result = func(*args, **(kwargs or {}))
        if found and any(True for _ in nested_tensors(result)):
            for name in found:
                self._seen.setdefault(name)
        return result


class Step(NamedTuple):
    """A step of a LightningModule on a batch that only it can unpack: a sample call whose one argument this is."""

    name: str  # the method, such as ``training_step``
    batch: Any  # the batch


def step_of(args: Sequence[Any]) -> Step | None:
    """The step that a sample call stands for, if it does not call ``forward``."""
    return args[0] if len(args) == 1 and isinstance(args[0], Step) else None


def make_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Make a sample call: of the module, or of one of its steps, as the first batch of a loader."""
    step = step_of(args)
    if step is None:
        return module(*args, **kwargs)
    method = getattr(module, step.name)
    taken = [
        p
        for p in inspect.signature(method).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody asked for this step
        return method(step.batch, *(0 for _ in taken[1:]))


def _comes_from_a_call(error: Exception) -> bool:
    """Whether an error was raised inside the call of a module."""
    return any(frame.f_code is nn.Module._call_impl.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def trace_execution_order(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Run one sample call and note the order in which it first uses the module's tensors.

    A leaf module's tensors come at its first call, in registration order; a tensor used without a call of its
    module (``F.linear(x, self.weight)``, a class token) comes where a torch function first takes it. Modules
    called several times count once; modules never called are absent from the result.

    The call runs without gradients, in eval mode, and leaves the model as it was, see :func:`undisturbed`. A model
    with lazy modules is run as a copy, so that it stays lazy.

    Args:
        module: The model to run.
        args: Positional arguments of the call; or one :class:`Step`: what ran before an error of its own counts.
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
    if is_lazy(module):
        return first_call(lazy_copy(module), args, kwargs)
    return _observe(module, args, kwargs or {}, undisturbed(module))


def first_call(
    copied: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """:func:`trace_execution_order` of a copy that nobody else needs; its lazy modules get their shapes by the call."""
    copied.eval()
    return _observe(copied, args, kwargs or {}, preserved_rng(copied))


def _observe(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], world: AbstractContextManager[Any]
) -> dict[str, int]:
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

    hookable = (sub for sub in module.modules() if not isinstance(sub, torch.jit.ScriptModule))
    leaves = [sub for sub in hookable if not any(True for _ in sub.children())]
    handles: list[RemovableHandle] = [leaf.register_forward_pre_hook(announce) for leaf in leaves]
    try:
        with world, torch.no_grad(), _FirstUse(names, seen):
            make_call(module, args, kwargs)
    except Exception as error:  # a step does more than run the network, and not all of it is possible here (backward)
        if step_of(args) is None or not seen or _comes_from_a_call(error):
            raise
    finally:
        for handle in handles:
            handle.remove()
    return {name: place for place, name in enumerate(seen)}


def only_child(module: nn.Module) -> str | None:
    """Name of the child that holds all parameters of a wrapper; ``None`` if the module is no wrapper.

    >>> only_child(nn.ModuleDict({"model": nn.Linear(2, 2), "loss": nn.MSELoss()}))
    'model'
    """
    if any(True for _ in module.parameters(recurse=False)):
        return None
    holding = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    return holding[0] if len(holding) == 1 else None


def callee(module: nn.Module) -> tuple[nn.Module, str]:
    """The module that a sample is for, and the prefix of its names: the model, or the network it wraps."""
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.model_helpers import is_overridden

    if not isinstance(module, LightningModule) or is_overridden("forward", module):
        return module, ""
    path = only_child(module)
    return (module, "") if path is None else (module.get_submodule(path), f"{path}.")


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
