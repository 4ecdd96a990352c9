"""What is made of aligned models: one out of several, what lies between two, a fine-tuning on another base."""

from lit_wsl.rebasin.merging.merge import average, interpolate, linear_combination, task_arithmetic

__all__ = ["average", "interpolate", "linear_combination", "task_arithmetic"]
