"""One model out of several that were aligned, and what lies between them."""

from lit_wsl.rebasin.merging.merge import average, interpolate, linear_combination, task_arithmetic

__all__ = ["average", "interpolate", "linear_combination", "task_arithmetic"]
