"""Rows of queries and keys that turn with their position: which they are, and what takes them to the other convention.

Names may call a layer after queries or keys. Where the model's gradient shows which of its rows meet in planes that
turn (:mod:`lit_wsl.matching.symmetries`), no name is needed, not even of a layer of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from lit_wsl.matching.symmetries import Turning
from lit_wsl.matching.turns import by_head
from lit_wsl.plan.operations import Concat, Operation, Rotary, Split, Transpose
from lit_wsl.structure.description import Shape

Way = tuple[int, int]  # rows of a head, and how many of them turn


class Rotations:
    """What turns in the model to be filled, by name of the tensor.

    Args:
        turnings: As its gradient shows.
    """

    def __init__(self, turnings: Iterable[Turning]) -> None:
        self._by_name: dict[str, tuple[Turning, int, frozenset[int]]] = {}
        for turning in turnings:
            for name, (axis, rows) in turning.rows.items():
                known = self._by_name[name][2] if name in self._by_name else frozenset()
                self._by_name[name] = turning, axis, rows | known

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def ways(self) -> list[tuple[int, int]]:
        """How many rows a head may have, and how many of them turn, as far as all agree."""
        every = [turning.ways for turning, _, _ in self._by_name.values()]
        return [way for way in every[0] if all(way in ways for ways in every)] if every else []

    def convert(self, name: str, shape: Shape, way: Way) -> tuple[Operation, ...]:
        """What takes the rows of a whole tensor from the other convention to the model's; nothing if none turn."""
        if name not in self:
            return ()
        _, axis, rows = self._by_name[name]
        kinds = [row in rows for row in range(shape[axis])]
        if all(kinds):
            return _by_rows(axis, (self._rotary(name, way),))
        runs = [(kind, len(list(own))) for kind, own in groupby(kinds)]
        groups = next(g for g in range(len(runs), 0, -1) if len(runs) % g == 0 and runs == runs[: len(runs) // g] * g)
        period = runs[: len(runs) // groups]
        sizes = tuple(length * groups for _, length in period)
        only = tuple(place for place, (kind, _) in enumerate(period) if kind)
        length = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        if groups > 1 and by_head(length, sizes, groups, True, 0) is None:
            return ()
        apart = by_head(length, sizes, groups, False, 0) or (Split(0, sizes),)
        joined = by_head(length, sizes, groups, True, 0) or (Concat(0, sizes),)
        return _by_rows(axis, (*apart, self._rotary(name, way, only), *joined))

    def convert_parts(self, name: str, sizes: Sequence[int], groups: int, axis: int, way: Way) -> tuple[Operation, ...]:
        """What takes those parts of a whole to the model's convention that turn in it.

        Args:
            name: Of the whole.
            sizes: Of the parts in their order, along the axis.
            groups: How often they take turns.
            axis: Along which they are joined.
            way: Rows of a head, and how many of them turn.
        """
        if name not in self:
            return ()
        rows = self._by_name[name][2]
        starts = [sum(sizes[:place]) // groups for place in range(len(sizes))]
        only = tuple(place for place, start in enumerate(starts) if start in rows)
        if not only or any(sizes[place] % way[0] for place in only):
            return ()
        return _by_rows(axis, (self._rotary(name, way, only),))

    def convert_each(self, names: Sequence[str], shapes: Sequence[Shape], way: Way) -> tuple[Operation, ...]:
        """What takes those of some tensors to the model's convention that turn as wholes."""
        only = tuple(k for k, (name, shape) in enumerate(zip(names, shapes)) if self._turns(name, shape))
        first = names[only[0]] if only else ""
        return _by_rows(self._by_name[first][1], (self._rotary(first, way, only),)) if only else ()

    def _turns(self, name: str, shape: Shape) -> bool:
        return name in self and len(self._by_name[name][2]) == shape[self._by_name[name][1]]

    def _rotary(self, name: str, way: Way, only: tuple[int, ...] = ()) -> Rotary:
        return Rotary(*way, self._by_name[name][0].in_pairs, only)


def _by_rows(axis: int, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """Operations on rows, also where these stand along the second axis."""
    return (Transpose(), *operations, Transpose()) if axis else operations
