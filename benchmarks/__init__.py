"""Measurements of lit_wsl: real conversions with known truth, scale, and peers beside it. Not part of the test suite."""
