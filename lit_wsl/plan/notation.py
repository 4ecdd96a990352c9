"""The notation of plan files for names that repeat: written, parsed, and expanded within bounds.

One line of a plan stands for many names. Braces run through the entries of a family, one entry for each value;
brackets run within one entry, whose operation splits, joins or stacks several tensors::

    layers.{0..11}.attn.q.weight -> blocks.{0..11}.attn.wq.weight      12 entries, one tensor each
    stages.{i:0..3}.{j:0..1}.fc -> layer.{i:1..4}.{j:0..1}.fc          8 entries; equal letters walk together
    layers.{0..3}.qkv.weight -> layers.{0..3}.[q,k,v].weight           4 entries, one source and three targets
    experts.[0..255].w1 -> experts.w1                                  1 entry with 256 sources
    a.{0..9..3} -> b.{0..3}                                            0, 3, 6, 9 become 0, 1, 2, 3
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lit_wsl.errors import PlanError
from lit_wsl.structure.families import ranges

MAX_NAMES = 2_000_000
MAX_CHARACTERS = 100_000_000
MAX_NAME_LENGTH = 2_000

_SPECIAL = re.compile(r"[\s{}\[\],\x00]|->")
_RANGE = re.compile(r"(0|[1-9]\d{0,11})(?:\.\.(0|[1-9]\d{0,11})(?:\.\.(-?[1-9]\d{0,11}))?)?")
_PIECE = re.compile(r"\{(?:([a-z]+):)?([^{}\[\]]*)\}|\[([^{}\[\]]*)\]|([^{}\[\]]+)")


@dataclass
class Budget:
    """How much a file may still expand to, so that a short hostile one cannot fill the memory."""

    names: int = MAX_NAMES
    characters: int = MAX_CHARACTERS

    def spend(self, names: int, characters: int = 0) -> None:
        """Take from the budget.

        Raises:
            PlanError: If nothing is left.
        """
        self.names -= names
        self.characters -= characters
        if self.names < 0 or self.characters < 0:
            raise PlanError(
                f"the plan expands to more than {MAX_NAMES:,} names or {MAX_CHARACTERS:,} characters; check its ranges."
            )


@dataclass(frozen=True)
class Running:
    """A place in a pattern that runs through values, across entries (braces) or within one (brackets)."""

    values: tuple[str, ...]
    variable: str | None
    """The letter before the colon, ``""`` for braces without one, ``None`` for brackets."""


Pattern = tuple["str | Running", ...]


def is_plain(name: str) -> bool:
    """Whether a name can stand in a pattern as it is; others are written as lists of exact names."""
    return bool(name) and not _SPECIAL.search(name) and len(name) <= MAX_NAME_LENGTH


def parse_side(text: str, budget: Budget) -> list[Pattern]:
    """Parse one side of an arrow: patterns separated by commas.

    Raises:
        PlanError: If a bracket is open, a range is wrong, or the ranges are too long.

    >>> parse_side("a.{0..1}.[q,k]", Budget())
    [('a.', Running(values=('0', '1'), variable=''), '.', Running(values=('q', 'k'), variable=None))]
    """
    patterns = [_parse_pattern(part.strip(), budget) for part in _split_commas(text)]
    if any(not pattern for pattern in patterns):
        raise PlanError(f"{_shown(text)} holds an empty name.")
    return patterns


def _split_commas(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts = [""]
    open_brackets = 0
    for piece in re.split(r"([,{}\[\]])", text):
        open_brackets += (piece in ("{", "[")) - (piece in ("}", "]"))
        if piece == "," and open_brackets == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _parse_pattern(text: str, budget: Budget) -> Pattern:
    pieces: list[str | Running] = []
    end = 0
    for match in _PIECE.finditer(text):
        if match.start() != end:
            break
        end = match.end()
        variable, values, alternatives, plain = match.groups()
        if plain is not None:
            if not is_plain(plain):
                raise PlanError(f"{_shown(plain)} holds a space, or is too long for a name.")
            pieces.append(plain)
        elif values is not None:
            pieces.append(Running(_parse_ranges(values, budget), variable or ""))
        else:
            pieces.append(Running(_parse_alternatives(alternatives, budget), None))
    if end != len(text):
        raise PlanError(f"{_shown(text)}: a bracket or brace is not closed, or stands inside another.")
    return tuple(pieces)


def _parse_ranges(text: str, budget: Budget) -> tuple[str, ...]:
    values: list[str] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise PlanError(f"{{{_shown(text)}}} is not a range such as {{0..11}}, {{0..9..3}} or {{0..3,7}}.")
        first, last, step = match.groups()
        start, stop = int(first), int(last if last is not None else first)
        stride = int(step) if step is not None else 1
        numbers = range(start, stop + (1 if stride > 0 else -1), stride)
        if not numbers:
            raise PlanError(f"{{{_shown(text)}}} holds a range without values.")
        budget.spend(len(numbers))
        values += map(str, numbers)
    return tuple(values)


def _parse_alternatives(text: str, budget: Budget) -> tuple[str, ...]:
    items = [item.strip() for item in text.split(",")]
    if all(_RANGE.fullmatch(item) for item in items):
        return _parse_ranges(text, budget)
    if any(not is_plain(item) for item in items):
        raise PlanError(f"[{_shown(text)}] is not a list such as [q,k,v] or a range such as [0..7].")
    budget.spend(len(items))
    return tuple(items)


def expand(sides: Sequence[Sequence[Pattern]], budget: Budget) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Give the entries that patterns stand for: for each, the names of each side.

    Several letters make the product of their ranges, in alphabetical order, the first letter outermost.

    Raises:
        PlanError: If ranges that walk together differ in length, or there are too many names.
    """
    lengths: dict[str, int] = {}
    inner = 0
    characters = 0
    for pattern in itertools.chain.from_iterable(sides):
        running = [piece for piece in pattern if isinstance(piece, Running)]
        for piece in running:
            if piece.variable is not None and lengths.setdefault(piece.variable, len(piece.values)) != len(
                piece.values
            ):
                which = f"ranges of {piece.variable!r}" if piece.variable else "ranges without a letter"
                raise PlanError(
                    f"{which} walk together, but one has {lengths[piece.variable]} values and another "
                    f"{len(piece.values)}; give independent ranges letters of their own, such as {{i:0..3}}."
                )
        copies = math.prod(len(p.values) for p in running if p.variable is None)
        inner += copies
        characters += copies * sum(len(p) if isinstance(p, str) else max(map(len, p.values)) for p in pattern)
    entries = math.prod(lengths.values())
    budget.spend(entries * inner, entries * characters)
    letters = sorted(lengths)
    for places in itertools.product(*(range(lengths[letter]) for letter in letters)):
        at = dict(zip(letters, places))
        yield tuple(tuple(itertools.chain.from_iterable(_names(pattern, at) for pattern in side)) for side in sides)


