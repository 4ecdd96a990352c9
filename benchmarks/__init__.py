"""Measurements: real conversions with known truth, scale, and peers beside lit_wsl. Not part of the test suite."""
