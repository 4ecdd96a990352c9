"""Union-find over units: which positions of which axes have to move together.

Every position of every parameter axis starts as a unit of its own. What a network computes then *unifies* units (they
move together), *freezes* them (they stay), or asks for *blocks*: units that move only together with the block they are
in, like the channels of one attention head. All operations work on whole arrays; unit 0 is "does not move".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Integer = TypeVar("Integer", bound=np.integer[Any])


def mix(*values: int) -> int:
    """64-bit hash of small integers that does not depend on the process (splitmix64)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
        state = state * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def scramble(values: NDArray[np.int64] | Hashes) -> Hashes:
    """64-bit hash of every number of an array, 0 for 0.

    >>> one, two, three, four = scramble(np.array([1, 2, 3, 4])).tolist()
    >>> one + four == two + three
    False
    """
    codes = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    codes = (codes ^ (codes >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93)
    return codes ^ (codes >> np.uint64(32))


def distinct(values: NDArray[Integer]) -> NDArray[Integer]:
    """The distinct numbers of an array, ascending: ``numpy.unique``, which hashes and takes ten times as long.

    >>> distinct(np.array([[5, 1], [1, 7]])).tolist()
    [1, 5, 7]
    """
    ordered = np.sort(values, axis=None)
    first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def distinct_rows(matrix: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row of each kind, and the kind of each row (by a 64-bit hash of its content).

    >>> first, kind = distinct_rows(np.array([[5, 6], [1, 2], [5, 6]]))
    >>> (bool(kind[0] == kind[2]), bool(kind[0] == kind[1]), len(first))
    (True, False, 2)
    """
    weights = np.random.default_rng(0).integers(1, 2**62, matrix.shape[1], dtype=np.uint64) | np.uint64(1)
    values = matrix.astype(np.uint64)
    values ^= values >> np.uint64(7)
    values *= np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(31)
    _, first, kind = np.unique(values @ weights, return_index=True, return_inverse=True)
    return first, kind.reshape(-1).astype(np.int64)


Array = NDArray[np.int64]
FIXED = 0
_MAX_DEPTH = 8


class Units:
    """Union-find over units with block parents, freezing and usage signatures, vectorised over arrays of units."""

    def __init__(self) -> None:
        self._n = 1
        self._link = np.zeros(1024, dtype=np.int64)
        self._parent = np.zeros(1024, dtype=np.int64)  # block a root unit is in; 0: none
        self._frozen = np.zeros(1024, dtype=bool)
        self._frozen[0] = True
        self._bound = np.zeros(1024, dtype=bool)
        self._anchored = np.zeros(1024, dtype=bool)
        self._reason = np.zeros(1024, dtype=np.int16)
        self._signature = np.zeros(1024, dtype=np.uint64)
        self._inside = np.zeros(1024, dtype=np.uint64)  # which blocks a root unit was ever put into
        self.reasons: list[str] = [""]
        self.losses = 0
        """How often units were frozen or collapsed: labels that were looked at before may say less now."""
        self.version = 0
        """Changes whenever a label that was settled might have to be settled again."""

    def __len__(self) -> int:
        return self._n

    def fresh(self, count: int) -> Array:
        """``count`` new units."""
        need = self._n + count
        if need > len(self._link):
            size = max(need, 2 * len(self._link))
            for name in ("_link", "_parent", "_frozen", "_bound", "_anchored", "_reason", "_signature", "_inside"):
                old = getattr(self, name)
                new = np.zeros(size, dtype=old.dtype)
                new[: self._n] = old[: self._n]
                setattr(self, name, new)
        units = np.arange(self._n, need, dtype=np.int64)
        self._link[units] = units
        self._n = need
        return units

    def bind(self, units: Array, blocks: Array) -> None:
        """Bind units to blocks: units of one axis that are told apart by the place on another axis of the tensor.

        They never move between blocks by themselves, as the positions of an activation with both axes could.
        """
        units, blocks = np.broadcast_arrays(units, blocks)
        self._bound[units] = True
        self.enclose(units, blocks)

    def loosen(self, units: Array, reason: str) -> None:
        """The blocks that units are in stay, and units are only bound to them: they change places inside of them."""
        root = distinct(self.find(units.ravel()))
        root = root[(root != FIXED) & (self.parents(root) != FIXED) & ~self._bound[root]]
        self.freeze(self.parents(root), reason)
        self._bound[root] = True
        np.add.at(self._signature, root, scramble(self.parents(root)))

    def enclose(self, units: Array, blocks: Array, known: bool = False) -> None:
        """Put units into blocks, and note it: two blocks may become one later on, and what was inside stays apart.

        ``known``: a new block is put between units and the block that they are in already; there is nothing to note.
        """
        self.version += 1
        self._parent[units] = blocks
        if not known:
            np.add.at(self._inside, units.ravel(), scramble(blocks).ravel())

    def inside(self, units: Array) -> Hashes:
        """A number for all blocks that each unit was ever put into, by itself or as another unit of its class."""
        return self._inside[self.roots(units)]

    def roots(self, units: Array) -> Array:
        """Representative of each unit, frozen or not."""
        root = self._link[units]
        while True:
            above = self._link[root]
            if np.array_equal(above, root):
                break
            root = above
        self._link[units] = root
        return root

    def find(self, units: Array) -> Array:
        """Representative of each unit, 0 for those that are frozen."""
        root = self.roots(units)
        return np.where(self._frozen[root], FIXED, root)

    def parents(self, units: Array) -> Array:
        """The block that each unit is in, 0 if none. A frozen one, too: it still tells apart what is inside."""
        return self.roots(self._parent[self.roots(units)])

    def outwards(self, units: Array, levels: int = _MAX_DEPTH) -> Iterator[Array]:
        """The blocks that units are in, the blocks around these, and so on, until there are none."""
        for _ in range(levels):
            units = self.parents(units)
            if not units.any():
                return
            yield units

    def depth(self, units: Array) -> Array:
        """Number of blocks around each unit."""
        depth = np.zeros(units.shape, dtype=np.int64)
        for level, blocks in enumerate(self.outwards(units, _MAX_DEPTH + 1)):
            if level == _MAX_DEPTH:
                self.freeze(units[blocks != FIXED], "blocks inside one another")
                return np.where(blocks != FIXED, 0, depth)
            depth += blocks != FIXED
        return depth

    def bound(self, units: Array) -> NDArray[np.bool_]:
        """Whether each unit is bound to its block, see :meth:`bind`."""
        return self._bound[self.roots(units)]

    def reason(self, units: Array) -> list[str]:
        """Why each unit is frozen."""
        return [self.reasons[code] for code in self._reason[self.roots(units)]]

    def freeze(self, units: Array, reason: str) -> None:
        """Units stay where they are, and so do the blocks around them."""
        root = distinct(self.roots(units.ravel()))
        if reason not in self.reasons:
            self.reasons.append(reason)
        code = self.reasons.index(reason)
        for _ in range(_MAX_DEPTH):
            root = root[(root != FIXED) & ~self._frozen[root]]
            if not root.size:
                break
            self.losses += 1
            self.version += 1
            self._frozen[root] = True
            self._reason[root] = code
            root = distinct(self.roots(self._parent[root]))
        self._freeze_anchored(code)

    def _freeze_anchored(self, code: int) -> None:
        """Units that have their place in a block stay if the block stays."""
        anchored = np.nonzero(self._anchored[: self._n])[0]
        for _ in range(_MAX_DEPTH):
            anchored = anchored[~self._frozen[anchored]]
            stay = anchored[self._frozen[self.roots(self._parent[anchored])]]
            if not stay.size:
                return
            self._frozen[stay] = True
            self._reason[stay] = code

    def anchor(self, units: Array, slots: Array, code: int) -> None:
        """Units keep their places in their blocks: they move with the block, each into the same slot of another one."""
        root = self.find(units.ravel())
        slot = np.broadcast_to(slots, units.shape).ravel()
        loose = (root != FIXED) & ~self._anchored[root]
        root, slot = root[loose], slot[loose]
        if not root.size:
            return
        codes = np.array([mix(code, int(k)) for k in range(int(slot.max()) + 1)], dtype=np.uint64)
        np.add.at(self._signature, root, codes[slot])
        self._anchored[root] = True
        self.losses += 1
        self.version += 1

    def unify(self, first: Array, second: Array, reason: str = "added to something that stays") -> None:
        """Units of equal places move together; a unit that meets a frozen one is frozen, with its blocks."""
        a, b = self.find(first.ravel()), self.find(second.ravel())
        apart = a != b
        a, b = a[apart], b[apart]
        if not a.size:
            return
        fixed = (a == FIXED) | (b == FIXED)
        if fixed.any():
            self.freeze(np.concatenate([a[fixed], b[fixed]]), reason)
            a, b = a[~fixed], b[~fixed]
        self._merge(a, b)

    def _merge(self, a: Array, b: Array, depth: int = 0) -> None:
        self.version += 1
        members = distinct(np.concatenate([a, b]))
        above = self._parent[members].copy()
        while True:
            a, b = self.roots(a), self.roots(b)
            apart = a != b
            if not apart.any():
                break
            a, b = a[apart], b[apart]
            np.minimum.at(self._link, np.maximum(a, b), np.minimum(a, b))
        root = self.roots(members)
        inside = self._inside[members]
        self._inside[members] = 0
        np.add.at(self._inside, root, inside)
        frozen = np.zeros(self._n, dtype=bool)
        frozen[root[self._frozen[members]]] = True
        lost = root[frozen[root]]
        self._anchored[root[self._anchored[members]]] = True
        has = above != FIXED
        root, above = root[has], self.roots(above[has])
        if root.size:
            order = np.argsort(root, kind="stable")
            root, above = root[order], above[order]
            self._parent[root] = above
            same = root[1:] == root[:-1]
            one, two = above[1:][same], above[:-1][same]
            differ = self.roots(one) != self.roots(two)
            if differ.any():
                if depth > _MAX_DEPTH:
                    self.freeze(np.concatenate([one, two]), "blocks inside one another")
                else:
                    live = self.find(one) != self.find(two)
                    stuck = differ & ((self.find(one) == FIXED) | (self.find(two) == FIXED)) & live
                    self.freeze(np.concatenate([one[stuck], two[stuck]]), "added to something that stays")
                    # In two different blocks that both stay: what is in both of them stays, too.
                    crossed = differ & (self.find(one) == FIXED) & (self.find(two) == FIXED)
                    lost = np.concatenate([lost, root[1:][same][crossed]])
                    both = differ & ~stuck & (self.find(one) != FIXED)
                    self._merge_blocks(root[1:][same][both], one[both], two[both], depth)
            looped = self.roots(self._parent[root]) == root
            self._parent[root[looped]] = FIXED
        if lost.size:
            self.freeze(lost, "added to something that stays")

    def _merge_blocks(self, units: Array, one: Array, two: Array, depth: int) -> None:
        """Units are in two blocks at once: equal blocks become one; smaller ones are put into the larger ones.

        Blocks that overlap otherwise become one, too. What was inside of them is told apart by :meth:`inside`.
        """
        one, two = self.roots(one), self.roots(two)
        pairs = np.unique(np.stack([one, two]), axis=1)
        ones, twos, count = len(distinct(one)), len(distinct(two)), pairs.shape[1]
        if ones == count > twos:
            inner, outer = one, two
        elif twos == count > ones:
            inner, outer = two, one
        else:
            self._merge(one, two, depth + 1)
            return
        around = self.parents(inner)
        if any(np.isin(blocks, inner).any() for blocks in self.outwards(outer)):
            self._merge(one, two, depth + 1)
            return
        self._parent[units] = inner
        free = around == FIXED
        pairs = np.unique(np.stack([inner[free], outer[free]]), axis=1)
        self.enclose(pairs[0], pairs[1])
        apart = ~free & (around != outer)
        if apart.any():
            self._merge(around[apart], outer[apart], depth + 1)

    def collapse(self, units: Array, blocks: Array) -> None:
        """Units keep their place inside their block: from now on they are labelled by the block alone."""
        units, blocks = np.broadcast_arrays(units, blocks)
        root, block = self.roots(units.ravel()), self.roots(blocks.ravel())
        apart = (root != block) & ~self._frozen[root] & (root != FIXED)
        root, block = root[apart], block[apart]
        if not root.size:
            return
        root, first = np.unique(root, return_index=True)
        target = block[first]
        self._collapse_between(root, target)
        root, target = self.roots(root), self.roots(target)
        root, target = root[root != target], target[root != target]
        self._freeze_between(root, target)
        stuck = self._frozen[target]
        self.freeze(root[stuck], "its block stays")
        root, target = root[~stuck], target[~stuck]
        self.losses += 1
        self.version += 1
        self._link[root] = target
        if not np.array_equal(self.roots(block), self.roots(units.ravel()[apart])):
            self.unify(block, units.ravel()[apart])

    def _collapse_between(self, units: Array, target: Array) -> None:
        """Units are about to stand for a block further out than theirs: the blocks in between stay within it, too."""
        levels = list(self.outwards(units))
        depth = np.full(len(units), -1)
        for level, blocks in enumerate(levels):
            depth[blocks == target] = level
        for level in range(int(depth.max(initial=0))):
            between = depth > level
            self.collapse(levels[level][between], target[between])

    def _freeze_between(self, units: Array, target: Array) -> None:
        """Units are about to stand for another block than theirs: if neither is inside the other, both stay.

        Units that are only bound to a block may leave it.
        """
        around = np.where(self._bound[units], FIXED, self.parents(units))
        inside = (around == FIXED) | (around == target)
        for blocks in self.outwards(target, _MAX_DEPTH - 1):
            inside |= around == blocks
        if not inside.all():
            self.freeze(np.concatenate([around[~inside], target[~inside]]), "used in blocks that overlap")

    def sign(self, units: Array, code: int, once: bool = False) -> None:
        """Note that a computation used these units: only units of equal use are interchangeable."""
        flat = self.find(units.ravel())
        if once:
            flat = distinct(flat)
        np.add.at(self._signature, flat, np.uint64(code))

    def signatures(self) -> Hashes:
        """Signature of every root: the sum over the units it stands for."""
        total = np.zeros(self._n, dtype=np.uint64)
        np.add.at(total, self.roots(np.arange(self._n)), self._signature[: self._n])
        return total


def blocks_of_rows(units: Units, matrix: Array) -> Array | None:
    """The block of each row of a matrix of units, which move only together with it; None if they are in others already.

    Rows of equal content share their block; the block of rows without a unit that moves is 0.

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
                high = matrix.max(axis=1)[:, None]
                return value if (np.where(live, matrix, high) == high).all() else None
            return _insert(units, below, live, row_id, value)
        if level == 0:
            return _insert(units, current, live, distinct_rows(matrix)[1], None)
        below, level = current, level - 1


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
    """The units of each row become one and the same, in no block but the innermost one that they are all bound to."""
    live = units.find(matrix) != FIXED
    made = np.where(live.any(axis=1), units.fresh(len(matrix)), FIXED)
    around, below = np.zeros(len(matrix), dtype=np.int64), matrix
    for above in units.outwards(matrix):
        low = np.where(live, above, np.iinfo(np.int64).max).min(axis=1)
        high = np.where(live & units.bound(below), above, FIXED).max(axis=1)
        around = np.where((around == FIXED) & (low == high), high, around)
        below = above
    units.collapse(matrix[live], np.broadcast_to(made[:, None], matrix.shape)[live])
    units.bind(made[around != FIXED], around[around != FIXED])
    frozen = ~live.all(axis=1)
    units.freeze(made[frozen], "stays in some blocks of another axis")
    return units.find(made)
