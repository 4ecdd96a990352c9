"""Matching two models: options, scores, alignment, and the ``WeightMapper`` face."""

from lit_wsl.mapper.options import MatchingOptions
from lit_wsl.mapper.planner import build_plan
from lit_wsl.mapper.result import MappingResult
from lit_wsl.mapper.weight_mapper import WeightMapper

__all__ = ["MappingResult", "MatchingOptions", "WeightMapper", "build_plan"]
