"""The plan of a transfer as data: operations, entries, coverage, and the file it is saved in."""

from lit_wsl.plan.coverage import Count, Coverage, ModuleCoverage, measure_coverage
from lit_wsl.plan.entries import Ambiguity, Candidate, PlanEntry, SideSummary, Unmatched
from lit_wsl.plan.operations import (
    Cast,
    Concat,
    FanOut,
    Operation,
    Permute,
    Reshape,
    Split,
    Stack,
    Tie,
    Transpose,
    Unstack,
)
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.plan.value_changing import FoldBatchNorm, NewInputChannels, PartialHead, ResizePositionEmbedding

__all__ = [
    "Ambiguity",
    "Candidate",
    "Cast",
    "Concat",
    "Count",
    "Coverage",
    "FanOut",
    "FoldBatchNorm",
    "ModuleCoverage",
    "NewInputChannels",
    "Operation",
    "PartialHead",
    "Permute",
    "PlanEntry",
    "Reshape",
    "ResizePositionEmbedding",
    "SideSummary",
    "Split",
    "Stack",
    "Tie",
    "TransferPlan",
    "Transpose",
    "Unmatched",
    "Unstack",
    "measure_coverage",
]
