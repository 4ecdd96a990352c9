"""Run two models with the same shaken weights, and compare what they compute."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_wsl.structure.preserving import undisturbed

TOLERANCE = 1e-3
Call = tuple[tuple[Any, ...], dict[str, Any]]
Trace = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One run of a model.

    Attributes:
        outputs: The floating-point tensors it returned, in order.
        trace: Sorted values of the first output of each leaf module, in order of execution. Sorted, so that layouts
            (channels first or last, a token axis before or after a batch axis) compare equal.
    """

    outputs: tuple[Tensor, ...]
    trace: Trace


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
    unique: list[Call] = []
    for call in calls:
        if not any(call is other for other in unique):
            unique.append(call)
    return unique


def hindrance(module: nn.Module) -> str:
    """Why a module cannot be run here, if so."""
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            return "a lazy module has no shapes yet"
        if isinstance(tensor, Tensor) and tensor.is_meta:
            return "a model on the meta device cannot run"
        if hasattr(tensor, "device_mesh"):
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
    held = {id(t) for t in (*module.parameters(), *module.buffers())}
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name in state and id(tensor) in held:
                held.remove(id(tensor))
                own.append((tensor, tensor.data))
                tensor.data = state[name].to(tensor)
        yield
    finally:
        for tensor, data in own:
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


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model returned, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


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
