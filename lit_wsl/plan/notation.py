"""The notation of plan files for names that repeat: folded, written, parsed, and expanded within bounds.

One line of a plan stands for many names. Braces run through the entries of a family, one entry for each value;
brackets run within one entry, whose operation splits, joins or stacks several tensors::

    layers.{0..11}.attn.q.weight -> blocks.{0..11}.attn.wq.weight      12 entries, one tensor each
    stages.{i:0..3}.{j:0..1}.fc -> layer.{i:1..4}.{j:0..1}.fc          8 entries; equal letters walk together
    layers.{0..3}.qkv.weight -> layers.{0..3}.[q,k,v].weight           4 entries, one source and three targets
    experts.[0..255].w1 -> experts.w1                                  1 entry with 256 sources
    a.{0..9..3} -> b.{0..3}                                            0, 3, 6, 9 become 0, 1, 2, 3
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_wsl.errors import PlanError
from lit_wsl.plan.fields import shown
from lit_wsl.structure.families import Family, Slot, fold, ranges

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
        """Take from the budget."""
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

    >>> parse_side("a.{0..1}.[q,k]", Budget())
    [('a.', Running(values=('0', '1'), variable=''), '.', Running(values=('q', 'k'), variable=None))]
    """
    patterns = [_parse_pattern(part.strip(), budget) for part in _split_commas(text)]
    if any(not pattern for pattern in patterns):
        raise PlanError(f"{shown(text)} holds an empty name.")
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
                raise PlanError(f"{shown(plain)} holds a space, or is too long for a name.")
            pieces.append(plain)
        elif values is not None:
            pieces.append(Running(_parse_ranges(values, budget), variable or ""))
        else:
            pieces.append(Running(_parse_alternatives(alternatives, budget), None))
    if end != len(text):
        raise PlanError(f"{shown(text)}: a bracket or brace is not closed, or stands inside another.")
    return tuple(pieces)


def _parse_ranges(text: str, budget: Budget) -> tuple[str, ...]:
    values: list[str] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise PlanError(f"{{{shown(text)}}} is not a range such as {{0..11}}, {{0..9..3}} or {{0..3,7}}.")
        first, last, step = match.groups()
        start, stop = int(first), int(last if last is not None else first)
        stride = int(step) if step is not None else 1
        numbers = range(start, stop + (1 if stride > 0 else -1), stride)
        if not numbers:
            raise PlanError(f"{{{shown(text)}}} holds a range without values.")
        budget.spend(len(numbers))
        values += map(str, numbers)
    return tuple(values)


def _parse_alternatives(text: str, budget: Budget) -> tuple[str, ...]:
    items = [item.strip() for item in text.split(",")]
    if all(_RANGE.fullmatch(item) for item in items):
        return _parse_ranges(text, budget)
    if any(not is_plain(item) for item in items):
        raise PlanError(f"[{shown(text)}] is not a list such as [q,k,v] or a range such as [0..7].")
    budget.spend(len(items))
    return tuple(items)


