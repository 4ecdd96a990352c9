"""Older import path of :func:`lit_wsl.checkpoint.load_checkpoint_as_dict`."""

from lit_wsl.checkpoint import load_checkpoint_as_dict

__all__ = ["load_checkpoint_as_dict"]
