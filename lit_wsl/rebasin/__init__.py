"""Git Re-Basin for any architecture: infer the permutation symmetries of a model, match, compare and merge."""

from __future__ import annotations

from lit_wsl.rebasin.apply import apply_permutation, compose_permutations, invert_permutations
from lit_wsl.rebasin.inference import infer_permutation_spec
from lit_wsl.rebasin.spec import AxisSpec, AxisUse, PermutationGroup, Permutations, PermutationSpec
from lit_wsl.rebasin.verify import Verification, verify_permutation_spec

__all__ = [
    "AxisSpec",
    "AxisUse",
    "PermutationGroup",
    "PermutationSpec",
    "Permutations",
    "Verification",
    "apply_permutation",
    "compose_permutations",
    "infer_permutation_spec",
    "invert_permutations",
    "verify_permutation_spec",
]
