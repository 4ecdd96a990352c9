"""Older import path of :class:`lit_wsl.mapper.WeightMapper`."""

from lit_wsl.mapper import WeightMapper

__all__ = ["WeightMapper"]
