"""Families: names that differ only by indices, folded into ``blocks.{0..11}.attn.weight``.

A deep model repeats itself: a person reads "twelve blocks", not 144 names. :func:`fold` groups rows of names (one name
for an unmatched tensor, source and target names for a step of a plan) in linear time, and never loses anything: a
:class:`Family` expands to exactly the rows that it stands for. :func:`find_average` tells a running average (EMA, SWA)
among the tensors that it is the average of.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lit_wsl.structure.description import core, tokenize

AVERAGE_WORDS = frozenset({"ema", "avg", "swa", "shadow", "polyak"})
PROBES = 8  # names that are looked for, so that not all of them need to stand on both sides


def speaks_of_average(text: str) -> bool:
    """Whether a word of a key says average: ``state_dict_ema``, ``EMACallback``, ``modelEma``."""
    return any(word in AVERAGE_WORDS or word.startswith("averag") for word in tokenize(text))


@dataclass(frozen=True)
class Average:
    """Weights that stand a second time among others: ``prefix`` of their names, and model's name -> averaged name.

    There are no pairs where the average is a list and nothing has kept the order that it follows.
    """

    prefix: str
    pairs: dict[str, str]


def find_average(shapes: Mapping[str, tuple[int, ...]]) -> Average | None:
    """Find a running average among the tensors that it is the average of.

    An average is a copy under a prefix. What marks it as the copy is a word of the prefix (``ema``), or names
    that lost their dots (``shadow.net_layer_weight``, LDM's LitEma without any separator) beside names that have them.
    With such a word it may also be a list in the order of the model (``ema.shadow_params.0``).

    Args:
        shapes: Name -> shape of all tensors.
    """
    under: dict[str, list[str]] = {}
    for name in shapes:
        for prefix in _prefixes(name):
            under.setdefault(prefix, []).append(name)
    dotted: set[str] | None = None  # most checkpoints never ask for it
    for prefix, mine in sorted(under.items()):
        told = speaks_of_average(prefix)
        flat = all("." not in name[len(prefix) :].removeprefix("module.") for name in mine)
        if len(mine) < 2 or not (told or flat):
            continue
        numbered = _numbered(prefix, mine, shapes) if told else None
        if numbered is not None:
            return Average(prefix, numbered)
        keys = {_squeezed(name[len(prefix) :].removeprefix("module.")): name for name in mine}
        if not told:
            if dotted is None:
                dotted = {squeezed for name in shapes for squeezed in _dotted_tails(name)}
            if dotted.isdisjoint(keys):
                continue  # any layer is flat: only names that lost their dots are worth a comparison with all others
        rest = {name: _squeezed(name) for name in shapes if not name.startswith(prefix)}
        starts: set[str] = set()
        for probe in sorted(keys, key=lambda key: (-len(key), key))[:PROBES]:
            starts |= {squeezed.removesuffix(probe) for squeezed in rest.values() if squeezed.endswith(probe)}
        pairs: dict[str, str] = {}
        for start in sorted(starts, key=lambda text: (len(text), text)):
            alike = {
                name: keys[squeezed[len(start) :]]
                for name, squeezed in rest.items()
                if squeezed.startswith(start) and squeezed[len(start) :] in keys
            }
            alike = {a: b for a, b in alike.items() if shapes[a] == shapes[b]}
            pairs = max(pairs, alike, key=len)
        counted = [name for name in mine if shapes[name]]  # decay and number of updates are scalars
        lost_dots = flat and any(
            "." in _tail(name, len(_squeezed(mine_name)) - len(_squeezed(prefix))) for name, mine_name in pairs.items()
        )
        if len(pairs) * 2 > len(mine) and (told or (lost_dots and len(pairs) >= len(counted) > 1)):
            return Average(prefix, pairs)
    return None


def _numbered(prefix: str, mine: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str] | None:
    """Model's name -> averaged name, where an average is a bare list in the order of the model's parameters."""
    by_number = {name[len(prefix) :]: name for name in mine if shapes[name]}
    if len(by_number) < 2 or not all(number.isdecimal() for number in by_number):
        return None
    rest = {name: core(shape) for name, shape in shapes.items() if not name.startswith(prefix)}
    missing = Counter(core(shapes[name]) for name in by_number.values()) - Counter(rest.values())
    if missing:
        return None
    averaged = iter([by_number[number] for number in sorted(by_number, key=int)])
    pairs: dict[str, str] = {}
    wanted = next(averaged, None)
    for name, shape in rest.items():
        if wanted is not None and shape == core(shapes[wanted]):
            pairs[name] = wanted
            wanted = next(averaged, None)
    return pairs if wanted is None and list(rest) != sorted(rest) else {}


def _prefixes(name: str) -> list[str]:
    """What may stand before the name of the original: the first modules, or the first words of a name without dots."""
    mark = "." if "." in name else "_"
    first = name.find(mark) + 1
    second = name.find(mark, first) + 1 if first else 0
    return [name[:end] for end in (first, second) if end]


def _squeezed(name: str) -> str:
    return name.replace(".", "").replace("_", "")


def _dotted_tails(name: str) -> Iterator[str]:
    """The ends of a name, from its words on, that have dots to lose; without them."""
    last = name.rfind(".")
    for start in [0, *(found.end() for found in re.finditer("[._]", name))]:
        if start < last:
            yield _squeezed(name[start:])


def _tail(name: str, letters: int) -> str:
    """The end of a name that has so many letters, separators aside."""
    at = len(name)
    while letters > 0 and at > 0:
        at -= 1
        letters -= name[at] not in "._"
    return name[at:]


def prefixes(names: Sequence[str], known: Mapping[str, object]) -> Iterator[str]:
    """What may stand before all of some names so that each is a known one; ``""`` where they are known as they are.

    >>> list(prefixes(["w", "b"], dict.fromkeys(["net.w", "net.b", "head.w"])))
    ['net.']
    """
    for longer in known:
        if longer == names[0] or longer.endswith(f".{names[0]}"):
            prefix = longer[: len(longer) - len(names[0])]
            if all(prefix + name in known for name in names):
                yield prefix


_INDEX = re.compile(r"(?:(?<=[._/])|^)\d+(?=[._/]|$)")


@dataclass(frozen=True)
class Slot:
    """A place in a name that holds an index: an affine function of a variable.

    Attributes:
        variable: Which of the family's variables, from 0.
        offset: What is added to its scaled value.
        factor: What its value is multiplied with: ``features.{0,3,6}`` may walk along with ``convs.{0..2}``.
    """

    variable: int
    offset: int = 0
    factor: int = 1

    def at(self, value: int) -> int:
        """The index for a value of the variable."""
        return self.factor * value + self.offset


@dataclass(frozen=True)
class Family:
    """Rows of names that differ only by indices, which run through a product of ranges.

    Attributes:
        templates: One per name of a row: the fixed pieces of text and, between them, the :class:`Slot` objects.
        variables: The values of each variable, ascending. The rows are their product, the first variable outermost.
        members: For each row of that product, its position in the folded sequence.
    """

    templates: tuple[tuple[str | Slot, ...], ...]
    variables: tuple[tuple[int, ...], ...]
    members: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Each name with its ranges written out, for people: ``blocks.{0..11}.attn.weight``."""
        return tuple(
            "".join(
                piece
                if isinstance(piece, str)
                else "{" + ranges([piece.at(v) for v in self.variables[piece.variable]]) + "}"
                for piece in template
            )
            for template in self.templates
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Every row the family stands for, in the order of ``members``."""
        return [
            tuple(
                "".join(p if isinstance(p, str) else str(p.at(values[p.variable])) for p in template)
                for template in self.templates
            )
            for values in itertools.product(*self.variables)
        ]


def fold(rows: Sequence[Sequence[str]], keys: Sequence[Hashable] | None = None) -> list[Family]:
    """Fold rows of names that differ only by indices.

    Indices that move together (``blocks.3 -> layer.5``: by a constant distance; ``features.6 -> convs.2``: by a
    constant factor) share a variable; independent ones (``layers.{0..3}.experts.{0..7}``) fold when every combination
    is there, and otherwise range by range.

    Args:
        rows: Rows of names; a row alone folds into a family of one.
        keys: What must also be equal within a family (shapes, operation), one per row.

    Returns:
        The families, in the order of their first rows. Every position of ``rows`` is in exactly one.

    >>> [f.patterns for f in fold([(f"blocks.{i}.w", f"enc.{i + 1}.w") for i in range(12)] + [("head.w", "fc.w")])]
    [('blocks.{0..11}.w', 'enc.{1..12}.w'), ('head.w', 'fc.w')]
    """
    groups: dict[tuple[tuple[tuple[str, ...], ...], Hashable], list[tuple[int, tuple[int, ...]]]] = {}
    for position, row in enumerate(rows):
        cuts = [_cut(name) for name in row]
        indices = tuple(index for _, found in cuts for index in found)
        key = (tuple(texts for texts, _ in cuts), keys[position] if keys is not None else None)
        groups.setdefault(key, []).append((position, indices))
    families = [family for (texts, _), group in groups.items() for family in _fold_group(texts, group)]
    return sorted(families, key=lambda family: min(family.members))


def fold_names(names: Sequence[str]) -> list[str]:
    """Fold a list of names into patterns.

    >>> fold_names(["enc.0.weight", "enc.0.bias", "enc.1.weight", "enc.1.bias"])
    ['enc.{0..1}.weight', 'enc.{0..1}.bias']
    """
    return [family.patterns[0] for family in fold([(name,) for name in names])]


def _cut(name: str) -> tuple[tuple[str, ...], list[int]]:
    """Cut a name at its indices: the texts around them, and the indices. ``007`` is text: it would not come back."""
    texts, indices, end = [], [], 0
    for match in _INDEX.finditer(name):
        digits = match.group()
        if (digits != "0" and digits.startswith("0")) or not digits.isascii():
            continue
        texts.append(name[end : match.start()])
        indices.append(int(digits))
        end = match.end()
    texts.append(name[end:])
    return tuple(texts), indices


def _fold_group(texts: tuple[tuple[str, ...], ...], group: list[tuple[int, tuple[int, ...]]]) -> list[Family]:
    """Fold rows of equal texts; where the indices aren't a full product, divide along the first free one."""
    first = group[0][1]
    columns = list(zip(*(indices for _, indices in group)))
    variables: list[tuple[int, ...]] = []  # value column of each variable
    slots: list[Slot | None] = []  # None: a constant
    by_shift: dict[tuple[int, ...], int] = {}
    for place, column in enumerate(columns):
        shifted = tuple(value - first[place] for value in column)
        factor = math.gcd(*shifted)
        if not factor:
            slots.append(None)
            continue
        if next(value for value in shifted if value) < 0:
            factor = -factor
        steps = tuple(value // factor for value in shifted)
        if steps not in by_shift:
            by_shift[steps] = len(variables)
            # a variable is the index itself where the first name that uses it is so plain
            variables.append(column if factor == 1 else steps)
        number = by_shift[steps]
        slots.append(Slot(number, column[0] - factor * variables[number][0], factor))
    values = [sorted(set(column)) for column in variables]
    rows = list(zip(*variables)) if variables else [()] * len(group)
    if math.prod(map(len, values)) == len(group) == len(set(rows)):
        order = sorted(range(len(group)), key=lambda k: rows[k])
        templates = _templates(texts, slots, first)
        return [Family(templates, tuple(map(tuple, values)), tuple(group[k][0] for k in order))]
    if len(variables) < 2:  # the same row several times
        return [family for member in group for family in _fold_group(texts, [member])]
    parts: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for member, value in zip(group, variables[0]):
        parts.setdefault(value, []).append(member)
    return [family for part in parts.values() for family in _fold_group(texts, part)]


def _templates(
    texts: tuple[tuple[str, ...], ...], slots: list[Slot | None], constants: tuple[int, ...]
) -> tuple[tuple[str | Slot, ...], ...]:
    place = 0
    templates = []
    for pieces in texts:
        template: list[str | Slot] = [pieces[0]]
        for text in pieces[1:]:
            slot = slots[place]
            if slot is None:
                template[-1] = f"{template[-1]}{constants[place]}{text}"
            else:
                template += [slot, text]
            place += 1
        templates.append(tuple(template))
    return tuple(templates)


def ranges(values: Sequence[int]) -> str:
    """Write integers as ranges, with the step where it is not 1, in their order.

    >>> ranges([0, 1, 2, 3, 7]), ranges([0, 3, 6, 9]), ranges([3, 2, 1, 0])
    ('0..3,7', '0..9..3', '3..0..-1')
    """
    pieces: list[str] = []
    start = 0
    while start < len(values):
        end = start + 1
        step = values[end] - values[start] if end < len(values) else 0
        while step and end < len(values) and values[end] - values[end - 1] == step:
            end += 1
        if end - start == 2 and step != 1:  # two values say more than a range with a step
            end = start + 1
        first, last = values[start], values[end - 1]
        pieces.append(str(first) if end - start == 1 else f"{first}..{last}" + ("" if step == 1 else f"..{step}"))
        start = end
    return ",".join(pieces)
