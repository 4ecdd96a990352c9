"""What computing does to labels: it unifies the units of operands, freezes them, or makes blocks of them.

Tensors that are combined position by position are *joined*: they all have to move alike. Axes that are summed over are
*reduced*: what is left of the units along them are blocks. Axes whose order counts are *fixed*: nothing moves along
them, and what stands there moves in blocks. An Einstein sum is made of a join and a reduction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lit_wsl.rebasin.inference.units import FIXED, Array, Units, blocks_of_rows, bound_across, mix, release

MAX_LABEL = 4_000_000
"""Largest label array that is built; what would need more stays fixed."""


@dataclass(frozen=True, eq=False)
class Label:
    """Label of one tensor."""

    shape: tuple[int, ...]  # shape of the tensor
    factors: tuple[Array, ...] = ()  # arrays of units, see the module
    varies: tuple[bool, ...] = ()  # whether the values may differ along each axis
    tainted: bool = False  # the tensor depends on the example inputs
    values: Array | None = None  # for integer tensors that index units (top-k indices): the unit of each index value
    routed: bool = False  # rows were picked by a routing decision: they stand in an order of their own
    segments: Array | None = None  # for row offsets of a grouped product: the unit of each segment
    origin: int | None = None  # the parameter this tensor is a view or a rescaling of
    # an axis of routed rows on which the factors have one place for each *expert*, not for each row: what a row is
    # labelled by depends on the expert it was sent to, and the label covers experts that got no row
    segmented: int | None = None
    # state of the units for which these very factors are known to be settled
    settled: tuple[int, tuple[Array, ...]] | None = None
    # what was cut and turned on axes that nothing moves, as a number: parts of one tensor that were treated differently
    # there are told apart where they are put side by side
    history: int = 0
    # like factors, with numbers in place of units: any order of these numbers leaves the values as they are, though
    # they vary along the axis (a mask for each sequence, repeated for each head, on one axis)
    free: tuple[Array, ...] = ()

    def __post_init__(self) -> None:
        """Values vary everywhere unless something else is said."""
        if len(self.varies) != len(self.shape):
            object.__setattr__(self, "varies", (True,) * len(self.shape))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


def depends(factor: Array) -> frozenset[int]:
    """Axes on which a factor depends."""
    return frozenset(axis for axis, size in enumerate(factor.shape) if size > 1)


def _matrix(factor: Array, gone: Sequence[int], keep: Sequence[int]) -> Array:
    """One row for each place on the axes ``keep``, one column for each on the axes ``gone``."""
    rest = [axis for axis in range(factor.ndim) if axis not in gone and axis not in keep]
    rows = int(np.prod([factor.shape[a] for a in keep]))
    return np.ascontiguousarray(factor.transpose([*keep, *gone, *rest])).reshape(rows, -1)


def compress(factor: Array) -> Array:
    """Size 1 on every axis along which the units are equal."""
    for axis, size in enumerate(factor.shape):
        if size > 1:
            first = factor.take([0], axis=axis)
            if (factor == first).all():
                factor = first
    return factor


def lifted(label: Label, ndim: int) -> Label:
    """A label with axes of size 1 in front, as for broadcasting; values do not vary along them."""
    extra = ndim - label.ndim
    if extra <= 0:
        return label
    factors, free = (tuple(f.reshape((1,) * extra + f.shape) for f in of) for of in (label.factors, label.free))
    segmented = None if label.segmented is None else label.segmented + extra
    varies, shape = (False,) * extra + label.varies, (1,) * extra + label.shape
    return replace(label, shape=shape, factors=factors, varies=varies, segmented=segmented, free=free)


def spread(label: Label, word: str, every: str) -> Label:
    """A label whose axes have the letters of a word, with one axis for each of the letters ``every``, size 1 if new."""
    order = sorted(range(len(word)), key=lambda k: every.index(word[k]))
    shape = tuple(label.shape[word.index(c)] if c in word else 1 for c in every)
    varies = tuple(c in word and label.varies[word.index(c)] for c in every)

    def turned(factor: Array) -> Array:
        sizes = {word[k]: factor.shape[k] for k in order}
        return factor.transpose(order).reshape([sizes.get(c, 1) for c in every])

    factors, free = (tuple(turned(factor) for factor in of) for of in (label.factors, label.free))
    return replace(label, shape=shape, factors=factors, varies=varies, free=free)


def _free_of_all(labels: Sequence[Label]) -> tuple[Array, ...]:
    """The orders that leave every one of some tensors as it is."""

    def same_for(label: Label, free: Array) -> bool:
        still = not any(label.varies[axis] and label.shape[axis] > 1 for axis in depends(free))
        return still or any(np.array_equal(free, other) for other in label.free)

    every = [free for label in labels for free in label.free]
    kept = [free for k, free in enumerate(every) if not any(np.array_equal(free, other) for other in every[:k])]
    return tuple(free for free in kept if all(same_for(label, free) for label in labels))


_ROUNDS = 6


@dataclass
class Algebra:
    """What computing does to labels. State is the :class:`Units` and the number of the current node."""

    units: Units = field(default_factory=Units)
    node: int = 0
    joins: list[tuple[Array, Array]] = field(default_factory=list)
    """Factors on different axes of one tensor that have axes in common."""
    clashes: list[tuple[Array, Array]] = field(default_factory=list)
    """Independent factors of one label that were put onto one axis: finer labels may help, see :class:`Joint`."""
    unaligned: list[tuple[Label, Array, Array]] = field(default_factory=list)
    """Labels of one axis that met labels on more axes: (label, its factor, the other one)."""
    later: bool = False
    """Which of two kinds of blocks that run across each other still move: those that were found first, or later."""
    conflicts: int = 0
    """How often there were such blocks."""
    _told_apart: int = 0

    # ---- factors -----------------------------------------------------------------------------------------------------

    def settle(self, label: Label, single: bool = False) -> Label:
        """Factors by the representatives of their units, without those that say nothing.

        A tensor that belongs to one unit as a whole (one channel cut out) is not followed further, unless ``single``;
        from here on the unit is told apart from every other, since nothing says in which order and under which view
        its tensor meets those of the others (``a - b``, ``q @ k.T``, ``a + b.T``).
        """
        known = label.settled
        if not label.factors or (known and known[0] == self.units.version and known[1] is label.factors):
            return label
        kept: list[Array] = []
        for factor in label.factors:
            found = compress(self.units.find(factor))
            if not found.any():
                continue
            if depends(found) or single:
                kept.append(found)
            else:
                self.tell_apart(found)
        factors = tuple(self.prune(kept))
        return replace(label, factors=factors, settled=None if single else (self.units.version, factors))

    def tell_apart(self, units: Array) -> Array:
        """Note that these units are interchangeable with no others."""
        self._told_apart += 1
        self.units.sign(units, mix(self.node, 991, self._told_apart))
        return units

    def prune(self, factors: Sequence[Array]) -> list[Array]:
        """Leave out factors that are repeated, or are the blocks of another factor."""
        kept: list[Array] = []
        for i, factor in enumerate(factors):
            mine = depends(factor)
            implied = False
            for j, other in enumerate(factors):
                if i == j or not mine <= depends(other):
                    continue
                if mine == depends(other):
                    if j < i and np.array_equal(factor, other):
                        implied = True
                    continue
                # Both have as many axes: comparing them broadcasts.
                implied |= any((factor == blocks).all() for blocks in self.units.outwards(other, 4))
            if not implied:
                kept.append(factor)
        return kept

    def blocks(self, factor: Array, along: Iterable[int]) -> Array | None:
        """The blocks that fibres of a factor along some axes form; None if nothing is left that moves.

        Where the units are in blocks the other way round, their order along the other axes is fixed instead.
        """
        factor = compress(self.units.find(factor))
        gone, keep = self._sides(factor, along)
        if not gone:
            return factor
        if not keep:
            return None
        found = self._blocks(factor, gone, keep)
        if found is None:
            self.conflicts += 1
            found = self._later_blocks(factor, gone, keep)
        if found is None:
            self.fix(factor, keep, "used in blocks that overlap")
            return None
        found = self.units.find(found)
        return found if found.any() else None

    def _sides(self, factor: Array, along: Iterable[int]) -> tuple[list[int], list[int]]:
        dims = depends(factor)
        gone = sorted(dims.intersection(along))
        return gone, sorted(dims.difference(gone))

    def _blocks(self, factor: Array, gone: Sequence[int], keep: Sequence[int]) -> Array | None:
        """One block for each place on the axes ``keep``, frozen or not; None if the units are in other blocks."""
        matrix = _matrix(factor, gone, keep)
        shape = [factor.shape[axis] if axis in keep else 1 for axis in range(factor.ndim)]
        across = bound_across(self.units, matrix)
        found = release(self.units, matrix) if across else blocks_of_rows(self.units, matrix)
        return None if found is None else found.reshape(shape)

    def _later_blocks(self, factor: Array, gone: Sequence[int], keep: Sequence[int]) -> Array | None:
        """Blocks across those that units are in, which stay then: each of the new ones runs through them alike."""
        if not self.later:
            return None
        matrix = self.units.find(_matrix(factor, gone, keep))
        live = matrix != FIXED
        around = np.where(live, self.units.parents(matrix), FIXED)
        if (around != around[live.any(axis=1).argmax()])[live.any(axis=1)].any():
            return None
        self.units.loosen(factor, "used in blocks that overlap")
        found = self._blocks(compress(self.units.find(factor)), gone, keep)
        return None if found is None else self.units.find(found)

    def fix(self, factor: Array, along: Iterable[int], reason: str) -> None:
        """The order along some axes stays.

        Either whole blocks of all places along them still move, each unit in its slot; or, where the units are in
        blocks the other way round, these blocks stay and what is inside of them still moves.
        """
        factor = compress(self.units.find(factor))
        gone, keep = self._sides(factor, along)
        if not gone:
            return
        if (bound := self._left(factor, gone, keep)) is not None:
            self.fix(bound, gone, reason)
        inner = self._blocks(factor, gone, keep) if keep else None
        if inner is not None and self.units.find(inner).any():
            factor = compress(self.units.find(factor))
            shape = [n if a in gone else 1 for a, n in enumerate(factor.shape)]
            self.units.anchor(factor, np.arange(int(np.prod(shape))).reshape(shape), mix(self.node, 313))
            return
        outer = self._blocks(factor, keep, gone) if keep and inner is None else None
        self.units.freeze(factor if outer is None else outer, reason)

    def freeze(self, label: Label, reason: str) -> None:
        """Everything that moves this tensor stays."""
        for factor in label.factors:
            self.units.freeze(factor, reason)
        self.freeze_named(label, reason)

    def freeze_named(self, label: Label, reason: str = "routing indices that are computed with") -> None:
        """The units that the values of this tensor name stay."""
        for named in (label.values, label.segments):
            if named is not None:
                self.units.freeze(named, reason)

    def pin(self, factor: Array, along: Iterable[int], reason: str, blocks_stay: bool = True) -> Array | None:
        """The order along some axes stays, and these axes are used up: what remains are whole blocks.

        Blocks that units are bound to along these axes stay, too, but for ``blocks_stay=False``.
        """
        factor = compress(self.units.find(factor))
        gone, keep = self._sides(factor, along)
        if not gone:
            return factor
        if blocks_stay and (bound := self._left(factor, gone, keep)) is not None:
            self.pin(bound, gone, reason)
        block = self._blocks(factor, gone, keep) if keep else None
        if keep and block is None:
            self.conflicts += 1
            block = self._later_blocks(factor, gone, keep)
        if block is None or not self.units.find(block).any():
            self.units.freeze(factor, reason)
            return None
        self.units.collapse(factor, self.units.find(block))
        return self.units.find(block)

    def _left(self, factor: Array, gone: Sequence[int], keep: Sequence[int]) -> Array | None:
        """The blocks that units are bound to, where the units are about to leave them; None where they are not."""
        if not keep or not bound_across(self.units, _matrix(factor, gone, keep)):
            return None
        return self.units.find(self.units.parents(factor))

    def pinned(self, label: Label, along: Iterable[int], reason: str) -> Label:
        """A label with the order along some axes fixed."""
        along = list(along)
        factors = [self.pin(factor, along, reason) for factor in label.factors]
        return self.settle(replace(label, factors=tuple(f for f in factors if f is not None)))

    def fixed(self, label: Label, along: Iterable[int], reason: str) -> Label:
        """A label with the order along some axes fixed; unlike with :meth:`pinned`, positions keep units of their own.

        So they can be followed when their order is changed later on.
        """
        along = list(along)
        for factor in label.factors:
            self.fix(factor, along, reason)
        return self.settle(label)

    def unsegmented(self, label: Label, axes: Iterable[int] | None = None) -> Label:
        """Labels by expert end where rows are mixed: from there on the units are the same for all experts."""
        if label.segmented is None or (axes is not None and label.segmented not in set(axes)):
            return label
        mixed = "rows of different experts are mixed"
        factors = [self.pin(factor, [label.segmented], mixed, blocks_stay=False) for factor in label.factors]
        kept = tuple(factor for factor in factors if factor is not None)
        return self.settle(replace(label, factors=kept, segmented=None))

    def sign(self, label: Label, operand: int) -> None:
        """Note that the current computation used the units of a label."""
        for factor in label.factors:
            code = mix(self.node, operand, *sorted(depends(factor)))
            self.units.sign(factor, code, once=label.routed)

    # ---- computing ---------------------------------------------------------------------------------------------------

    def join(
        self, labels: Sequence[Label], shape: Sequence[int], reason: str = "combined with something that stays"
    ) -> Label:
        """Combine operands position by position, with broadcasting: they all have to move alike."""
        shape = tuple(shape)
        aligned = [lifted(self.settle(label), len(shape)) for label in labels]
        for operand, label in enumerate(aligned):
            self.sign(label, operand)
        varies = tuple(any(label.varies[a] and label.shape[a] > 1 for label in aligned) for a in range(len(shape)))
        tainted = any(label.tainted for label in labels)
        routed = any(label.routed for label in labels)
        origins = [label.origin for label in labels if label.shape == shape and label.origin is not None]
        moving = [label for label in aligned if label.factors]
        anywhere = frozenset().union(*(depends(factor) for label in moving for factor in label.factors))
        aligned = [self._made_free(label, anywhere) for label in aligned]
        origin = origins[0] if len(origins) == 1 and not tainted else None
        segmented = next((label.segmented for label in aligned if label.segmented is not None), None)
        result = Label(shape, (), varies, tainted, routed=routed, origin=origin, segmented=segmented)
        if not moving:
            return replace(result, free=_free_of_all(aligned))
        for _ in range(_ROUNDS):
            # What is lost by one operand may be lost by the others, too: until nothing more is lost.
            before = self.units.losses
            self._note_unaligned(aligned)
            aligned = self._pin_where_fixed(self._with_bindings(aligned), reason)
            factors = self._reconcile([factor for label in aligned for factor in label.factors], reason)
            if self.units.losses == before:
                return self.settle(replace(result, factors=tuple(factors)))
            aligned = [self.settle(label) for label in aligned]
        for factor in factors:
            self.units.freeze(factor, reason)
        return result

    def _made_free(self, label: Label, moved: frozenset[int]) -> Label:
        """A label with units of its own, new ones at each use, for the free orders on axes that others are moved on."""
        needed = [free for free in label.free if depends(free) & moved]
        made = tuple(self.tell_apart(self.units.fresh(int(free.max()) + 1))[free] for free in needed)
        return replace(label, factors=(*label.factors, *made)) if made else label

    def _note_unaligned(self, labels: Sequence[Label]) -> None:
        """Note where a tensor has the same units for each place on an axis, and another has different ones."""
        for label in labels:
            for factor in label.factors if label.origin is not None or len(label.factors) > 1 else ():
                mine = depends(factor)
                for other in (f for one in labels if one is not label for f in one.factors):
                    beyond = depends(other) - mine
                    if mine < depends(other) and any(label.shape[axis] > 1 for axis in beyond):
                        self.unaligned.append((label, factor, other))

    def _with_bindings(self, labels: Sequence[Label]) -> list[Label]:
        """Labels with the blocks beside them that units are bound to, where other operands make units leave these."""
        found = []
        for label in labels:
            others = [depends(f) for one in labels if one is not label for f in one.factors]
            factors = list(label.factors)
            for factor in factors:
                mine = depends(factor)
                for along in (mine - other for other in others if mine & other and mine - other):
                    if label.segmented in along:  # experts do not label rows
                        continue
                    around = self._left(factor, *self._sides(factor, along))
                    if around is not None and around.any():
                        factors.append(compress(around))
                        break
            found.append(label if len(factors) == len(label.factors) else replace(label, factors=tuple(factors)))
        return found

    def _pin_where_fixed(self, labels: Sequence[Label], reason: str) -> list[Label]:
        """Where one operand moves along an axis and another varies there without moving, nothing may move."""
        moved = [frozenset().union(*(depends(f) for f in label.factors)) for label in labels]
        anywhere = frozenset().union(*moved)
        fixed = {
            axis
            for axis in anywhere
            for label, mine in zip(labels, moved, strict=True)
            if label.shape[axis] > 1 and label.varies[axis] and axis not in mine
        }
        # Along routed rows nothing moves: places of their labels are experts, not positions.
        fixed.difference_update(label.segmented for label in labels if label.segmented is not None)
        if not fixed:
            return list(labels)
        return [self.fixed(label, fixed, reason) for label in labels]

    def _reconcile(self, factors: list[Array], reason: str) -> list[Array]:
        """Make factors of several operands agree: equal axes unify, overlapping ones agree on their blocks."""
        by_axes: dict[frozenset[int], Array] = {}
        for factor in factors:
            mine = depends(factor)
            if mine in by_axes:
                self.units.unify(by_axes[mine], factor, reason)
            else:
                by_axes[mine] = factor
        keys = sorted(by_axes, key=lambda axes: (len(axes), sorted(axes)))
        for i, one in enumerate(keys):
            for two in keys[i + 1 :]:
                # What was found for an earlier pair may have made a factor depend on less.
                a, b = (compress(self.units.find(by_axes[key])) for key in (one, two))
                common = depends(a) & depends(b)
                if not common:
                    continue
                first, second = self.blocks(a, one - common), self.blocks(b, two - common)
                if first is None or second is None:
                    for factor in (a, b):
                        self.fix(factor, common, reason)
                    continue
                self.joins.append((a, b))
                wide = np.broadcast_shapes(first.shape, second.shape)
                self.units.unify(np.broadcast_to(first, wide), np.broadcast_to(second, wide), reason)
        return [by_axes[key] for key in keys]

    def reduce(self, label: Label, axes: Iterable[int], keepdim: bool) -> Label:
        """Sum, mean, maximum over axes."""
        label = self.settle(label)
        axes = sorted({axis % max(label.ndim, 1) for axis in axes})
        label = self.unsegmented(label, axes)
        segmented = label.segmented
        kept = tuple(f for f in (self.blocks(factor, axes) for factor in label.factors) if f is not None)
        if keepdim:
            shape = tuple(1 if a in axes else n for a, n in enumerate(label.shape))
            varies = tuple(a not in axes and v for a, v in enumerate(label.varies))
            return self.settle(Label(shape, kept, varies, label.tainted, routed=label.routed, segmented=segmented))
        segmented = None if segmented is None else segmented - sum(a < segmented for a in axes)
        stay = [a for a in range(label.ndim) if a not in axes]
        kept = tuple(f.reshape([f.shape[a] for a in stay]) for f in kept)
        shape = tuple(label.shape[a] for a in stay)
        varies = tuple(label.varies[a] for a in stay)
        return self.settle(Label(shape, kept, varies, label.tainted, routed=label.routed, segmented=segmented))

    def normalise(self, label: Label, axes: Iterable[int]) -> Label:
        """Softmax, norms: each position depends on all along some axes, symmetrically."""
        label = self.settle(label)
        axes = sorted({axis % max(label.ndim, 1) for axis in axes})
        for factor in label.factors:
            self.blocks(factor, axes)
        return self.settle(replace(label, values=None, segments=None))

    def contract(self, labels: Sequence[Label], letters: Sequence[str], out: str, sizes: dict[str, int]) -> Label:
        """Einstein sum of labelled tensors: join over all letters, reduce those that are not in ``out``."""
        every = out + "".join(sorted({c for word in letters for c in word if c not in out}))
        shape = tuple(sizes[c] for c in every)
        over_all = [spread(self.settle(label), word, every) for label, word in zip(labels, letters, strict=True)]
        joined = self.join(over_all, shape, "multiplied with something that stays")
        reduced = self.reduce(joined, range(len(out), len(every)), keepdim=False)
        return replace(reduced, varies=(True,) * len(out))
