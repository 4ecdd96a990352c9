"""Git Re-Basin for any architecture: infer the permutation symmetries of a model, match, compare and merge."""

from __future__ import annotations

from lit_wsl.rebasin.apply import apply_permutation, compose_permutations, invert_permutations
from lit_wsl.rebasin.spec import AxisSpec, AxisUse, PermutationGroup, Permutations, PermutationSpec

__all__ = [
    "AxisSpec",
    "AxisUse",
    "PermutationGroup",
    "PermutationSpec",
    "Permutations",
    "apply_permutation",
    "compose_permutations",
    "invert_permutations",
]
