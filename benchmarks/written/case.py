"""A case: rows of text with a name, and the cases that stand in ``cases/*.txt``.

A line that is not indented names a case and says what else belongs to it; its rows stand below:

    reg first | order: head.reg body        paths that the new module registers first (``old order``: the old module);
                                            ``*part`` stands for all paths that hold it
    queries | note: ...                     what a person would say about it
    aspp | liar: ...                        the names deceive: counted apart
      style b: body=backbone                rows are ``path | layer``; every two styles, words replaced, are the sides
    net | sides: a b c                      rows have a path and a layer (``L 8 8 => L 8 16 => ...``) for each side; any
                                            two sides are a case; a joined path is split on the way back
      order b: head                         what a side registers first
      at net.0 | body.0 | blocks.0          prefixes of the rows below; one path alone is the same on all sides
    rows block                              no case: rows that other cases have in common
      use block: OLD=enc NEW=encoder        which have them here, words replaced
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.written.rows import spread

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
    common: dict[str, list[str]] = {}
    for block in re.split(r"\n(?! )", text.strip()):
        head, *indented = block.splitlines()
        lines = [line for text in indented for line in _used(text.strip(), common)]
        if head.startswith("rows "):
            common[head.removeprefix("rows ")] = lines
        elif not head.startswith("#"):
            yield from _cases_of(f"{family}/{head}", lines)


def _used(line: str, common: dict[str, list[str]]) -> list[str]:
    """The line, or the rows that it stands for."""
    if not line.startswith("use "):
        return [line]
    name, _, words = line.removeprefix("use ").partition(":")
    lines = common[name]
    for old, new in words_of(words):
        lines = [one.replace(old, new) for one in lines]
    return lines


def _cases_of(head: str, lines: list[str]) -> Iterator[Case]:
    name, *options = cells(head)
    told = {option: text.strip() for option, _, text in (cell.partition(":") for cell in options)}
    set_by: dict[str, dict[str, str]] = {"style": defaultdict(str), "order": defaultdict(str)}
    rows = []
    for line in lines:
        found = re.match(r"(style|order) ([^:|]+):(.*)", line)
        if found:
            set_by[found[1]][found[2]] += found[3]
        else:
            rows.append(line)
    case = Case(
        name,
        "\n".join(rows),
        order=told.get("order", ""),
        old_order=told.get("old order", ""),
        liar="liar" in told,
        note=told.get("liar", told.get("note", "")),
    )
    if "sides" in told:
        yield from _sided(case, told["sides"].split(), set_by["order"])
    elif set_by["style"]:
        yield from _styled(case, set_by["style"])
    else:
        yield replace(case, rows="\n".join(" | ".join(row) for row in _placed(case.rows, 2)))


def _styled(case: Case, styles: dict[str, str]) -> Iterator[Case]:
    for (a, old), (b, new) in itertools.permutations(styles.items(), 2):
        rows = (cells(row) for row in case.rows.splitlines())
        text = "\n".join(f"{_swap(path, old)} | {_swap(path, new)} | {layer}" for path, layer in rows)
        yield replace(case, name=f"{case.name} {a}->{b}", rows=text)


def _sided(case: Case, sides: list[str], orders: dict[str, str]) -> Iterator[Case]:
    table = []
    for *paths, layer in _placed(case.rows, len(sides)):
        layers = [one.strip() for one in layer.split("=>")]
        layers += layers[-1:] * (len(sides) - len(layers))
        table.append({side: (path, own) for side, path, own in zip(sides, paths, layers)})
    for a, b in itertools.permutations(sides, 2):
        rows = "\n".join(text for row in table for text in _one_way(*row[a], *row[b]))
        name = f"{case.name} {a}->{b}"
        yield replace(case, name=name, rows=rows, order=orders.get(b, ""), old_order=orders.get(a, ""))


def _placed(rows: str, sides: int) -> Iterator[list[str]]:
    """Rows with as many paths as there are sides, below the prefixes that ``at`` sets."""
    prefixes = [""] * sides
    for line in rows.splitlines():
        if line.split()[0] == "at":
            prefixes = [f"{prefix}." if prefix else "" for prefix in cells(line.removeprefix("at")) or [""]]
            prefixes *= sides if len(prefixes) == 1 else 1
            continue
        *paths, layer = cells(line)
        paths *= sides if len(paths) == 1 else 1
        yield [*(path if path == "-" else prefix + path for prefix, path in zip(prefixes, paths, strict=True)), layer]


def _one_way(old: str, before: str, new: str, after: str) -> Iterator[str]:
    """The rows of one row of two sides: the old side tells what is joined, split or transposed."""
    if new.endswith("^T"):
        old, new = f"{old}^T", new.removesuffix("^T")
    parts = spread(new).split("+")
    for i, part in enumerate(parts):
        source = old if len(parts) == 1 else f"{old}[{i}/{len(parts)}]"
        yield f"{source} | {part} | {before} => {after}"


def _swap(path: str, words: str) -> str:
    """Whole words of a path replaced."""
    table = dict(words_of(words))
    return re.sub(r"\w+", lambda word: table.get(word[0], word[0]), path)
