"""Git Re-Basin for any architecture: infer the permutation symmetries of a model, match, compare and merge."""

from __future__ import annotations

from lit_wsl.rebasin.activation import activation_matching
from lit_wsl.rebasin.apply import apply_permutation, compose_permutations, invert_permutations
from lit_wsl.rebasin.barrier import InterpolationBarrier, InterpolationCurve, interpolation_curve
from lit_wsl.rebasin.batch_statistics import reestimate_batchnorm
from lit_wsl.rebasin.best import best_matching, midpoint_gap
from lit_wsl.rebasin.builder import PermutationSpecBuilder
from lit_wsl.rebasin.inference import infer_permutation_spec
from lit_wsl.rebasin.joint import joint_matching
from lit_wsl.rebasin.matching import MatchingResult, weight_matching
from lit_wsl.rebasin.merging import average, interpolate, task_arithmetic
from lit_wsl.rebasin.registry import permutation_spec, register_permutation_spec, registered_permutation_specs
from lit_wsl.rebasin.repair import repair
from lit_wsl.rebasin.spec import AxisSpec, AxisUse, PermutationGroup, Permutations, PermutationSpec
from lit_wsl.rebasin.task_vectors import (
    apply_permutation_to_task_vectors,
    task_vector,
    weight_matching_for_task_vectors,
)
from lit_wsl.rebasin.verify import Verification, verify_permutation_spec

__all__ = [
    "AxisSpec",
    "AxisUse",
    "InterpolationBarrier",
    "InterpolationCurve",
    "MatchingResult",
    "PermutationGroup",
    "PermutationSpec",
    "PermutationSpecBuilder",
    "Permutations",
    "Verification",
    "activation_matching",
    "apply_permutation",
    "apply_permutation_to_task_vectors",
    "average",
    "best_matching",
    "compose_permutations",
    "infer_permutation_spec",
    "interpolate",
    "interpolation_curve",
    "invert_permutations",
    "joint_matching",
    "midpoint_gap",
    "permutation_spec",
    "reestimate_batchnorm",
    "register_permutation_spec",
    "registered_permutation_specs",
    "repair",
    "task_arithmetic",
    "task_vector",
    "verify_permutation_spec",
    "weight_matching",
    "weight_matching_for_task_vectors",
]
