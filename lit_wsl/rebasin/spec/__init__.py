"""Permutation specs: which axes of which tensors each group of units permutes."""

from lit_wsl.rebasin.spec.axis import AxisSpec, AxisUse, PermutationGroup, Permutations
from lit_wsl.rebasin.spec.spec import PermutationSpec

__all__ = ["AxisSpec", "AxisUse", "PermutationGroup", "PermutationSpec", "Permutations"]
