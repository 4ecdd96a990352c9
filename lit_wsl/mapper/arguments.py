"""What ``WeightMapper`` makes of its arguments: sample calls, execution order, and the old model of a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lit_wsl.errors import MappingError
from lit_wsl.structure.info import ModelDescription
from lit_wsl.structure.tracing import trace_execution_order


def execution_order(module: nn.Module, dummy_input: Any, side: str) -> tuple[dict[str, int] | None, str | None]:
    """Execution order of one sample call, or none and the reason.

    Args:
        module: The model.
        dummy_input: The sample call as the user wrote it; ``None`` for none.
        side: What to call the model in the reason.
    """
    if dummy_input is None:
        return None, None
    args, kwargs = as_call(dummy_input)
    try:
        return trace_execution_order(module, args, kwargs), None
    except Exception as error:  # the model's own code: anything may come
        return None, (
            f"dummy_input could not be run through the {side} ({type(error).__name__}: {error}); matching goes on "
            "without execution order."
        )


def as_call(dummy_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A sample call from what users write: a dict is keyword arguments, a tuple or list positional ones.

    >>> as_call({"x": 1}), as_call((1, 2)), as_call("batch")
    (((), {'x': 1}), ((1, 2), {}), (('batch',), {}))
    """
    if isinstance(dummy_input, Mapping):
        return (), dict(dummy_input)
    if isinstance(dummy_input, (tuple, list)):
        return tuple(dummy_input), {}
    return (dummy_input,), {}


def as_module(source: ModelDescription, module: ModelDescription) -> ModelDescription:
    """The description by the module, once it is clear that the state dict is one of this module.

    Args:
        source: The state dict.
        module: The module that is said to have written it.

    Raises:
        MappingError: If a name or a shape says otherwise.
    """
    for info in source.parameters:
        if info.name not in module:
            raise MappingError(
                f"source_module is another model than the state dict: it has no tensor {info.name!r} of shape "
                f"{info.shape}. Pass the model that wrote the state dict, or leave source_module out."
            )
        if module[info.name].shape != info.shape:
            raise MappingError(
                f"source_module is another model than the state dict: {info.name!r} is {module[info.name].shape} there "
                f"and {info.shape} in the state dict. Build it with the sizes it was trained with."
            )
    return module
