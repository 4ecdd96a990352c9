"""Blocks that the rows of a matrix of units form: found where they exist, made where they do not.

When a computation mixes the units along one axis of a tensor and keeps those along another apart (scores of attention
heads, sums over the channels of a group), the units of each place on the second axis move only together: they are a
block. Laid out as a matrix, with one row for each such place, every row has a block around it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lit_wsl.rebasin.hashing import distinct, distinct_rows
from lit_wsl.rebasin.units import FIXED, Array, Units


def blocks_of_rows(units: Units, matrix: Array) -> Array | None:
    """The block of each row of a matrix of units: its units move only together with the row.

    Rows of equal content share their block.

    Returns:
        One unit per row, frozen or not (0 for rows without a unit that moves); None if the units are in other
        blocks already.

    >>> units = Units()
    >>> heads = units.fresh(6).reshape(2, 3)
    >>> made = blocks_of_rows(units, heads)
    >>> bool((units.parents(heads) == made[:, None]).all()), bool((blocks_of_rows(units, heads) == made).all())
    (True, True)
    >>> blocks_of_rows(units, heads.T) is None
    True
    """
    rows, row_kind = distinct_rows(matrix)
    columns, _ = distinct_rows(np.ascontiguousarray(matrix[rows].T))
    found = _of_distinct_rows(units, matrix[rows][:, columns])
    return None if found is None else found[row_kind]


def _of_distinct_rows(units: Units, matrix: Array) -> Array | None:
    matrix = units.roots(matrix)
    live = units.find(matrix) != FIXED
    any_live = live.any(axis=1)
    if not any_live.any():
        return np.zeros(len(matrix), dtype=np.int64)
    depth = units.depth(matrix)
    row_id: Array | None = None
    level = int(depth[live].min())
    current, below = matrix, None
    # From the units outwards: the first level at which each row is one and the same block.
    while True:
        while (deeper := live & (depth > level)).any():
            current = np.where(deeper, units.parents(current), current)
            depth = depth - deeper
        value = np.where(live, current, FIXED).max(axis=1)
        if (np.where(live, current, value[:, None]) == value[:, None]).all():
            row_id = distinct_rows(matrix)[1] if row_id is None else row_id
            pairs = np.unique(np.stack([row_id[any_live], value[any_live]]), axis=1)
            if len(distinct(pairs[1])) == len(distinct(pairs[0])):
                return value
            if below is None:
                return value if _same_in_rows(matrix, live) else None
            return _insert(units, below, live, row_id, value)
        if level == 0:
            return _insert(units, current, live, distinct_rows(matrix)[1], None)
        below, level = current, level - 1


def _same_in_rows(matrix: Array, live: NDArray[np.bool_]) -> bool:
    high = matrix.max(axis=1)[:, None]
    return bool((np.where(live, matrix, high) == high).all())


def _insert(units: Units, members: Array, live: NDArray[np.bool_], row_id: Array, around: Array | None) -> Array | None:
    """New blocks for rows, between their members and the blocks around these; None if rows share members."""
    rows = np.broadcast_to(row_id[:, None], members.shape)[live]
    pairs = np.unique(np.stack([members[live], rows]), axis=1)
    if len(distinct(pairs[0])) != pairs.shape[1]:
        return None
    made = units.fresh(int(row_id.max()) + 1)
    units.enclose(pairs[0], made[pairs[1]])
    if around is not None:
        units.enclose(made[row_id], around, known=True)
    return np.where(live.any(axis=1), made[row_id], FIXED)


def bound_across(units: Units, matrix: Array) -> bool:
    """Whether the rows of a matrix run across the blocks that its units are bound to."""
    live = units.find(matrix) != FIXED
    if not live.any() or not units.bound(matrix[live]).all():
        return False
    above = units.parents(matrix)
    low = np.where(live, above, np.iinfo(np.int64).max).min(axis=1)
    high = np.where(live, above, -1).max(axis=1)
    return bool((low < high).any())


def release(units: Units, matrix: Array) -> Array:
    """The units of each row become one and the same, in no block."""
    live = units.find(matrix) != FIXED
    made = np.where(live.any(axis=1), units.fresh(len(matrix)), FIXED)
    units.collapse(matrix[live], np.broadcast_to(made[:, None], matrix.shape)[live])
    frozen = ~live.all(axis=1)
    units.freeze(made[frozen], "stays in some blocks of another axis")
    return units.find(made)
