"""Doing it: both sides of a transfer, the plan applied all or nothing, ranks, and the minimum coverage."""

from typing import Any

from lit_wsl import plan


def __getattr__(name: str) -> Any:
    """The names of :mod:`lit_wsl.plan`, which stood here before."""
    if name in plan.__all__:
        return getattr(plan, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
