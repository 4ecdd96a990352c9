"""Changes of a choice: one decision, any two layers of a group, or all that two modules hold.

Two modules that are alike, such as two residual branches, may change places as a whole and lose little, where any of
their layers alone would lose much. So they are exchanged together, across all groups of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

from lit_wsl.matching.layers import Unit
from lit_wsl.matching.parts import Part
from lit_wsl.matching.shapes import listed
from lit_wsl.matching.space import Space
from lit_wsl.plan.entries import PlanEntry

FEW_COVERS = 64  # ways to assign layers that are all tried
FEW_BLOCKS = 4  # of which all orders are options
MANY_BLOCKS = 8  # of which not any two are exchanged
MAX_TWINS = 24  # pairs of modules that are exchanged

Choice = tuple[int, ...]
Layers = dict[str, tuple[int, Unit]]  # by their name in a module: the number of their group, and the layer


def options_of(space: Space, choice: Choice, decision: int) -> list[Choice]:
    """A choice with all options of one decision; with any two layers exchanged where there are many."""
    options = space.decisions[decision].options
    part = part_of(space, decision)
    found = [] if part is None else list(space.exchanges(choice, part))
    if part is None or len(options) <= FEW_COVERS:
        found = [*((*choice[:decision], o, *choice[decision + 1 :]) for o in range(len(options))), *found]
    return found or [choice]


def part_of(space: Space, decision: int) -> Part | None:
    """The group of layers that a decision assigns, if it is one of these."""
    return next((part for part in space.parts if part.which == decision), None)


def twins_exchanged(space: Space, choice: Choice) -> list[Choice]:
    """The choice with all that two modules of one side hold exchanged, or all parts of two wholes."""
    found = [_exchanged(space, choice, *pair, side) for side in (0, 1) for pair in _twins(space.parts, side)]
    asked = [part for part in space.parts if not space.decisions[part.which].told]
    found += [other for part in asked for other in space.exchanges(choice, part, wholes=True)]
    return [other for other in dict.fromkeys(found) if other is not None and other != choice]


def unlisted(space: Space) -> list[int]:
    """Numberings of so many blocks that not all orders are among the options."""
    found = [d for d in space.numbering.values() if len(space.decisions[d].options) > 1]
    return [d for d in found if len(space.decisions[d].options[0]) > FEW_BLOCKS]


def blocks_exchanged(space: Space, choice: Choice, numbering: int) -> list[Choice]:
    """A choice with any two blocks exchanged, only neighbours of many; orders that are new become options."""
    decision, found = space.decisions[numbering], []
    order = decision.options[choice[numbering]]
    far = len(order) if len(order) <= MANY_BLOCKS else 1
    for i, j in combinations(range(len(order)), 2):
        if j - i <= far:
            made = list(order)
            made[i], made[j] = made[j], made[i]
            if tuple(made) not in decision.options:
                decision.options.append(tuple(made))
                decision.labels.append(listed(made))
            found.append((*choice[:numbering], decision.options.index(tuple(made)), *choice[numbering + 1 :]))
    return found


def odd_ones(space: Space, choice: Choice) -> Iterator[tuple[int, Choice]]:
    """A choice with two like layers exchanged in one of two modules alone, which may count in ways of their own.

    Yields:
        The decision that it is about; the choice, with the numbers of the group, the copy and the layers behind it.
    """
    for number, part in enumerate(space.parts):
        named = not any(side.is_counted for side in space.regions[part.region])
        if space.copies(part) == 2 and named and len(choice) == len(space.decisions):
            two = combinations(range(len(part.target)), 2)
            pairs = [(i, j) for i, j in two if part.target[i].shapes == part.target[j].shapes]
            for copy, pair in product(range(2), pairs):
                yield part.which, (*choice, number, copy, *pair)


def _twins(parts: Sequence[Part], side: int) -> list[tuple[Layers, Layers]]:
    """Pairs of modules of one side, or of numbers in several lists, with the same layers, of more than one group."""
    modules: dict[tuple[int, str], Layers] = {}
    for number, part in enumerate(parts):
        for unit in (part.source, part.target)[side]:
            words = unit.path.split(".")
            for depth in range(1, len(words)):
                own = modules.setdefault((part.region, ".".join(words[:depth])), {})
                own[".".join(words[depth:])] = number, unit
            if words[-1].isdigit():
                modules.setdefault((part.region, f"*.{words[-1]}"), {})[".".join(words[:-1])] = number, unit
    alike: dict[object, list[Layers]] = {}
    for (region, _), layers in modules.items():
        if len({number for number, _ in layers.values()}) > 1:
            key = region, *sorted((name, number, unit.shapes) for name, (number, unit) in layers.items())
            alike.setdefault(key, []).append(layers)
    return [pair for own in alike.values() for pair in combinations(own, 2)][:MAX_TWINS]


def _exchanged(space: Space, choice: Choice, one: Layers, other: Layers, side: int) -> Choice | None:
    """The choice with the layers of two modules exchanged, if that is a choice."""
    swapped = {
        a: b
        for name, (_, unit) in one.items()
        for x, y in zip(unit.all_names, other[name][1].all_names)
        for a, b in ((x, y), (y, x))
    }
    for number in sorted({number for number, _ in one.values()}):
        part = space.parts[number]
        if choice[part.which] < 0 or space.decisions[part.which].told:
            return None
        wanted = _places(space.entries_of(number, choice), swapped, side)
        made = (
            c for c in options_of(space, choice, part.which) if _places(space.entries_of(number, c), {}, side) == wanted
        )
        choice = next(made, choice)
        if _places(space.entries_of(number, choice), {}, side) != wanted:
            return None
    return choice


def _places(
    entries: Sequence[PlanEntry], swapped: Mapping[str, str], side: int
) -> frozenset[tuple[frozenset[str], ...]]:
    """Which tensors go where, some of one side exchanged."""

    def sides() -> Iterator[tuple[frozenset[str], ...]]:
        for entry in entries:
            if entry.kind == "parameter":
                ends = [entry.sources, entry.targets]
                ends[side] = tuple(swapped.get(name, name) for name in ends[side])
                yield tuple(map(frozenset, ends))

    return frozenset(sides())


def shared(space: Space) -> list[int]:
    """Decisions that are no layer group's own: numberings, rotary rows, gates."""
    found = [*space.numbering.values(), *space.inner.values(), space.rotary, space.gates]
    return [d for d in found if d is not None and len(space.decisions[d].options) > 1]


