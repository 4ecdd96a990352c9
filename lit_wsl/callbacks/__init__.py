"""Lightning callbacks: thin shells over the functional core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_wsl.callbacks.rebasin import RebasinCallback
    from lit_wsl.callbacks.weight_transfer import WeightTransferCallback

__all__ = ["RebasinCallback", "WeightTransferCallback"]


def __getattr__(name: str) -> Any:
    if name == "WeightTransferCallback":
        from lit_wsl.callbacks.weight_transfer import WeightTransferCallback

        return WeightTransferCallback
    if name == "RebasinCallback":
        from lit_wsl.callbacks.rebasin import RebasinCallback

        return RebasinCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
