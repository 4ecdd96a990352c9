"""What each kind of evidence is worth, counted on refactors that no rule was fitted to."""

from __future__ import annotations

import os
from functools import cache, lru_cache

_CHAIN = bool(os.environ.get("CHAIN"))
_REFUSED = frozenset(("order alone", "neighbour's words"))
_OPEN = frozenset(("open words", "open own name"))
_ORDER = ("path", "tied", "words", "alone", "numbers")


@cache
def may_load(cell: str) -> bool:
    """Whether pairs of a kind of evidence are loaded, or stay open."""
    return cell in _OPEN if cell.startswith("open ") else cell not in _REFUSED


@lru_cache(maxsize=100_000)
def weakest(a: str, b: str) -> str:
    """The riskier of two kinds of evidence; an empty one is none."""
    if not a or not b:
        return a or b
    if _CHAIN:
        return f"{b} < {a}" if a != b else a
    return max(a, b, key=_risk)


def _risk(cell: str) -> tuple[int, str]:
    return (_ORDER.index(cell) if cell in _ORDER else len(_ORDER), cell)
