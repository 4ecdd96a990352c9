"""Permutation symmetries found by running a model: labels of axes, rules for operations, groups, proof."""
