"""Arithmetic on many half-open integer intervals at once, for masks, layouts, plans and their proofs.

Everything is vectorised over int64 columns, without Python loops over rows. An interval may carry a *group* (a rank, a chunk,
a head range); intervals of different groups never touch. Groups and coordinates must not be negative, because they are packed
into one sortable key.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distattn.ir.errors import DistattnError

Ints = NDArray[np.int64]


def as_int64(values: Any, name: str) -> Ints:
    """Convert `values` to int64. Raise DistattnError, naming `name`, for fractions, strings, ragged rows and overflow."""
    try:
        array = np.asarray(values)
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"of type {array.dtype}")
        if array.size and array.max() > np.iinfo(np.int64).max:
            raise OverflowError("too large")
        return array.astype(np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DistattnError(f"{name}: whole numbers are needed, rows of equal length ({error}).") from None


def sorted_unique(values: Ints) -> Ints:
    """Return the distinct values, sorted. On integers, `np.unique` is 30 times slower since NumPy 2.3, which uses hashing."""
    ordered = np.sort(values)
    fresh = np.ones(len(ordered), bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    return ordered[fresh]


def run_starts(*columns: Ints) -> Ints:
    """Return the index of the first row of each run of equal rows."""
    fresh = np.ones(len(columns[0]), bool)
    fresh[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return np.flatnonzero(fresh)


def stable_argsort(key: Ints) -> Ints:
    """Return `np.argsort(key, kind="stable")` for integers, but faster: sort the keys with their indices in the low bits."""
    key = np.asarray(key, np.int64)
    places = len(key).bit_length()
    if len(key) and int(key.max()) - int(key.min()) < 1 << (62 - places):
        return np.sort(((key - key.min()) << places) | np.arange(len(key))) & ((1 << places) - 1)
    return np.argsort(key, kind="stable")


def expand_ranges(begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Return all pairs (i, j) of the index i of a range and an integer j in [begin_i, end_i)."""
    count = np.maximum(end - begin, 0)
    i = np.repeat(np.arange(len(count)), count)
    offset = np.repeat(np.cumsum(count) - count - begin, count)
    return i, np.arange(len(i)) - offset


def overlapping_pairs(t0: Ints, t1: Ints, a: Ints, b: Ints) -> tuple[Ints, Ints]:
    """Return all pairs (i, j) for which [a_i, b_i) overlaps [t0_j, t1_j). Intervals [t0, t1) must be sorted and disjoint."""
    return expand_ranges(np.searchsorted(t1, a, "right"), np.searchsorted(t0, b, "left"))


def merge_intervals(group: Ints, a: Ints, b: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the union of each group's intervals, sorted and disjoint: (group, a, b). Touching intervals are joined."""
    if not len(a):
        return group, a, b
    # add 2, so that the end of one group does not touch the start of the next
    base = group * (int(b.max()) + 2)
    index = stable_argsort(base + a)
    low, high = (base + a)[index], np.maximum.accumulate((base + b)[index])
    fresh = np.ones(len(low), bool)
    fresh[1:] = low[1:] > high[:-1]
    first = np.flatnonzero(fresh)
    last = np.append(first[1:], len(low)) - 1
    kept = group[index][first]
    shift = base[index][first]
    return kept, low[first] - shift, high[last] - shift


def elementary_intervals(group: Ints, a: Ints, b: Ints) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Cut the intervals of each group at all end points in the group. Return (row, piece, group, a, b).

    Interval row_i covers piece piece_i. group, a and b list all pieces, even those that no interval covers.
    """
    base = int(b.max()) + 2 if len(b) else 2
    points = sorted_unique(np.concatenate([group * base + a, group * base + b]))
    row, piece = expand_ranges(np.searchsorted(points, group * base + a), np.searchsorted(points, group * base + b))
    if not len(points):
        return row, piece, points, points, points
    return row, piece, points[:-1] // base, points[:-1] % base, points[1:] - points[:-1] // base * base


def lexicographic_argsort(*columns: Ints) -> Ints:
    """Return the stable order of rows by the first column, then by the second and so on, in fewer passes than `np.lexsort`.

    Columns are packed into one integer as long as their ranges fit.
    """
    keys: list[Ints] = []
    room = 1
    # leave bits for the indices that `stable_argsort` adds
    most = 1 << (62 - len(columns[0]).bit_length())
    for column in columns:
        low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
        span = high - low + 1
        if keys and room * span < most:
            keys[-1] = keys[-1] * span + (column - low)
            room *= span
        else:
            keys.append(column - low if span < 1 << 62 else column)
            room = span
    if len(keys) == 1 and len(keys[0]) and (keys[0][1:] >= keys[0][:-1]).all():
        return np.arange(len(keys[0]))
    index = stable_argsort(keys[-1])
    for key in keys[-2::-1]:
        index = index[stable_argsort(key[index])]
    return index


def numbers_of_rows(*columns: Ints) -> Ints:
    """Number the distinct rows in lexicographic order; return the number of each row, like the inverse of `np.unique`."""
    order = lexicographic_argsort(*columns)
    fresh = np.zeros(len(order), np.int64)
    fresh[run_starts(*(column[order] for column in columns))] = 1
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(fresh) - 1
    return numbers
