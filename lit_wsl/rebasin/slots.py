"""Checks of a finished run: what is found must hold at every operation, whatever was unified and frozen later on.

*Positions of one unit keep their order.* A unit may stand at several positions of an axis (a channel behind a flatten,
both halves of a rotary pair). A spec says which unit stands where, and positions of one unit are told apart by their
order. So when two units change places, the first position of one goes where the first of the other was, on every axis.
An operation that puts positions elsewhere (a roll, a transposed view) must commute with this. Whether it does is seen
by applying its rule once more with a unit of its own for every position, and comparing where the positions of
interchangeable units went.

*Labels of one tensor agree.* Where a tensor is labelled on the axes (head, channel) and on (head) alone, a channel must
be in the block of its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lit_wsl.rebasin.algebra import Algebra
from lit_wsl.rebasin.hashing import distinct, scramble
from lit_wsl.rebasin.labels import MAX_LABEL, Label, compress, depends
from lit_wsl.rebasin.run import Move, Run
from lit_wsl.rebasin.units import FIXED, Array, Units


def crossed_slots(run: Run, group_of: Array, colour: np.ndarray) -> list[Array]:
    """Units whose positions are moved in another order than those of units that they may change places with.

    Args:
        run: A finished run.
        group_of: Group of each unit, -1 for none.
        colour: Colour of each unit: within a group only units of one colour change places.

    Returns:
        Arrays of units that must stay.
    """
    found = []
    for move in run.moves:
        factors = [factor for label in move.labels.values() for factor in label.factors]
        repeated = any(_repeats(run.algebra.units, factor) for factor in factors)
        if repeated and (units := _crossed(run, move, group_of, colour)) is not None:
            found.append(units)
    return found


def torn_joins(algebra: Algebra) -> list[Array]:
    """Units that label the same places of a tensor, but do not move together.

    Factors on the axes (head, channel) and (head) of one tensor agree where each unit of the first is in the block of
    the second, or the other way round; factors on (head, channel) and (head, token), where both are in a common block.
    """
    found = []
    for one, two in algebra.joins:
        one, two = compress(algebra.units.find(one)), compress(algebra.units.find(two))
        if not depends(one) & depends(two):
            continue
        shape = np.broadcast_shapes(one.shape, two.shape)
        if int(np.prod(shape)) > MAX_LABEL:
            continue
        count = len(algebra.units)  # both units of a place in one number: sorted much faster than pairs
        first, second = np.divmod(distinct(one * count + two), count)
        lines = [_with_blocks(algebra.units, first), _with_blocks(algebra.units, second)]
        nested = depends(one) <= depends(two) or depends(two) <= depends(one)
        if nested:
            together = (lines[0] == second).any(axis=0) | (lines[1] == first).any(axis=0)
        else:
            together = np.any([(line != FIXED) & (line == other) for line in lines[0] for other in lines[1]], axis=0)
        together |= (first == FIXED) & (second == FIXED)
        if not together.all():
            units = np.concatenate([first[~together], second[~together]])
            found.append(units[units != FIXED])
    return found


def _with_blocks(units: Units, inner: Array) -> Array:
    """Each unit and the blocks around it that move, from the inside out, one line for each level."""
    lines = [units.find(inner)]
    while lines[-1].any() and len(lines) < 8:
        above = units.parents(lines[-1])
        lines.append(np.where(lines[-1] == FIXED, FIXED, units.find(above)))
    return np.stack(lines)


def _repeats(units: Units, factor: Array) -> bool:
    if factor.size < 4:  # two units at two positions each
        return False
    live = units.find(factor.ravel())
    live = live[live != FIXED]
    return len(live) > 1 and len(distinct(live)) < len(live)


def _crossed(run: Run, move: Move, group_of: Array, colour: np.ndarray) -> Array | None:
    replay = run.replica()
    unit_of, place_of = [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
    for number, label in move.labels.items():
        own = []
        for part, factor in enumerate(label.factors):
            units = run.algebra.units.find(factor.ravel())
            own.append(replay.algebra.units.fresh(factor.size).reshape(factor.shape))
            unit_of.append(units)
            place_of.append((number * 64 + part) * 2**32 + _ranks(units))
        plain = replace(label, factors=tuple(own), values=None, segments=None, settled=None)
        replay.labels[number] = plain
    units, places = np.concatenate(unit_of), np.concatenate(place_of)
    made = move.rule(replay, move.node)
    out: Sequence[Label] = (made,) if isinstance(made, Label) else made
    for label in out:
        for factor in label.factors:
            positions = replay.algebra.units.roots(factor.ravel())
            positions = np.where(positions < len(units), positions, 0)  # blocks are not followed
            crossed = _differing(units[positions], places[positions], group_of, colour)
            if crossed is not None:
                return crossed
    return None


def _ranks(units: Array) -> Array:
    """Place of each position among the positions of the same unit.

    >>> _ranks(np.array([5, 7, 5, 5, 7])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(units, kind="stable")
    ordered = units[order]
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(units)) - np.searchsorted(ordered, ordered)
    return ranks


def _differing(units: Array, places: Array, group_of: Array, colour: np.ndarray) -> Array | None:
    """Units of one group and colour that do not all have the same sequence of places."""
    moving = group_of[units] >= 0
    units, places = units[moving], places[moving]
    if not units.size:
        return None
    codes = scramble(places * 4099 + _ranks(units))
    kinds, which = np.unique(units, return_inverse=True)
    sums = np.zeros(len(kinds), dtype=np.uint64)
    np.add.at(sums, which.reshape(-1), codes)
    family = group_of[kinds].astype(np.uint64) * np.uint64(0x94D049BB133111EB) ^ colour[kinds]
    order = np.lexsort((sums, family))
    family, sums, kinds = family[order], sums[order], kinds[order]
    apart = (family[1:] == family[:-1]) & (sums[1:] != sums[:-1])
    if not apart.any():
        return None
    return kinds[np.isin(family, family[1:][apart])]
