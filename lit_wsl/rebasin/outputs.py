"""Which of the tensors that a model returns must stay as they are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

from torch import Tensor

from lit_wsl.errors import RebasinError

Outputs: TypeAlias = Callable[[Any], Any]

INTERNAL = ("hidden_state", "hidden_states", "attentions", "past_key_values")
"""Last words of the names under which models return what goes on inside of them beside their answer."""


class MainOutputs:
    """Picks a model's answer from what it returns: all floating tensors, but hidden states only where nothing else is.

    A mapping or dataclass may carry hidden states, attention maps and caches beside the logits. If they had to stay as
    they are, no unit of the residual stream could be permuted. They are known by name and passed over, unless they are
    all there is (then they are the answer). Scalars, such as a loss, say nothing of the order of units.

    >>> import torch
    >>> pick = MainOutputs()
    >>> picked = pick({"loss": torch.tensor(1.0), "logits": torch.ones(2, 3), "hidden_states": (torch.ones(2, 4),)})
    >>> [tuple(t.shape) for t in picked], sorted(pick.ignored)
    ([(2, 3)], ['hidden_states'])
    >>> [tuple(t.shape) for t in pick((torch.ones(1, 2), {"last_hidden_state": torch.ones(1, 4)}))]
    [(1, 2)]

    Attributes:
        ignored: Names of what was passed over in the last call.
    """

    def __init__(self) -> None:
        self.ignored: set[str] = set()

    def __call__(self, output: Any) -> list[Tensor]:
        """The tensors that count."""
        found = [(names, t) for names, t in _named(output) if t.is_floating_point() and t.ndim]
        inner = [any(name.endswith(INTERNAL) for name in names) for names, _ in found]
        if all(inner):
            self.ignored = set()
            return [tensor for _, tensor in found]
        self.ignored = {next(n for n in names if n.endswith(INTERNAL)) for (names, _), i in zip(found, inner) if i}
        return [tensor for (_, tensor), i in zip(found, inner) if not i]


def _named(value: Any, names: tuple[str, ...] = (), depth: int = 6) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield names, value
    elif not depth:
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, (*names, str(key)), depth - 1)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, item in zip(value._fields, value):
            yield from _named(item, (*names, key), depth - 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _named(item, names, depth - 1)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from _named(getattr(value, item.name), (*names, item.name), depth - 1)


def resolve_outputs(given: Outputs | str | None) -> Outputs | None:
    """The function that an import path names, ``package.module.name`` or ``package.module:name``.

    >>> resolve_outputs("operator.itemgetter") is __import__("operator").itemgetter
    True

    Raises:
        RebasinError: It is not there, or cannot be called.
    """
    if not isinstance(given, str):
        if given is not None and not callable(given):
            raise RebasinError(f"outputs={given!r} is neither a function nor the import path of one")
        return given
    place, _, name = given.rpartition(":" if ":" in given else ".")
    try:
        found: Any = importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise RebasinError(f"outputs={given!r} cannot be imported: {error}") from error
    if not callable(found):
        raise RebasinError(f"outputs={given!r} is a {type(found).__name__}, not a function")
    return found
