"""What each kind of evidence is worth, counted on refactors that no rule was fitted to."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from math import sqrt
from pathlib import Path

RISK_LIMIT, ENOUGH = 0.05, 40  # a kind loads if it is wrong less often, with 95 % confidence, or never in so many


def may_load(cell: str) -> bool:
    """Whether pairs of a kind of evidence are loaded, or stay open."""
    right, wrong = counted(cell)
    return (right >= ENOUGH and not wrong) or bound(wrong, right + wrong) < RISK_LIMIT


@lru_cache(maxsize=100_000)
def counted(cell: str) -> tuple[int, int]:
    """How often a kind of evidence was right and wrong.

    A variety that was too rarely counted to tell (``words, other own name``) goes by the kind that it is of, with all
    the varieties of that.
    """
    row = table().get(cell, {"right": 0, "wrong": 0})
    while cell and row["right"] + row["wrong"] < ENOUGH:
        start = f"{cell}, "
        rows = [row for name, row in table().items() if name == cell or name.startswith(start)]
        row = {verdict: sum(row[verdict] for row in rows) for verdict in ("right", "wrong")}
        cell = cell.rpartition(", ")[0]
    return row["right"], row["wrong"]


@lru_cache(maxsize=100_000)
def weakest(a: str, b: str) -> str:
    """The riskier of two kinds of evidence; an empty one is none."""
    if not a or not b:
        return a or b
    return max(a, b, key=_risk)


def _risk(cell: str) -> tuple[float, str]:
    right, wrong = counted(cell)
    return bound(wrong, right + wrong), cell


def margin_of(cell: str) -> float:
    """How far a kind of evidence sets a pair apart from its rivals, 0 to 1, for those who sort by it."""
    if cell in ("path", "tied", "words", "alone", "numbers"):
        return 1.0
    return 0.2 if cell.startswith(("order", "open")) else 0.5


_TOLD = {
    "path": "the same path on both sides",
    "tied": "tied in the source to all tensors of this shape",
    "words": "their names single them out",
    "short words": "their names single them out, words being shortened",
    "half words": "their names single them out, though one side says more",
    "letters": "letters in their names single them out",
    "alone": "the only ones of this size and structure on both sides",
    "distinct shape": "matrices of a shape that nothing else has",
    "much structure": "the only ones of this structure",
    "exclusion": "the last ones left, all others being decided",
    "as in other blocks": "as in other blocks of this make",
    "both count": "told apart by a count on both sides",
    "known for one role": "their names are known for one part of one thing",
    "beside the same": "each stands beside what its siblings became",
    "order among many": "decided by order: three or more decided siblings stand alike around them",
    "order among two": "decided by order: two decided siblings stand alike around them",
    "order beside one": "decided by order: a decided sibling stands alike beside them",
    "order alone": "decided by order alone",
    "parts spelled": "the name spells the order of the parts",
    "parts formula": "queries, keys, values stand in the order of the formula",
    "parts numbered": "the parts are numbered",
    "open words": "their names agree word for word, among others of the size",
}


_VARIETIES = {
    "other inside": "with other shapes inside",
    "initials": "all names of one side are initials of those of the other",
    "last": "the last one, all others standing as in other blocks",
    "ascending": "numbers ascending on both sides",
    "unordered": "in a source without an order",
    "in order": "in order among those that names paired",
    "against order": "against the order of those that names paired",
    "in line": "in order among the others",
    "out of line": "against the order of the others",
    "reordered": "where others were reordered",
    "as elsewhere": "other levels of this kind kept their order",
    "as often elsewhere": "some other levels of this kind kept their order",
    "as somewhere else": "another level of this kind kept its order",
    "as on other levels": "levels of another kind kept their order",
}


@lru_cache(maxsize=100_000)
def told(cell: str) -> str:
    """A kind of evidence in words, and how often it was wrong where it was counted."""
    base, *varieties = cell.split(", ")
    text = "; ".join([_TOLD.get(base, base), *(_variety(v) for v in varieties)])
    right, wrong = counted(cell)
    return f"{text} (wrong in {wrong:,} of {right + wrong:,} counted decisions)" if right + wrong else text


def refusal(cell: str) -> str:
    """Why a pair stays open that a kind of evidence speaks for."""
    return f"too little speaks for it: {told(cell)}"


def _variety(variety: str) -> str:
    name, found, more = variety.partition("name")
    if not found:
        return _VARIETIES.get(variety, variety)
    names = "their own names" if "own" in name else "their names"
    return " ".join(filter(None, (names, "have nothing in common", more.strip())))


@cache
def table() -> dict[str, dict[str, int]]:
    """How often each kind of evidence was right and wrong, as ``make calibrate`` counted it."""
    known: dict[str, dict[str, int]] = json.loads(Path(__file__).with_name("risks.json").read_text())
    return known


def bound(wrong: int, total: int) -> float:
    """Upper bound (95 %, Wilson) of the share that is wrong."""
    if not total:
        return 1.0
    share, z = wrong / total, 1.645
    centre = share + z * z / (2 * total)
    spread = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre + spread) / (1 + z * z / total)
