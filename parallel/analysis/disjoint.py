"""Find two overlapping rectangles of one group by sorts and searches, in almost linear time for any rectangles."""

from __future__ import annotations

import numpy as np

from distattn.ir.intervals import Ints, elementary_intervals, lexicographic_argsort, sorted_unique, stable_argsort

# if more slabs per rectangle than this were needed, search a segment tree instead
_SLABS = 16


def first_overlap(group: Ints, box: tuple[Ints, Ints, Ints, Ints]) -> tuple[int, int] | None:
    """Return the indices of two rectangles [q0, q1) x [k0, k1) of one group that share a cell, or None if all are disjoint.

    Most rectangles of a plan are aligned: cutting them at each other's ends along one axis gives only a few slabs, and within a
    slab the rectangles must be disjoint along the other axis. M rectangles that are not aligned (random cuts would make M**1.5
    slabs) are checked with a segment tree in O(M log M).
    """
    q0, q1, k0, k1 = box
    rows = len(group)
    ways = [(q0, q1, k0, k1), (k0, k1, q0, q1)]
    slabs = [_slabs(group, way[0], way[1]) for way in ways]
    best = int(np.argmin(slabs))
    if slabs[best] <= _SLABS * rows:
        return _clash_in_slabs(group, *ways[best])
    return _clash_in_levels(group, *box)


def _slabs(group: Ints, low: Ints, high: Ints) -> int:
    base = int(high.max()) + 2 if len(high) else 2
    points = sorted_unique(np.concatenate([group * base + low, group * base + high]))
    return int((np.searchsorted(points, group * base + high) - np.searchsorted(points, group * base + low)).sum())


def _clash_in_slabs(group: Ints, low: Ints, high: Ints, begin: Ints, end: Ints) -> tuple[int, int] | None:
    row, slab, *_ = elementary_intervals(group, low, high)
    index = lexicographic_argsort(slab, begin[row])
    row, slab = row[index], slab[index]
    return _first((slab[1:] == slab[:-1]) & (begin[row[1:]] < end[row[:-1]]), row[:-1], row[1:])


def _clash_in_levels(group: Ints, low: Ints, high: Ints, begin: Ints, end: Ints) -> tuple[int, int] | None:
    """Search a segment tree over the first axis, level by level.

    On each level, an interval is *long* at the nodes of its minimal cover (at most two) and *short* at the nodes that it
    covers only partly (at most two). Two intervals overlap if and only if, at some node, both are long, or one is long and
    the other short.
    """
    base = int(high.max()) + 2
    points = sorted_unique(np.concatenate([group * base + low, group * base + high]))
    a, b = np.searchsorted(points, group * base + low), np.searchsorted(points, group * base + high)
    # replace positions on the second axis by their sorted index over all groups, so that a node and an index fit in one integer
    width = int(end.max()) + 2
    ranks = sorted_unique(np.concatenate([group * width + begin, group * width + end]))
    c, d = np.searchsorted(ranks, group * width + begin), np.searchsorted(ranks, group * width + end)
    span, index = len(ranks) + 1, np.arange(len(group))
    left, right = a.copy(), b.copy()
    for level in range(int(len(points)).bit_length() + 1):
        inside = left < right
        from_left, from_right = inside & (left % 2 == 1), inside & (right % 2 == 1)
        long = np.concatenate([index[from_left], index[from_right]])
        node = np.concatenate([left[from_left], right[from_right] - 1])
        # count a node once if it is both the leftmost and the rightmost
        num_left = len(index[from_left])
        twice = np.zeros(len(long), bool)
        twice[num_left:] = (from_left & from_right & (left == right - 1))[index[from_right]]
        long, node = long[~twice], node[~twice]
        by_key = stable_argsort(node * span + c[long])
        long, node = long[by_key], node[by_key]
        low_key, high_key = node * span + c[long], node * span + d[long]
        if clash := _first(low_key[1:] < high_key[:-1], long[:-1], long[1:]):
            return clash
        for leaf in (a, b - 1):
            leaf_node = leaf >> level
            short = ((leaf_node << level) < a) | (((leaf_node + 1) << level) > b)
            key = leaf_node[short] * span
            first = np.searchsorted(high_key, key + c[short], "right")
            hit = first < np.searchsorted(low_key, key + d[short], "left")
            if hit.any():
                i = int(np.flatnonzero(hit)[0])
                return int(long[first[i]]), int(index[short][i])
        left, right = (left + 1) >> 1, right >> 1
    return None


def _first(clash: np.ndarray, first: Ints, other: Ints) -> tuple[int, int] | None:
    if not clash.any():
        return None
    i = int(np.flatnonzero(clash)[0])
    return int(first[i]), int(other[i])
