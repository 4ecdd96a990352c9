"""Permutations that bring one model close to another: by weights, by activations, or by both."""

from lit_wsl.rebasin.matching.weights import weight_matching

__all__ = ["weight_matching"]
