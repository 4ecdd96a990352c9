"""Permutation symmetries found by running a model: labels of axes, rules for operations, groups, proof."""

from lit_wsl.rebasin.inference.infer import infer_permutation_spec

__all__ = ["infer_permutation_spec"]
