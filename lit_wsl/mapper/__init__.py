"""The ``WeightMapper`` face of the matching: both models and their mapping, to look at before anything is done."""

from lit_wsl.mapper.weight_mapper import MappingResult, WeightMapper
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.planner import build_plan

__all__ = ["MappingResult", "MatchingOptions", "WeightMapper", "build_plan"]
