"""What lit_wsl knows of one side of a transfer: names, shapes and structure, never the data.

A ``ModelDescription`` describes a module or a bare state dict alike, so matching can't tell (and needn't care) whether
the tensors live on a disk, on a GPU or on the meta device. What cannot be described, since arguments were swapped, is
refused by errors that say so.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lit_wsl.errors import ArgumentTypeError, MappingError

if TYPE_CHECKING or sys.version_info >= (3, 12):
    from functools import cached_property
else:

    class cached_property:  # noqa: N801
        """As that of Python 3.12, without the lock before it: with it planning 291 tensors takes 3 % longer."""

        def __init__(self, compute: Callable[[Any], Any]) -> None:
            self.compute = compute
            self.__doc__ = compute.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self.name = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            value = instance.__dict__[self.name] = self.compute(instance)
            return value


def require_module(value: Any, argument: str, hint: str | None = None) -> None:
    """Refuse what is not a model; the hint says what was probably meant, if the argument's name doesn't."""
    if not isinstance(value, nn.Module):
        meant = _hint(value, argument) if hint is None else hint
        raise ArgumentTypeError(f"{argument} must be a model (an nn.Module), but it is {what_it_is(value)}.{meant}")


def require_state_dict(value: Any, argument: str, *, module: str = "", path: str = "") -> None:
    """Refuse what is not a mapping of names to tensors, and say what to do with a module or a path instead."""
    if not isinstance(value, Mapping):
        hint = ""
        if isinstance(value, nn.Module):
            hint = f" {module or 'Give its state dict: model.state_dict()'}."
        elif isinstance(value, (str, os.PathLike)):
            hint = f" {path or 'Give its tensors: load_checkpoint_as_dict(path)'}."
        raise ArgumentTypeError(f"{argument} must map names to tensors, but it is {what_it_is(value)}.{hint}")
    for name in value:
        if not isinstance(name, str):
            raise ArgumentTypeError(f"{argument} must map names to tensors, but it has the key {name!r}, no text.")


def refuse_whole_checkpoint(value: Mapping[Any, Any], argument: str) -> None:
    """Refuse what ``torch.load`` gives where its state dict is meant, and name the entry that is one."""

    def has_tensors(mapping: Mapping[Any, Any]) -> bool:
        return any(isinstance(item, Tensor) for item in mapping.values())

    inner = [name for name, item in value.items() if isinstance(item, Mapping) and has_tensors(item)]
    if inner and not has_tensors(value):
        raise MappingError(
            f"{argument} is a whole checkpoint, not a state dict: give the path of its file, or "
            f"{argument}[{inner[0]!r}]."
        )


def require_batches(value: Any) -> None:
    """Refuse what gives no batches, and a single batch."""
    many = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if isinstance(value, (Tensor, str, Mapping)) or not many:
        hint = " For a single batch: batches=[x]." if isinstance(value, (Tensor, Mapping)) else ""
        raise ArgumentTypeError(
            f"batches must be a DataLoader or a list of batches, but it is {what_it_is(value)}.{hint}"
        )


def require_state_dicts(values: Any, argument: str) -> None:
    """Refuse what is not a list of state dicts."""
    if isinstance(values, (Mapping, nn.Module, str, os.PathLike)):
        raise ArgumentTypeError(
            f"{argument} must be a list of state dicts, but it is {what_it_is(values)}. Put it in a list, also if it "
            "is the only one."
        )
    for number, value in enumerate(values):
        require_state_dict(value, f"{argument}[{number}]")


def require_path(value: Any, argument: str) -> None:
    """Refuse what is not a path, and the empty path, which would be the current folder."""
    if not isinstance(value, (str, os.PathLike)):
        hint = ""
        if isinstance(value, nn.Module) and argument == "checkpoint_path":
            hint = " The path comes first, then the model."
        elif argument == "plan" and hasattr(value, "plan"):
            hint = " Its plan is its attribute: plan=result.plan."
        raise ArgumentTypeError(f"{argument} must be a path, but it is {what_it_is(value)}.{hint}")
    if not os.fspath(value):
        what = "a plan" if argument == "plan" else "the checkpoint"
        raise MappingError(f"{argument} is empty. Give the path of {what}.")


def require_sample(args: Any, kwargs: Any) -> None:
    """Refuse a sample call that cannot be one (a bare tensor, no tuple of arguments), with the one probably meant."""
    if not isinstance(args, (tuple, list)):
        raise ArgumentTypeError(
            f"example_args must be a tuple of the positional arguments of one call, but it is {what_it_is(args)}. For "
            "a single argument: example_args=(x,)."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ArgumentTypeError(
            f"example_kwargs must be a dict of keyword arguments, but it is {what_it_is(kwargs)}: "
            'example_kwargs={"mask": mask}.'
        )


def what_it_is(value: Any) -> str:
    """A value in a few words, for errors about arguments."""
    if isinstance(value, (str, Path)):
        return f"the path {os.fspath(value)!r}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Mapping):
        kind = "a state dict" if any(isinstance(item, Tensor) for item in value.values()) else "a mapping"
        return f"{kind} ({type(value).__name__} of {len(value)})"
    return "None" if value is None else f"of the type {type(value).__name__}"


def _hint(value: Any, argument: str) -> str:
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f" Make one first: {value.__name__}()."
    if not isinstance(value, (str, os.PathLike, Mapping)):
        return ""
    if argument == "model":
        return " The arguments may be swapped: the model comes first, then the checkpoint."
    if argument == "target_module":
        return " The arguments may be swapped: the source comes first, then the target model."
    way = "from_state_dict(state_dict" if isinstance(value, Mapping) else "from_checkpoint(path"
    return f" Without the old model use WeightMapper.{way}, target_module)."


Shape = tuple[int, ...]
Kind = Literal["parameter", "buffer"]


def shape_text(shape: Sequence[int]) -> str:
    """A shape as people write it.

    >>> shape_text((64, 3, 7, 7)), shape_text(()), shape_text((5,))
    ('64x3x7x7', 'scalar', '5')
    """
    return "x".join(map(str, shape)) or "scalar"


def dtype_text(dtype: torch.dtype) -> str:
    """A kind of number as people write it: ``float32``."""
    return str(dtype).removeprefix("torch.")


_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@lru_cache(maxsize=4096)  # a model of many tensors has few shapes
def core(shape: Shape) -> Shape:
    """A shape without axes of size one."""
    return tuple(size for size in shape if size != 1)


def tokenize(name: str) -> tuple[str, ...]:
    """Cut a dotted name into lower-case words and numbers.

    >>> tokenize("encoder.layer1.selfAttn.q_proj")
    ('encoder', 'layer', '1', 'self', 'attn', 'q', 'proj')
    """
    return tuple(token.lower() for token in _TOKEN.findall(name))


@dataclass(frozen=True)
class ParameterInfo:
    """One tensor of a model, described.

    Attributes:
        name: Full dotted name in the state dict, e.g. ``"encoder.0.conv.weight"``.
        shape: The tensor's shape.
        dtype: The tensor's data type.
        kind: ``"parameter"`` (trainable weights) or ``"buffer"`` (running statistics, counters, tables).
        index: Place in registration order, i.e. in the state dict, from 0.
        execution_order: Place in the order in which a sample call first used the tensor's module (or the tensor
            itself), from 0; ``None`` where no sample was run or the sample never reached it.
        module_type: Class name of the owning module, ``""`` where only a state dict is known.
    """

    name: str
    shape: Shape
    dtype: torch.dtype = torch.float32
    kind: Kind = "parameter"
    index: int = 0
    execution_order: int | None = None
    module_type: str = ""

    @cached_property
    def module_path(self) -> str:
        """Dotted path of the owning module; ``""`` for the root."""
        return self.name.rpartition(".")[0]

    @cached_property
    def leaf(self) -> str:
        """Last component of the name: ``weight``, ``bias``, ``running_mean``..."""
        return self.name.rpartition(".")[2]

    @property
    def depth(self) -> int:
        """Number of modules above the tensor; 0 for a tensor of the root."""
        return self.name.count(".")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def counts(self) -> bool:
        """Whether it is a number that counts something, as ``num_batches_tracked`` does."""
        return not self.shape and not self.dtype.is_floating_point and not self.dtype.is_complex

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The name cut into lower-case words and numbers, see :func:`tokenize`."""
        return tokenize(self.name)


