"""Permutations that bring one model close to another: by weights, by activations, or by both."""
