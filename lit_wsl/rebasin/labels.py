"""Labels of tensors: which unit stands at each position of each axis.

A label of a tensor is a list of *factors*. A factor is an integer array of units with as many axes as the tensor; it
has size 1 on the axes it does not depend on. A channel axis is one factor of shape ``(1, C, 1, 1)``; a query of an
attention layer ``(1, heads, 1, head_dim)``. An axis without a factor is not moved by anything. ``varies`` says on which
axes the *values* may differ: what is constant along an axis (a broadcast, zeros) goes with any permutation of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lit_wsl.rebasin.units import Array

MAX_LABEL = 4_000_000
"""Largest label array that is built; what would need more stays fixed."""


@dataclass(frozen=True, eq=False)
class Label:
    """Label of one tensor.

    Attributes:
        shape: Shape of the tensor.
        factors: Arrays of units, see the module.
        varies: Whether the values may differ along each axis.
        tainted: The tensor depends on the example inputs.
        values: For integer tensors that index units (top-k indices): the unit of each index value.
        routed: Rows were picked by a routing decision: they stand in an order of their own.
        segments: For row offsets of a grouped product: the unit of each segment.
        origin: The parameter this tensor is a view or a rescaling of.
        settled: State of the units for which these very factors are known to be settled.
        segmented: An axis of routed rows on which the factors have one place for each *expert*, not for each row: what
            a row is labelled by depends on the expert it was sent to, and the label covers experts that got no row.
    """

    shape: tuple[int, ...]
    factors: tuple[Array, ...] = ()
    varies: tuple[bool, ...] = ()
    tainted: bool = False
    values: Array | None = None
    routed: bool = False
    segments: Array | None = None
    origin: int | None = None
    segmented: int | None = None
    settled: tuple[int, tuple[Array, ...]] | None = None

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
    factors = tuple(f.reshape((1,) * extra + f.shape) for f in label.factors)
    segmented = None if label.segmented is None else label.segmented + extra
    varies = (False,) * extra + label.varies
    return replace(label, shape=(1,) * extra + label.shape, factors=factors, varies=varies, segmented=segmented)


def spread(label: Label, word: str, every: str) -> Label:
    """A label whose axes have the letters of a word, with one axis for each of the letters ``every``, size 1 if new."""
    order = sorted(range(len(word)), key=lambda k: every.index(word[k]))
    shape = tuple(label.shape[word.index(c)] if c in word else 1 for c in every)
    varies = tuple(c in word and label.varies[word.index(c)] for c in every)
    factors = []
    for factor in label.factors:
        moved = factor.transpose(order)
        sizes = {word[k]: factor.shape[k] for k in order}
        factors.append(moved.reshape([sizes.get(c, 1) for c in every]))
    return replace(label, shape=shape, factors=tuple(factors), varies=varies)
