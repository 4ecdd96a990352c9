"""A case: rows of text with a name, and the cases that stand in ``cases/*.txt``.

A line that is not indented names a case and says what else belongs to it; its rows stand below:

    reg first | order: head.reg body        paths that the new module registers first (``old order``: the old module)
    queries | note: ...                     what a person would say about it
    aspp | liar: ...                        the names deceive: counted apart
      style b: body=backbone                rows are ``path | layer``; every two styles, words replaced, are the sides
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """Two modules whose truth is known."""

    name: str  # family/what
    rows: str
    order: str = ""
    old_order: str = ""
    liar: bool = False
    note: str = ""

    @property
    def family(self) -> str:
        return "(liars)" if self.liar else self.name.split("/")[0]


def paired(pairs: Iterable[tuple[str, str]], *templates: str) -> str:
    """The templates' rows for pairs of words, put for ``OLD`` and ``NEW``; ``-`` has no counterpart."""
    rows = []
    for (old, new), template in itertools.product(pairs, templates):
        left, right, layer = template.split("|")
        left = "-" if old == "-" else left.replace("OLD", old)
        right = "-" if new == "-" else right.replace("NEW", new)
        rows.append(f"{left} | {right} | {layer}")
    return "\n".join(rows) + "\n"


def listed(name: str) -> list[str]:
    """The lines of ``tables/name.txt``, without comments."""
    lines = (FOLDER / "tables" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def words_of(line: str) -> list[tuple[str, str]]:
    """``old=new`` pairs, separated by spaces."""
    return [(old, new) for old, _, new in (pair.partition("=") for pair in line.split())]


def cells(text: str) -> list[str]:
    """What stands between bars, over several lines."""
    return [cell.strip() for line in text.strip().splitlines() for cell in line.split("|")]


def text_cases(family: str) -> Iterator[Case]:
    """The cases of ``cases/family.txt``."""
    text = (FOLDER / "cases" / f"{family}.txt").read_text(encoding="utf-8")
    for block in re.split(r"\n(?! )", text.strip()):
        head, *lines = block.splitlines()
        if not head.startswith("#"):
            yield from _cases_of(f"{family}/{head}", [line.strip() for line in lines])


def _cases_of(head: str, lines: list[str]) -> Iterator[Case]:
    name, *options = cells(head)
    told = {option: text.strip() for option, _, text in (cell.partition(":") for cell in options)}
    case = Case(
        name,
        "\n".join(line for line in lines if not line.startswith("style ")),
        order=told.get("order", ""),
        old_order=told.get("old order", ""),
        liar="liar" in told,
        note=told.get("liar", told.get("note", "")),
    )
    styles: dict[str, str] = defaultdict(str)
    for line in lines:
        if line.startswith("style "):
            style, _, words = line.removeprefix("style ").partition(":")
            styles[style] += words
    if not styles:
        yield case
    for (a, old), (b, new) in itertools.permutations(styles.items(), 2):
        rows = (cells(row) for row in case.rows.splitlines())
        text = "\n".join(f"{_swap(path, old)} | {_swap(path, new)} | {layer}" for path, layer in rows)
        yield replace(case, name=f"{name} {a}->{b}", rows=text)


def _swap(path: str, words: str) -> str:
    """Whole words of a path replaced."""
    table = dict(words_of(words))
    return re.sub(r"\w+", lambda word: table.get(word[0], word[0]), path)
