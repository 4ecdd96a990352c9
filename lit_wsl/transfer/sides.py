"""The two sides of a transfer, opened and described: where the weights come from, and the model they go to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.errors import ArgumentTypeError, MappingError, reason
from lit_wsl.structure import ModelDescription, ParameterInfo, describe, trace_execution_order
from lit_wsl.structure.description import (
    kinds_and_types,
    refuse_whole_checkpoint,
    require_path,
    require_state_dict,
    what_it_is,
)
from lit_wsl.structure.execution_order import (
    first_call,
    is_lazy,
    lazy_copy,
    meta_copy,
    on_meta,
    only_child,
    take_shapes,
)
from lit_wsl.structure.families import prefixes
from lit_wsl.structure.running import Call, has_sharded_tensors
from lit_wsl.transfer.memory import shown

IN_ONE = (
    "A sharded model is run as a copy on the meta device; where the order is needed, make the plan in one process and "
    "give it as plan="
)

OLD_MODEL = " It is the old model itself, where its code is still at hand."

Given = str | Path | Mapping[str, Tensor] | nn.Module
Which = Literal["auto", "model", "ema"]
Run = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], dict[str, int]]


@dataclass(frozen=True)
class Source:
    """Where the weights come from: opened once, described once."""

    given: Given  # what it was opened from; a module tells more of its structure than its tensors do
    # the tensors by name; those of a file are read when they are asked for
    tensors: Mapping[str, Tensor] = field(repr=False)
    # the module they were saved from, where the user still has it
    old: nn.Module | None = field(default=None, repr=False)
    # ways to call the model to fill; where the source's module takes one too, its order is read
    samples: Sequence[Call] = field(default=(), repr=False)

    @classmethod
    def open(
        cls,
        given: Given,
        checkpoint_weights: Which = "auto",
        *,
        old: nn.Module | None = None,
        samples: Sequence[Call] = (),
    ) -> Source:
        """Open a source; files are opened lazily and without running code."""
        if isinstance(given, nn.Module):
            state = given.state_dict(keep_vars=True)
            tensors: Mapping[str, Tensor] = {n: t.detach() for n, t in state.items() if isinstance(t, Tensor)}
        elif isinstance(given, (str, os.PathLike)):
            require_path(given, "source")
            tensors = open_checkpoint(given, weights=checkpoint_weights)
        elif isinstance(given, Mapping):
            refuse_whole_checkpoint(given, "source")
            require_state_dict(given, "source")
            tensors = given
        else:
            hint = f" Make one first: {given.__name__}()." if isinstance(given, type) else ""
            what = what_it_is(given)
            raise ArgumentTypeError(f"source must be a path, a state dict or a module, but it is {what}.{hint}")
        return cls(given, tensors, old, samples)

    @property
    def label(self) -> str | None:
        """What to call it in messages, and in files that others read: no absolute path of this machine."""
        return shown(self.given) if isinstance(self.given, (str, os.PathLike)) else None

    @cached_property
    def module(self) -> nn.Module | None:
        """The module that the weights belong to, under their names: the source itself, or what the user has of it.

        A checkpoint may have been saved of the module, of a wrapper around it, or of a part of it; so the module is
        wrapped, or its part taken, until the names agree.
        """
        if self.old is None:
            return self.given if isinstance(self.given, nn.Module) else None
        found = _named_as(self.file, self.old)
        for name, tensor in found.state_dict(keep_vars=True).items():
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor) else None
            if shape is not None and name in self.file and self.file[name].shape != shape:
                raise MappingError(
                    f"source_module is not the module that {self.file.label} was saved from: {name} is {shape} in the "
                    f"module and {self.file[name].shape} in the file."
                )
        return found

    @cached_property
    def description(self) -> ModelDescription:
        """Its tensors, with what the module knows of them where there is one."""
        if self.module is None:
            return self.file
        if self.module is self.given:
            return Target.of(self.module, self.samples).description
        _, order, _ = _run_samples(self.module, self.samples)
        facts = kinds_and_types(self.module)

        def with_facts(info: ParameterInfo) -> ParameterInfo:
            if info.name not in facts:
                return info
            kind, module_type = facts[info.name]
            return replace(info, kind=kind, execution_order=order.get(info.name), module_type=module_type)

        file = self.file
        return replace(file, parameters=tuple(with_facts(info) for info in file.parameters), is_module=True)

    @cached_property
    def file(self) -> ModelDescription:
        """Its tensors alone."""
        return describe(self.tensors, label=self.label)


@dataclass(frozen=True)
class Target:
    """The model to fill, described once."""

    model: nn.Module = field(repr=False)
    description: ModelDescription = field(repr=False)  # its tensors, with the execution order if a sample call works
    samples: Sequence[Call] = field(default=(), repr=False)  # ways to call it, the likeliest first
    remark: str = ""  # why there is no execution order although there are samples; empty otherwise
    # of a model with lazy modules, the copy that has its shapes
    shaped: nn.Module | None = field(default=None, repr=False)

    @classmethod
    def of(cls, model: nn.Module, samples: Sequence[Call] = ()) -> Target:
        """Describe a model; a sharded one with the execution order of a whole copy of it on the meta device."""
        if samples and has_sharded_tensors(model):
            order, remark = _order_of_sharded(model, samples)
            return cls(model, describe(model, execution_order=order), samples, f"{remark}. {IN_ONE}" if remark else "")
        whole, order, remark = _run_samples(model, samples)
        described = describe(whole, execution_order=order, label=type(model).__name__ if whole is not model else None)
        return cls(model, described, samples, remark, None if whole is model else whole)

    def materialise(self) -> Callable[[], None]:
        """Give lazy modules the shapes that the sample call has shown; what makes them lazy again."""
        if self.shaped is None or not is_lazy(self.model):
            return lambda: None
        return take_shapes(self.model, self.shaped)


def _run_samples(model: nn.Module, samples: Sequence[Call]) -> tuple[nn.Module, dict[str, int], str]:
    """The model, or its copy with shapes, its order on the first sample that it takes, and why there is none."""
    lazy = is_lazy(model)
    failures: list[str] = []
    for args, kwargs in samples:
        try:
            whole = lazy_copy(model) if lazy else model
            order = _trace(first_call if lazy else trace_execution_order, whole, args, kwargs)
            if not is_lazy(whole):
                return whole, order, ""
            failures.append("it does not call them")
        except Exception as error:
            failures.append(reason(error))
    if lazy:
        names = [n for n, t in model.state_dict(keep_vars=True).items() if nn.parameter.is_lazy(t)]
        raise MappingError(
            f"{', '.join(names)} belong{'' if len(names) > 1 else 's'} to lazy modules and have no shape yet, and "
            f"{f'the sample call failed ({failures[0]})' if failures else 'there is no sample'}. Give a sample that "
            "works (example_args, example_input_array, or a datamodule), or call the model once before the transfer."
        )
    remark = f"no execution order, matched without it: the sample call failed ({failures[0]})" if failures else ""
    return model, {}, remark


def _order_of_sharded(model: nn.Module, samples: Sequence[Call]) -> tuple[dict[str, int], str]:
    """The execution order of a whole copy on the meta device, and a remark if no sample call worked."""
    try:
        _, order, remark = _run_samples(meta_copy(model), on_meta(samples))
    except Exception as error:  # modules that cannot be copied so
        return {}, f"no execution order, matched without it: {type(error).__name__}: {error}"
    return order, remark


def _trace(run: Run, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Execution order; of a model without a forward of its own, through the child that holds its parameters."""
    try:
        return run(model, args, kwargs)
    except NotImplementedError:
        path = only_child(model)
        if path is None:
            raise
        order = _trace(run, model.get_submodule(path), args, kwargs)
        return {f"{path}.{name}": place for name, place in order.items()}


def _named_as(file: ModelDescription, old: nn.Module) -> nn.Module:
    names = [name for name, _ in old.named_parameters()] or list(old.state_dict())
    if all(name in file for name in names):
        return old
    for prefix in prefixes(names, {**file.by_name, **file.tied}):
        return _Under(old, prefix.removesuffix("."))
    for longer in names:
        if longer.endswith("." + file.parameters[0].name):
            prefix = longer[: -len(file.parameters[0].name) - 1]
            if all(name.removeprefix(f"{prefix}.") in file for name in names if name.startswith(f"{prefix}.")):
                return old.get_submodule(prefix)
    lacking = next(name for name in names if name not in file)
    raise MappingError(
        f"source_module is not the module that {file.label} was saved from: the file has no {lacking!r}."
    )


class _Under(nn.Module):
    """A module some levels deeper, so that its names carry a prefix; called as the module itself."""

    def __init__(self, inner: nn.Module, path: str) -> None:
        super().__init__()
        parent: nn.Module = self
        *above, last = path.split(".")
        for name in above:
            child = nn.Module()
            parent.add_module(name, child)
            parent = child
        parent.add_module(last, inner)
        self._path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(self._path)(*args, **kwargs)