def _names(pattern: Pattern, at: dict[str, int]) -> list[str]:
    choices: list[Sequence[str]] = []
    for piece in pattern:
        if isinstance(piece, str):
            choices.append((piece,))
        elif piece.variable is None:
            choices.append(piece.values)
        else:
            choices.append((piece.values[at[piece.variable]],))
    return ["".join(parts) for parts in itertools.product(*choices)]


def fold_list(names: Sequence[str]) -> list[str]:
    """Fold the names of one side of one entry into patterns with brackets; they expand to the names, in order.

    >>> fold_list(["attn.q.weight", "attn.k.weight", "attn.v.weight"])
    ['attn.[q,k,v].weight']
    >>> fold_list([f"experts.{i}.{part}" for i in range(8) for part in ("gate", "up")])
    ['experts.[0..7].[gate,up]']
    """
    if len(names) == 1:
        return list(names)
    whole = _fold_product(names)
    if whole is not None:
        return [whole]
    folded: list[str] = []
    for _, run in itertools.groupby(names, key=lambda name: re.sub(r"\d+", "#", name)):
        members = list(run)
        pattern = _fold_product(members) if len(members) > 1 else None
        folded += members if pattern is None else [pattern]
    return folded


def _fold_product(names: Sequence[str]) -> str | None:
    """One pattern for names that are the product of the components in which they differ."""
    rows = [name.split(".") for name in names]
    if any(len(row) != len(rows[0]) for row in rows):
        return None
    values = [list(dict.fromkeys(column)) for column in zip(*rows)]
    if math.prod(map(len, values)) != len(names) or not all(map(all, values)):
        return None
    if any(tuple(row) != chosen for row, chosen in zip(rows, itertools.product(*values))):
        return None
    return ".".join(column[0] if len(column) == 1 else f"[{_alternatives(column)}]" for column in values)


def _alternatives(values: Sequence[str]) -> str:
    numeric = all(re.fullmatch(r"0|[1-9]\d{0,11}", value) for value in values)
    return ranges([int(value) for value in values]) if numeric else ",".join(values)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
