"""Doing it: both sides of a transfer, the plan applied all or nothing, and ranks."""

from typing import Any

from lit_wsl import plan as _plan  # under another name: an old module lit_wsl.transfer.plan may be bound here


def __getattr__(name: str) -> Any:
    """The names of :mod:`lit_wsl.plan`, which stood here before."""
    if name in _plan.__all__:
        return getattr(_plan, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
