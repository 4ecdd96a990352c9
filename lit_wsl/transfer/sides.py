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
from lit_wsl.structure import ModelDescription, describe, trace_execution_order
from lit_wsl.structure.preserving import preserved_rng
from lit_wsl.structure.tracing import is_lazy, lazy_copy, only_child

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
    old: nn.Module | None = None,
    samples: Sequence[Call] = (),
) -> ModelDescription:
    """Describe the checkpoint's side, from its module where there is one.

    Raises:
        MappingError: If ``old`` is not the module the checkpoint was saved from.
    """
    label = str(source) if isinstance(source, (str, Path)) else None
    module = source if isinstance(source, nn.Module) else old
    if module is None:
        return describe(tensors, label=label)
    described, _, _ = describe_target(module, samples)
    described = replace(described, label=label or described.label)
    if old is None or source is old:
        return described
    return _under_the_names_of(described, describe(tensors, label=label))


def _under_the_names_of(module: ModelDescription, file: ModelDescription) -> ModelDescription:
    """The module's description under the checkpoint's names, which may carry or lack a prefix."""
    if all(info.name in file for info in module.parameters if info.kind == "parameter"):
        prefix = ""
    else:
        first = module.parameters[0].name
        found = [i.name[: -len(first)] for i in file.parameters if i.name.endswith("." + first)]
        prefix = next((p for p in found if all(p + i.name in file for i in module.parameters)), "")
        if not prefix:
            lacking = next(i.name for i in module.parameters if i.name not in file)
            raise MappingError(
                f"source_module is not the module that {file.label} was saved from: the file has no {lacking!r}."
            )
    known = {prefix + info.name: info for info in module.parameters}
    wrong = next((i for i in file.parameters if i.name in known and known[i.name].shape != i.shape), None)
    if wrong is not None:
        raise MappingError(
            f"source_module is not the module that {file.label} was saved from: {wrong.name} is "
            f"{known[wrong.name].shape} in the module and {wrong.shape} in the file."
        )
    return replace(
        file,
        parameters=tuple(
            replace(
                info,
                kind=known[info.name].kind,
                execution_order=known[info.name].execution_order,
                module_type=known[info.name].module_type,
            )
            if info.name in known
            else info
            for info in file.parameters
        ),
        is_module=True,
    )
