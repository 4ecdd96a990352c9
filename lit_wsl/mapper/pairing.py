"""What deciding a class of items takes and gives: where they stand, pairs, and doubts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from lit_wsl.mapper.roles import MAX_TENSORS, Make, make_of
from lit_wsl.mapper.tree import Item, place_end, place_in, relative, shape_key
from lit_wsl.structure.info import Shape


@dataclass(frozen=True)
class Region:
    """Where items are compared: below ``source`` and ``target``.

    Attributes:
        source: Root of the source's side.
        target: Root of the target's side.
        complete: Whether both sides have the same number of elements, so that everything must find a partner and
            being the only one of a size is proof enough.
        shapes: How many tensors of each shape (up to order and ones) the whole models have, source and target.
    """

    source: Item
    target: Item
    complete: bool
    shapes: tuple[Counter[Shape], Counter[Shape]] | None = None

    @cached_property
    def make(self) -> Make | None:
        """The make of the region, if it is no larger than a block."""
        names = [[relative(t, root) for t in root.tensors[: MAX_TENSORS + 1]] for root in (self.source, self.target)]
        return make_of(names[0], names[1])

    @cached_property
    def renumbered(self) -> frozenset[str]:
        """Containers whose members were renumbered: an equal path there leads to tensors of different shapes.

        Where a layer was inserted into a sequence, equal numbers no longer mean equal places.
        """
        shapes = {relative(t, self.source): shape_key(t.shape) for t in self.source.tensors}
        found = set()
        for tensor in self.target.tensors:
            path = relative(tensor, self.target)
            if path in shapes and shapes[path] != shape_key(tensor.shape):
                container, _, member = place_in(tensor, self.target).rpartition(".")
                if member.isdigit():
                    found.add(container)
        return frozenset(found)

    def stands_by_number(self, s: Item, t: Item) -> bool:
        """Whether two items agree by a number that says nothing, since their container was renumbered."""
        return any(
            member.isdigit() and container in self.renumbered
            for container, _, member in (
                place_in(i, r).rpartition(".") for i, r in ((s, self.source), (t, self.target))
            )
        )

    @property
    def key(self) -> tuple[int, int]:
        """Equal for regions of the same structure, which are solved once."""
        return self.source.structure, self.target.structure

    @property
    def spans(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Ordinals of the region's tensors on both sides: the first, and the one behind the last."""
        s, t = self.source.positions, self.target.positions
        return (s[0], s[-1] + 1), (t[0], t[-1] + 1)

    def places(self, s: Item, t: Item) -> tuple[str, str, str, str]:
        """Where two items stand: their paths in the region, and the ends of their paths that other blocks share."""
        return place_in(s, self.source), place_in(t, self.target), place_end(s), place_end(t)

    def distinct(self, s: Item, t: Item) -> bool:
        """Whether the items are matrices of a shape that nothing else in either model has."""
        if self.shapes is None or s.rank < 2 or s.profile != t.profile:
            return False
        return all(counts[shape_key(i.main.shape)] == 1 for counts, i in zip(self.shapes, (s, t)))


@dataclass(frozen=True)
class Pair:
    """A decided pair.

    Attributes:
        source: Item of the source.
        target: Item of the target.
        margin: How much worse the best alternative assignment would be.
        reason: What decided, in words.
        certain: Whether something other than order decided, so that the pair may vote on order.
    """

    source: Item
    target: Item
    margin: float
    reason: str
    certain: bool = False


@dataclass(frozen=True)
class ItemDoubt:
    """Targets and sources that belong together in an order that nothing decides."""

    targets: tuple[Item, ...]
    sources: tuple[Item, ...]
    reason: str


@dataclass
class Pairing:
    """The decisions of a class.

    Attributes:
        pairs: What belongs together.
        doubts: What belongs together in an order that nothing decides.
        closed: What has no partner as a whole, nor has anything inside it: blocks that the other side doesn't have.
    """

    pairs: list[Pair] = field(default_factory=list)
    doubts: list[ItemDoubt] = field(default_factory=list)
    closed: list[Item] = field(default_factory=list)