def expand(sides: Sequence[Sequence[Pattern]], budget: Budget) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Give the entries that patterns stand for: for each, the names of each side.

    Several letters make the product of their ranges, in alphabetical order, the first letter outermost.
    """
    lengths: dict[str, int] = {}
    inner = 0
    characters = 0
    for pattern in itertools.chain.from_iterable(sides):
        running = [piece for piece in pattern if isinstance(piece, Running)]
        for piece in running:
            size = len(piece.values)
            if piece.variable is not None and lengths.setdefault(piece.variable, size) != size:
                which = f"ranges of {piece.variable!r}" if piece.variable else "ranges without a letter"
                raise PlanError(
                    f"{which} walk together, but one has {lengths[piece.variable]} values and another {size}; give "
                    "independent ranges letters of their own, such as {i:0..3}."
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


Order = Literal["tree", "sorted", "listed"]
ORDERS: tuple[Order, ...] = get_args(Order)
_INDEX = re.compile(r"(?<![^_/])\d+(?![^_/])")
_BRACKETS = re.compile(r"\[[^\]]*\]")
_GUARD = "\0"  # put before digits that must not be folded; no plain name holds it


@dataclass(frozen=True)
class Line:
    """What one line of a plan file stands for."""

    # for each side of the rows either a pattern, or the exact names where they cannot be one
    sides: tuple[str | tuple[str, ...], ...]
    members: tuple[int, ...]  # positions of the rows, in the order in which the patterns expand


def fold_rows(rows: Sequence[tuple[tuple[str, ...], ...]], keys: Sequence[Hashable]) -> tuple[list[Line], Order]:
    """Fold rows into lines, and tell how the rows are ordered: by ``tree``, ``sorted`` by name, or ``listed``.

    A row has sides, and a side has names (sources and targets, or a single name); the first name of the last side
    places the row. Its key (operations, shapes) must be equal within a line. Of what is listed less is folded.
    """
    names = [row[-1][0] for row in rows]
    described = _Names(names)
    lines, plain = _fold_plain(rows, keys, described.guarded())
    in_order = list(range(len(rows)))
    lines.sort(key=lambda line: min(line.members))
    if unfold_order("tree", lines, names) == in_order:
        return lines, "tree"
    ranks = described.ranks()
    tree = sorted(lines, key=lambda line: (ranks[line.members[0]], min(line.members)))
    if unfold_order("tree", tree, names) == in_order:
        return tree, "tree"
    if unfold_order("sorted", lines, names) == in_order:
        return lines, "sorted"
    whole = [line for line in lines if _is_run(line.members)]
    single = [Line(plain[m], (m,)) for line in lines if not _is_run(line.members) for m in line.members]
    return sorted(whole + single, key=lambda line: line.members[0]), "listed"


def unfold_order(order: Order, lines: Sequence[Line], names: Sequence[str]) -> list[int]:
    """The rows of lines in their order; ``names`` places them."""
    members = [member for line in lines for member in line.members]
    if order == "tree":
        return [members[i] for i in registration_order([names[m] for m in members])]
    return sorted(members, key=lambda m: names[m]) if order == "sorted" else members


def registration_order(names: Sequence[str]) -> list[int]:
    """Order names as a model would register them, going only by their order of appearance.

    Modules register their tensors depth first, so the names of a module stand together, children in the order in which
    they first appear; numbered children ascend, as those of ``ModuleList`` and ``Sequential`` do.

    >>> names = ["b.0.q", "b.1.q", "b.0.k", "b.1.k", "head"]
    >>> [names[i] for i in registration_order(names)]
    ['b.0.q', 'b.0.k', 'b.1.q', 'b.1.k', 'head']
    """
    root: dict[str | None, Any] = {}
    for position, name in enumerate(names):
        node = root
        for component in name.split("."):
            node = node.setdefault(component, {})
        node.setdefault(None, []).append(position)
    ordered: list[int] = []
    stack = [root]
    while stack:
        node = stack.pop()
        ordered += node.get(None, ())
        children = [component for component in node if component is not None]
        if numbers := sorted(filter(_is_number, children), key=int):
            first = next(i for i, component in enumerate(children) if _is_number(component))
            others = [component for component in children if not _is_number(component)]
            children = others[:first] + numbers + others[first:]
        stack.extend(node[component] for component in reversed(children))
    return ordered


def _is_number(text: str) -> bool:
    return text.isdecimal() and text.isascii() and len(text) <= 12


def _is_run(members: Sequence[int]) -> bool:
    return all(b == a + 1 for a, b in itertools.pairwise(members))


def _fold_plain(
    rows: Sequence[tuple[tuple[str, ...], ...]], keys: Sequence[Hashable], guarded: Sequence[str]
) -> tuple[list[Line], list[tuple[str | tuple[str, ...], ...]]]:
    """Fold the rows whose names can stand in patterns; give also what each row would look like alone."""
    lines: list[Line] = []
    alone: list[tuple[str | tuple[str, ...], ...]] = []
    positions: list[int] = []
    flat: list[tuple[str, ...]] = []
    flat_keys: list[Hashable] = []
    shapes_of: list[tuple[tuple[int, ...], tuple[str, ...]]] = []  # names per side, and the contents of brackets
    for position, (row, key) in enumerate(zip(rows, keys)):
        if not all(names and all(map(is_plain, names)) for names in row):
            alone.append(row)
            lines.append(Line(row, (position,)))
            continue
        sides = [fold_list(names) for names in row]
        alone.append(tuple(", ".join(side) for side in sides))
        if len(row[-1]) == 1:
            sides[-1] = [guarded[position]]
        texts = [text for side in sides for text in side]
        brackets: tuple[str, ...] = ()
        if any("[" in text for text in texts):
            brackets = tuple(match for text in texts for match in _BRACKETS.findall(text))
            texts = [_BRACKETS.sub("[]", text) for text in texts]
        positions.append(position)
        flat.append(tuple(texts))
        shapes_of.append((tuple(map(len, sides)), brackets))
        flat_keys.append((shapes_of[-1], key))
    for family in fold(flat, flat_keys):
        counts, brackets = shapes_of[family.members[0]]
        written = iter(_written(family, brackets))
        sides_text = tuple(", ".join(itertools.islice(written, count)) for count in counts)
        lines.append(Line(sides_text, tuple(positions[m] for m in family.members)))
    return lines, alone


def _written(family: Family, brackets: Sequence[str]) -> list[str]:
    """The patterns of a family, with letters where there are several variables and with the brackets put back."""
    letters = [f"{letter}:" for letter in _letters(len(family.variables))]
    contents = iter(brackets)

    def slot(piece: Slot) -> str:
        letter = letters[piece.variable] if len(letters) > 1 else ""
        return f"{{{letter}{ranges([piece.at(v) for v in family.variables[piece.variable]])}}}"

    texts = ["".join(p if isinstance(p, str) else slot(p) for p in template) for template in family.templates]
    return [re.sub(r"\[\]", lambda _: next(contents), text).replace(_GUARD, "") for text in texts]


def _letters(count: int) -> list[str]:
    """As many names in alphabetical order, the usual ``i, j, k`` first."""
    if count <= 18:
        return [chr(ord("i") + n) for n in range(count)]
    return [f"v{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(count)]


@functools.lru_cache(maxsize=65536)  # a model has few different components
def _skeleton(component: str, kept: frozenset[str] = frozenset()) -> str:
    skeleton = _INDEX.sub("#", component) if any(map(str.isdigit, component)) else component
    return component if skeleton in kept else skeleton


class _Names:
    """The names that place the rows, cut into components, and what their order says about the model.

    Attributes:
        kept: Skeletons such as ``conv_#`` whose numbered siblings don't stand together (``conv_1, norm_1, conv_2``):
            folded, they would not come back in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.rows = [name.split(".") for name in names]
        self.partings: list[tuple[list[str], list[str], int]] = []  # consecutive names, and the depth where they part
        for a, b in itertools.pairwise(self.rows):
            for depth, (x, y) in enumerate(zip(a, b)):
                if x != y:
                    self.partings.append((a, b, depth))
                    break
        self.kept = self._interleaved()

    def _interleaved(self) -> frozenset[str]:
        closed: dict[tuple[str, ...], dict[str, None]] = {}
        interleaved: dict[str, None] = {}
        for a, b, depth in self.partings:
            old, new = _skeleton(a[depth]), _skeleton(b[depth])
            if old != new:
                seen = closed.setdefault(tuple(a[:depth]), {})
                seen[old] = None
                if new in seen and "#" in new and new != "#":
                    interleaved[new] = None
        return frozenset(interleaved)

    def guarded(self) -> list[str]:
        """The names, with a guard before the digits that must stay as they are."""
        if not self.kept:
            return [".".join(row) for row in self.rows]
        return [
            ".".join(re.sub(r"(?=\d)", _GUARD, part) if _skeleton(part) in self.kept else part for part in row)
            for row in self.rows
        ]

    def ranks(self) -> list[tuple[int, ...]]:
        """For each name its place in the tree of skeletons, whose children are in an order that suits every instance.

        Layers may differ: the first has ``attn, mlp.up, norm``, later ones ``attn, mlp.experts, norm``. The order of a
        module's children is merged from all modules of its kind (a topological sort; first come, first served).
        """
        skeletons = [tuple(_skeleton(part, self.kept) for part in row) for row in self.rows]
        unique = dict.fromkeys(skeletons)
        children: dict[tuple[str, ...], dict[str, None]] = {}
        after: dict[tuple[str, ...], dict[str, dict[str, None]]] = {}
        for skeleton in unique:
            for depth, part in enumerate(skeleton):
                children.setdefault(skeleton[:depth], {})[part] = None
        for a, b, depth in self.partings:
            old, new = _skeleton(a[depth], self.kept), _skeleton(b[depth], self.kept)
            if old != new:
                parent = tuple(_skeleton(part, self.kept) for part in a[:depth])
                after.setdefault(parent, {}).setdefault(old, {})[new] = None
        rank = {
            (*parent, part): place
            for parent, found in children.items()
            for place, part in enumerate(_merged(list(found), after.get(parent, {})))
        }
        placed = {s: tuple(rank[s[: depth + 1]] for depth in range(len(s))) for s in unique}
        return [placed[skeleton] for skeleton in skeletons]


def _merged(items: list[str], after: dict[str, dict[str, None]]) -> list[str]:
    """Topological order, earliest item first where there is a choice; items of a cycle stay as they were."""
    place = {item: number for number, item in enumerate(items)}
    blockers = dict.fromkeys(items, 0)
    for followers in after.values():
        for follower in followers:
            blockers[follower] += 1
    free = [place[item] for item, count in blockers.items() if count == 0]
    heapq.heapify(free)
    done: dict[str, None] = {}
    for fallback in items:
        if not free and fallback not in done:  # only a cycle is left
            free = [place[fallback]]
        while free:
            item = items[heapq.heappop(free)]
            if item in done:
                continue
            done[item] = None
            for follower in after.get(item, ()):
                blockers[follower] -= 1
                if blockers[follower] == 0:
                    heapq.heappush(free, place[follower])
    return list(done)