def questions(space: Space) -> list[object]:
    """What is asked, to see whether another space of the same models asks more."""
    return [[(d.text, len(d.options), d.told) for d in space.decisions], [part.fixed for part in space.parts]]


def carried(choice: Choice, from_: Space, to: Space) -> Choice:
    """The same choice in another space of the same models, as far as that has its options."""
    known = dict(zip(_numbered(from_), range(len(choice))))
    options = [
        from_.decisions[known[key]].options[max(choice[known[key]], 0)] if key in known else None
        for key in _numbered(to)
    ]
    places = zip(to.decisions, options)
    found = [decision.options.index(option) if option in decision.options else 0 for decision, option in places]
    told = {(unit.path, *manner): d for part in from_.parts for manner, d in part.turns.items() for unit in part.target}
    for part in to.parts:  # squares that each may stand their own way stand as all did
        for manner, d in part.turns.items() if part.each else ():
            alike = part.target[0].path, *manner[:-1]
            if alike in told:
                found[d] = max(choice[told[alike]], 0)
    return tuple(found)


def _numbered(space: Space) -> list[tuple[str, int]]:
    """What the decisions are about, those about the same numbered."""
    texts = [decision.text for decision in space.decisions]
    return [(text, texts[:k].count(text)) for k, text in enumerate(texts)]
