"""The gauntlet: pairs of real implementations of the same network, each with a proven truth.

``python -m benchmarks.gauntlet`` scores lit_wsl and its peers on all of them; ``all_pairs()`` gives them to other code.
"""

from __future__ import annotations

from importlib import import_module

import benchmarks.torchvision_guard  # noqa: F401  (before torchvision, timm and lightning)
from benchmarks.gauntlet.pair import Pair
from benchmarks.gauntlet.truth import TruthError

_MODULES = ("pairs_vision", "pairs_language", "pairs_more", "pairs_traps", "generated", "pairs_heldout")


def all_pairs() -> list[Pair]:
    """Every pair in a fixed order; models are built from seeds that depend on the pair's name only."""
    out = [pair for module in _MODULES for pair in import_module(f"benchmarks.gauntlet.{module}").pairs()]
    names = [pair.name for pair in out]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TruthError(f"names given twice: {twice}")
    return out


__all__ = ["Pair", "TruthError", "all_pairs"]
