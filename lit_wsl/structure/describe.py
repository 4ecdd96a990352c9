"""Describe a module, a state dict or a checkpoint: the first step of every transfer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lit_wsl.errors import MappingError
from lit_wsl.structure.info import Kind, ModelDescription, ParameterInfo


@runtime_checkable
class HasMeta(Protocol):
    """A lazily read mapping that knows shapes and dtypes without reading data (``lit_wsl.checkpoint.Checkpoint``)."""

    def meta_items(self) -> Iterable[tuple[str, Tensor]]:
        """Yield ``(name, tensor on the meta device)`` in registration order; tied names yield one tensor."""
        ...


def describe(
    side: nn.Module | Mapping[str, Tensor],
    *,
    execution_order: Mapping[str, int] | None = None,
    label: str | None = None,
) -> ModelDescription:
    """Describe one side of a transfer, without touching tensor data.

    Args:
        side: A module (on any device, the meta device included), a state dict, or a lazily read checkpoint.
        execution_order: Tensor name -> place in execution order, from :func:`lit_wsl.structure.trace_execution_order`.
        label: What to call this side in messages.

    Returns:
        The description, tensors in registration order.

    Raises:
        MappingError: If there is no tensor at all.

    >>> d = describe(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    >>> [(p.name, p.shape, p.kind) for p in d.parameters][:2]
    [('0.weight', (8, 3, 3, 3), 'parameter'), ('0.bias', (8,), 'parameter')]
    >>> d["1.running_mean"].kind
    'buffer'
    """
    order = execution_order or {}
    if isinstance(side, nn.Module):
        description = _describe_module(side, order, label or type(side).__name__)
    else:
        description = _describe_tensors(side, order, label or "state dict")
    if not description.parameters:
        raise MappingError(f"{description.label} holds no tensors, so there is nothing to match.")
    return description


def _describe_module(module: nn.Module, order: Mapping[str, int], label: str) -> ModelDescription:
    kinds: dict[str, Kind] = {}
    types: dict[str, str] = {}
    for path, sub in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, _ in sub.named_parameters(recurse=False, remove_duplicate=False):
            kinds[prefix + name], types[prefix + name] = "parameter", type(sub).__name__
        for name, _ in sub.named_buffers(recurse=False, remove_duplicate=False):
            kinds[prefix + name], types[prefix + name] = "buffer", type(sub).__name__
    infos: list[ParameterInfo] = []
    first_name: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):  # extra state
            continue
        canonical = first_name.setdefault(id(tensor), name)
        if canonical != name:
            tied[name] = canonical
            continue
        infos.append(
            ParameterInfo(
                name=name,
                shape=_shape_of(tensor),
                dtype=tensor.dtype,
                kind=kinds.get(name, "parameter"),
                index=len(infos),
                execution_order=order.get(name),
                module_type=types.get(name, ""),
            )
        )
    return ModelDescription(tuple(infos), tied, label, is_module=True)


def _shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape, ``()`` for tensors of lazy modules that have none yet."""
    return () if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)


def _describe_tensors(tensors: Mapping[str, Tensor], order: Mapping[str, int], label: str) -> ModelDescription:
    items = tensors.meta_items() if isinstance(tensors, HasMeta) else tensors.items()
    found = [(name, tensor) for name, tensor in items if isinstance(tensor, Tensor)]
    tied = _tied_names(found)
    found = [(name, tensor) for name, tensor in found if name not in tied]
    buffers = _infer_buffers(found)
    infos = tuple(
        ParameterInfo(
            name=name,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            kind="buffer" if name in buffers else "parameter",
            index=index,
            execution_order=order.get(name),
        )
        for index, (name, tensor) in enumerate(found)
    )
    return ModelDescription(infos, tied, label)


def _tied_names(found: list[tuple[str, Tensor]]) -> dict[str, str]:
    """Names that share all their memory with an earlier name: the tensors were tied when they were saved."""
    first: dict[object, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in found:
        memory = memory_of(tensor)
        if memory is not None and first.setdefault(memory, name) != name:
            tied[name] = first[memory]
    return tied


def memory_of(tensor: Tensor) -> object | None:
    """What two tensors have in common if and only if they are tied: the same elements of the same memory.

    Holds while both are alive. A tensor on the meta device has a storage too, only without bytes in it, so the ties of
    a model that was never materialised, and of a file that was never read, are told as well.

    Returns:
        A value to compare; ``None`` for empty tensors, and where memory says nothing (sparse, lazy, sharded).
    """
    if tensor.layout is not torch.strided or nn.parameter.is_lazy(tensor) or tensor.numel() == 0:
        return None
    try:
        storage = tensor.untyped_storage()
        at = (storage._cdata, tensor.storage_offset()) if tensor.is_meta else (tensor.data_ptr(),)
    except (RuntimeError, NotImplementedError, ValueError):  # subclasses that wrap others have no memory of their own
        return None
    return (*at, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def _infer_buffers(found: list[tuple[str, Tensor]]) -> frozenset[str]:
    """Tell buffers of a bare state dict from the structure around them.

    Gradients need floating point, so integer and boolean tensors are buffers. A zero-dimensional integer counter
    beside one-dimensional tensors marks statistics: the vectors that are registered directly before it, after
    the (at most two) trainable vectors, are its running statistics (``running_mean``, ``running_var``). A module
    registers its parameters before its buffers, so statistics without a counter are told by their names only.
    """
    buffers: set[str] = set()
    siblings: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in found:
        siblings[name.rpartition(".")[0]].append((name, tensor))
        if not (tensor.is_floating_point() or tensor.is_complex()):
            buffers.add(name)
    for members in siblings.values():
        counters = [i for i, (_, t) in enumerate(members) if t.dim() == 0 and t.dtype == torch.int64]
        for i in counters:
            for name, tensor in members[max(0, i - 2) : i]:
                if tensor.dim() == 1:
                    buffers.add(name)
        for name, tensor in members:
            if tensor.dim() == 1 and name.rpartition(".")[2] in ("running_mean", "running_var"):
                buffers.add(name)
    return frozenset(buffers)
