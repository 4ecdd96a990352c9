"""Matching two models: options, scores, alignment, and the ``WeightMapper`` face."""

from lit_wsl.mapper.options import MatchingOptions
from lit_wsl.mapper.planner import build_plan

__all__ = ["MatchingOptions", "build_plan"]
