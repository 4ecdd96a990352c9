"""Hashes of integers, so that what is equal is found at once: the same numbers in every process, 64 bits wide.

Hashes of parts are added up to a hash of the whole where the order of the parts does not count.
"""

from __future__ import annotations

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
