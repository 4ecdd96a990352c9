"""Errors that say what was swapped, for the arguments that users swap: models, paths, state dicts, sample calls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_wsl.errors import ArgumentTypeError, MappingError


def require_module(value: Any, argument: str) -> None:
    """Refuse what is not a model.

    Raises:
        ArgumentTypeError: With what was given, and where it belongs.
    """
    if not isinstance(value, nn.Module):
        raise ArgumentTypeError(
            f"{argument} must be a model (an nn.Module), but it is {_what(value)}.{_hint(value, argument)}"
        )


def require_state_dict(value: Any, argument: str) -> None:
    """Refuse what is not a mapping of names to tensors; errors as in :func:`require_module`."""
    if not isinstance(value, Mapping):
        hint = ""
        if isinstance(value, nn.Module):
            hint = " Use WeightMapper(source_module, target_module) for two models."
        elif isinstance(value, (str, os.PathLike)):
            hint = " Use WeightMapper.from_checkpoint(path, target_module) for a file."
        raise ArgumentTypeError(f"{argument} must map names to tensors, but it is {_what(value)}.{hint}")


def require_path(value: Any, argument: str) -> None:
    """Refuse what is not a path, and the empty path, which would be the current folder.

    Raises:
        ArgumentTypeError: If it is something else.
        MappingError: If it is empty.
    """
    if not isinstance(value, (str, os.PathLike)):
        hint = " The path comes first, then the model." if isinstance(value, nn.Module) else ""
        raise ArgumentTypeError(f"{argument} must be a path, but it is {_what(value)}.{hint}")
    if not os.fspath(value):
        raise MappingError(f"{argument} is empty. Give the path of the checkpoint.")


def require_sample(args: Any, kwargs: Any) -> None:
    """Refuse a sample call that cannot be one: a bare tensor instead of a tuple of arguments.

    Args:
        args: What was given as ``example_args``.
        kwargs: What was given as ``example_kwargs``.

    Raises:
        ArgumentTypeError: With the call that was probably meant.
    """
    if not isinstance(args, (tuple, list)):
        raise ArgumentTypeError(
            f"example_args must be a tuple of the positional arguments of one call, but it is {_what(args)}. For a "
            "single argument: example_args=(x,)."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ArgumentTypeError(
            f"example_kwargs must be a dict of keyword arguments, but it is {_what(kwargs)}: "
            'example_kwargs={"mask": mask}.'
        )


def _what(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return f"the path {os.fspath(value)!r}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Mapping):
        return f"a state dict ({type(value).__name__} of {len(value)})"
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
