"""Rings of members that exchange tokens: members whose documents share no rank are in different rings."""

from __future__ import annotations

import numpy as np

from distattn.ir.intervals import Ints, sorted_unique


def hops_in_rings(src: Ints, dst: Ints, members: int) -> Ints:
    """Return the hops from src_i to dst_i, (M,), along rings of the members that the pairs (src_i, dst_i) connect.

    Each ring has its members in ascending order. A ring of n members has n steps, so packs of several documents take fewer steps
    than in one ring of all members.
    """
    ring = connected_members(src, dst, members)
    place = np.empty(members, np.int64)
    # sorted by ring: differences of positions inside one ring are hops
    place[np.argsort(ring, kind="stable")] = np.arange(members)
    return (place[dst] - place[src]) % np.bincount(ring, minlength=members)[ring[dst]]


def connected_members(src: Ints, dst: Ints, members: int) -> Ints:
    """Return for each member, (members,), the lowest member that it is connected with by a chain of pairs (src_i, dst_i)."""
    src, dst = np.divmod(sorted_unique(src * members + dst), members)
    lowest = np.arange(members)
    while (lowest[src] != lowest[dst]).any():
        joined = lowest.copy()
        np.minimum.at(joined, lowest[src], lowest[dst])
        np.minimum.at(joined, lowest[dst], lowest[src])
        # follow chains of members that were joined in this round
        while (joined != joined[joined]).any():
            joined = joined[joined]
        lowest = joined[lowest]
    return lowest
