"""Rings of the members that exchange tokens: documents that share no rank need not share a ring."""

from __future__ import annotations

import numpy as np

from distattn.ir.intervals import Ints, sorted_unique


def hops_in_rings(src: Ints, dst: Ints, members: int) -> Ints:
    """Return the hops from src_i to dst_i, (M,), along rings of the members that the pairs (src_i, dst_i) connect.

    Each ring has its members in ascending order. A ring of n members has n steps: packs of several documents are done sooner
    than in one ring of all members.
    """
    ring = connected_members(src, dst, members)
    place = np.empty(members, np.int64)
    # sorted by ring: differences of places inside one ring are hops
    place[np.argsort(ring, kind="stable")] = np.arange(members)
    return (place[dst] - place[src]) % np.bincount(ring, minlength=members)[ring[dst]]


def connected_members(src: Ints, dst: Ints, members: int) -> Ints:
    """Return for each member, (members,), the lowest one that a chain of pairs (src_i, dst_i) connects it with."""
    src, dst = np.divmod(sorted_unique(src * members + dst), members)
    lowest = np.arange(members)
    while (lowest[src] != lowest[dst]).any():
        joined = lowest.copy()
        np.minimum.at(joined, lowest[src], lowest[dst])
        np.minimum.at(joined, lowest[dst], lowest[src])
        # chains of members that were joined at once
        while (joined != joined[joined]).any():
            joined = joined[joined]
        lowest = joined[lowest]
    return lowest
