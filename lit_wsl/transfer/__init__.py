"""Plans, their operations, and how they are applied: all or nothing."""

from lit_wsl.transfer.adapt import FoldBatchNorm, NewInputChannels, PartialHead, ResizePositionEmbedding
from lit_wsl.transfer.coverage import Count, Coverage, ModuleCoverage, measure_coverage
from lit_wsl.transfer.operations import (
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
from lit_wsl.transfer.plan import Ambiguity, Candidate, PlanEntry, SideSummary, TransferPlan, Unmatched

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
