"""A whole checkpoint to its new code: weights, optimizers, and resuming training."""
