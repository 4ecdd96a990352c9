"""Git Re-Basin for any architecture: infer the permutation symmetries of a model, match, compare and merge."""

from __future__ import annotations

from lit_wsl.rebasin.inference import trace as tracing  # noqa: F401  (the module's older name)
from lit_wsl.rebasin.inference.infer import infer_permutation_spec
from lit_wsl.rebasin.inference.verify import Verification, verify_permutation_spec
from lit_wsl.rebasin.matching.activations import activation_matching, best_matching, joint_matching, midpoint_gap
from lit_wsl.rebasin.matching.many import match_many
from lit_wsl.rebasin.matching.weights import (
    MatchingResult,
    apply_permutation_to_task_vectors,
    task_vector,
    weight_matching,
    weight_matching_for_task_vectors,
)
from lit_wsl.rebasin.merging.merge import (
    InterpolationBarrier,
    InterpolationCurve,
    average,
    interpolate,
    interpolation_curve,
    repair,
    slerp,
    task_arithmetic,
    ties,
)
from lit_wsl.rebasin.merging.rebase import RebaseResult, rebase
from lit_wsl.rebasin.responses import reestimate_batchnorm
from lit_wsl.rebasin.spec.axis import AxisSpec, AxisUse, PermutationGroup, Permutations
from lit_wsl.rebasin.spec.builder import PermutationSpecBuilder
from lit_wsl.rebasin.spec.registry import permutation_spec, register_permutation_spec, registered_permutation_specs
from lit_wsl.rebasin.spec.spec import (
    PermutationSpec,
    Proof,
    apply_permutation,
    compose_permutations,
    invert_permutations,
)

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
    "Proof",
    "RebaseResult",
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
    "match_many",
    "midpoint_gap",
    "permutation_spec",
    "rebase",
    "reestimate_batchnorm",
    "register_permutation_spec",
    "registered_permutation_specs",
    "repair",
    "slerp",
    "task_arithmetic",
    "task_vector",
    "ties",
    "verify_permutation_spec",
    "weight_matching",
    "weight_matching_for_task_vectors",
]
