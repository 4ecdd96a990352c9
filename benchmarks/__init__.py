"""Measurements: real conversions with known truth, scale, and peers beside lit_wsl. Not part of the test suite."""

from benchmarks import torchvision_guard as torchvision_guard  # before whatever imports torchvision
