"""The two sides of a transfer, opened and described: where the weights come from, and the model they go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.errors import MappingError
from lit_wsl.structure import ModelDescription, ParameterInfo, describe, trace_execution_order
from lit_wsl.structure.execution_order import is_lazy, lazy_copy, meta_copy, on_meta, only_child
from lit_wsl.structure.preserving import preserved_rng

IN_ONE = (
    "A sharded model is run as a copy on the meta device; where the order is needed, make the plan in one process and "
    "give it as plan="
)

Source = str | Path | Mapping[str, Tensor] | nn.Module
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def open_source(source: Source, checkpoint_weights: Literal["auto", "model", "ema"] = "auto") -> Mapping[str, Tensor]:
    """The tensors of a source by name; files are opened lazily and without running code.

    Raises:
        CheckpointError: If the file cannot be read.
        MappingError: If it is nothing of the kind.
    """
    if isinstance(source, nn.Module):
        return {n: t.detach() for n, t in source.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    if isinstance(source, (str, Path)):
        return open_checkpoint(source, weights=checkpoint_weights)
    if isinstance(source, Mapping):
        return source
    raise MappingError(f"source must be a path, a state dict or a module, not {type(source).__name__}.")


def describe_target(model: nn.Module, samples: Sequence[Call] = ()) -> tuple[ModelDescription, str, Call | None]:
    """Describe the model, with execution order if a sample call works.

    Returns:
        The description; a remark for the report if no sample call worked, empty otherwise; the call that worked.

    Raises:
        MappingError: If the model has lazy modules, whose shapes only a sample call tells, and none works.
    """
    lazy = is_lazy(model)
    failures: list[str] = []
    for args, kwargs in samples:
        try:
            whole = materialise(lazy_copy(model), args, kwargs) if lazy else model
            order = _trace(whole, args, kwargs)
            return describe(whole, execution_order=order, label=type(model).__name__), "", (args, kwargs)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
    if lazy:
        names = [n for n, t in model.state_dict(keep_vars=True).items() if nn.parameter.is_lazy(t)]
        raise MappingError(
            f"{', '.join(names)} belong{'' if len(names) > 1 else 's'} to lazy modules and have no shape yet, and "
            f"{f'the sample call failed ({failures[0]})' if failures else 'there is no sample'}. Give a sample that "
            "works (example_args, example_input_array, or a datamodule), or call the model once before the transfer."
        )
    remark = f"no execution order, matched without it: the sample call failed ({failures[0]})" if failures else ""
    return describe(model), remark, None


def describe_sharded(model: nn.Module, samples: Sequence[Call]) -> tuple[ModelDescription, str]:
    """Describe a sharded model, with the execution order of a whole copy of it on the meta device.

    Returns:
        The description; a remark for the report if no sample call worked, empty otherwise.
    """
    try:
        traced, remark, _ = describe_target(meta_copy(model), on_meta(samples))
    except Exception as error:  # modules that cannot be copied so
        return describe(model), f"no execution order, matched without it: {type(error).__name__}: {error}. {IN_ONE}"
    order = {info.name: info.execution_order for info in traced.parameters if info.execution_order is not None}
    return describe(model, execution_order=order), f"{remark}. {IN_ONE}" if remark else ""


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Execution order; of a model without a forward of its own, through the child that holds its parameters."""
    try:
        return trace_execution_order(model, args, kwargs)
    except NotImplementedError:
        path = only_child(model)
        if path is None:
            raise
        order = _trace(model.get_submodule(path), args, kwargs)
        return {f"{path}.{name}": place for name, place in order.items()}


def materialise(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    """Give the lazy modules of a model their shapes by one call, in eval mode and with the generators put back."""
    modes = [(sub, sub.training) for sub in model.modules()]
    with preserved_rng(model), torch.no_grad():
        try:
            model.eval()(*args, **kwargs)
        finally:
            for sub, training in modes:
                sub.training = training
    return model


def describe_source(
    tensors: Mapping[str, Tensor],
    source: Source,
    module: nn.Module | None = None,
    samples: Sequence[Call] = (),
) -> ModelDescription:
    """Describe the checkpoint's side, with what its module knows where there is one.

    Args:
        tensors: The checkpoint's tensors.
        source: What they were opened from.
        module: The module they belong to, under the same names (:func:`module_of_source`).
        samples: Ways to call the model; where the module takes one of them too, its execution order is read.
    """
    label = str(source) if isinstance(source, (str, Path)) else None
    if module is None:
        return describe(tensors, label=label)
    described, _, _ = describe_target(module, samples)
    if module is source:
        return described
    file, known = describe(tensors, label=label), described.by_name

    def with_facts(info: ParameterInfo) -> ParameterInfo:
        fact = known.get(info.name)
        if fact is None:
            return info
        return replace(info, kind=fact.kind, execution_order=fact.execution_order, module_type=fact.module_type)

    return replace(file, parameters=tuple(with_facts(info) for info in file.parameters), is_module=True)


def module_of_source(tensors: Mapping[str, Tensor], source: Source, old: nn.Module | None) -> nn.Module | None:
    """The module the weights belong to, under their names: the source itself, or what the user still has of it.

    A checkpoint may have been saved of the module, of a wrapper around it, or of a part of it; so the module is
    wrapped, or its part taken, until the names agree.

    Raises:
        MappingError: If ``old`` is not the module the checkpoint was saved from.
    """
    if old is None:
        return source if isinstance(source, nn.Module) else None
    file = describe(tensors, label=str(source) if isinstance(source, (str, Path)) else None)
    found = _named_as(file, old)
    for info in describe(found).parameters:
        if info.name in file and file[info.name].shape != info.shape:
            raise MappingError(
                f"source_module is not the module that {file.label} was saved from: {info.name} is {info.shape} in the "
                f"module and {file[info.name].shape} in the file."
            )
    return found


def _named_as(file: ModelDescription, old: nn.Module) -> nn.Module:
    names = [info.name for info in describe(old).parameters if info.kind == "parameter"] or list(old.state_dict())
    if all(name in file for name in names):
        return old
    for longer in (info.name for info in file.parameters):
        if longer.endswith("." + names[0]):
            prefix = longer[: -len(names[0]) - 1]
            if all(f"{prefix}.{name}" in file for name in names):
                return _Under(old, prefix)
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
