"""Older import path of :class:`lit_wsl.renamer.WeightRenamer`."""

from lit_wsl.renamer import WeightRenamer

__all__ = ["WeightRenamer"]