@dataclass(frozen=True)
class ParameterGroup:
    """The tensors of one module, without those of its children.

    Attributes:
        module_path: Dotted path of the module; ``""`` for the root.
        members: The module's own tensors in registration order.
    """

    module_path: str
    members: tuple[ParameterInfo, ...]

    @property
    def module_type(self) -> str:
        """Class name of the module, ``""`` where only a state dict is known."""
        return self.members[0].module_type if self.members else ""

    @property
    def parameters(self) -> tuple[ParameterInfo, ...]:
        """The trainable members."""
        return tuple(m for m in self.members if m.kind == "parameter")

    @property
    def buffers(self) -> tuple[ParameterInfo, ...]:
        """The members that are buffers."""
        return tuple(m for m in self.members if m.kind == "buffer")

    @property
    def execution_order(self) -> int | None:
        """The earliest execution order among the members, ``None`` if none was reached."""
        orders = [m.execution_order for m in self.members if m.execution_order is not None]
        return min(orders, default=None)

    @property
    def numel(self) -> int:
        """Number of elements of all members."""
        return sum(m.numel for m in self.members)


@dataclass(frozen=True)
class ModuleNode:
    """A node of the hierarchy: one module (or path prefix of a state dict) with its own tensors and its children.

    Attributes:
        name: Last component of the path; ``""`` for the root.
        path: Full dotted path; ``""`` for the root.
        group: The module's own tensors, possibly none.
        children: Sub-modules that hold tensors somewhere below, in registration order.
    """

    name: str
    path: str
    group: ParameterGroup
    children: tuple[ModuleNode, ...] = ()

    def walk(self) -> Iterator[ModuleNode]:
        """Yield this node and all below it, parents first, in registration order."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))


@dataclass(frozen=True)
class ModelDescription:
    """One side of a transfer: all tensors of a model in registration order.

    Attributes:
        parameters: Every tensor once, parameters and buffers, in registration order. Of tied tensors only the
            first name is listed.
        tied: Further names of tied tensors: alias -> the name listed in ``parameters``.
        label: What to call this side in messages: a file's path or a class name.
        is_module: Whether it was read from an ``nn.Module`` (kinds and classes are facts), or from a bare state
            dict (kinds are inferred).
    """

    parameters: tuple[ParameterInfo, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    label: str = "model"
    is_module: bool = False

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, name: str) -> ParameterInfo:
        return self.by_name[self.tied.get(name, name)]

    def __contains__(self, name: object) -> bool:
        return name in self.by_name or name in self.tied

    @cached_property
    def by_name(self) -> dict[str, ParameterInfo]:
        """The tensors by name, aliases of tied tensors not included."""
        return {info.name: info for info in self.parameters}

    @cached_property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """The tensors by owning module, in order of first appearance."""
        members: dict[str, list[ParameterInfo]] = {}
        for info in self.parameters:
            members.setdefault(info.module_path, []).append(info)
        return tuple(ParameterGroup(path, tuple(infos)) for path, infos in members.items())

    @cached_property
    def root(self) -> ModuleNode:
        """The hierarchy."""
        groups = {group.module_path: group for group in self.groups}
        return _build_node("", groups, _child_paths(groups))

    @property
    def has_execution_order(self) -> bool:
        """Whether a sample call has been traced."""
        return any(info.execution_order is not None for info in self.parameters)

    def part(self, parameters: Iterable[ParameterInfo]) -> ModelDescription:
        """What these of its tensors are alone, with their aliases."""
        kept = tuple(parameters)
        names = {info.name for info in kept}
        return replace(self, parameters=kept, tied={a: first for a, first in self.tied.items() if first in names})


def _child_paths(groups: Mapping[str, ParameterGroup]) -> dict[str, list[str]]:
    children: dict[str, list[str]] = {"": []}
    for leaf in groups:
        missing = []
        path = leaf
        while path not in children:
            missing.append(path)
            path = path.rpartition(".")[0]
        for new in reversed(missing):
            children[new] = []
            children[new.rpartition(".")[0]].append(new)
    return children


def _build_node(path: str, groups: Mapping[str, ParameterGroup], children: Mapping[str, list[str]]) -> ModuleNode:
    return ModuleNode(
        name=path.rpartition(".")[2],
        path=path,
        group=groups.get(path, ParameterGroup(path, ())),
        children=tuple(_build_node(child, groups, children) for child in children[path]),
    )


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


def kinds_and_types(module: nn.Module) -> dict[str, tuple[Kind, str]]:
    """Kind of each tensor, and class of the module that holds it, by every name it has."""
    facts: dict[str, tuple[Kind, str]] = {}
    for path, sub in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, _ in sub.named_parameters(recurse=False, remove_duplicate=False):
            facts[prefix + name] = "parameter", type(sub).__name__
        for name, _ in sub.named_buffers(recurse=False, remove_duplicate=False):
            facts[prefix + name] = "buffer", type(sub).__name__
    return facts


def _describe_module(module: nn.Module, order: Mapping[str, int], label: str) -> ModelDescription:
    facts = kinds_and_types(module)
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
        # neither: the state of a metric, or a tensor that a hook gives another name
        unknown: tuple[Kind, str] = ("parameter" if isinstance(tensor, nn.Parameter) else "buffer", "")
        kind, module_type = facts.get(name, unknown)
        shape = () if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)
        infos.append(ParameterInfo(name, shape, tensor.dtype, kind, len(infos), order.get(name), module_type))
    return ModelDescription(tuple(infos), tied, label, is_module=True)


def _describe_tensors(tensors: Mapping[str, Tensor], order: Mapping[str, int], label: str) -> ModelDescription:
    items = tensors.meta_items() if isinstance(tensors, HasMeta) else tensors.items()
    found = [(name, tensor) for name, tensor in items if isinstance(tensor, Tensor)]
    tied = _tied_names(found)
    found = [(name, tensor) for name, tensor in found if name not in tied]
    buffers = _infer_buffers(found)
    infos: list[ParameterInfo] = []
    for name, tensor in found:
        kind: Kind = "buffer" if name in buffers else "parameter"
        infos.append(ParameterInfo(name, tuple(tensor.shape), tensor.dtype, kind, len(infos), order.get(name)))
    return ModelDescription(tuple(infos), tied, label)


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
    a model that was never materialised, and of a file that was never read, are recognised too.

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
    registers its parameters before its buffers, so statistics without a counter are recognised by their names only.
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
