"""Rings of ranks, or of nodes, that exchange tokens. Members not connected by shared documents are in different rings."""

from __future__ import annotations

import numpy as np

from distattn.ir.intervals import Ints, sorted_unique


def hops_in_rings(src: Ints, dst: Ints, members: int) -> Ints:
    """Return the hops from src_i to dst_i, (M,), along the rings of the members that the pairs (src_i, dst_i) connect.

    Members are in ascending order in each ring. A ring of n members takes n steps, so packs of several documents take fewer
    steps than with one ring of all members.
    """
    ring = connected_members(src, dst, members)
    place = np.empty(members, np.int64)
    # sort members by ring, so that differences of positions within a ring are hops
    place[np.argsort(ring, kind="stable")] = np.arange(members)
    return (place[dst] - place[src]) % np.bincount(ring, minlength=members)[ring[dst]]


def connected_members(src: Ints, dst: Ints, members: int) -> Ints:
    """Return the lowest member connected to each member by a chain of pairs (src_i, dst_i), (members,)."""
    src, dst = np.divmod(sorted_unique(src * members + dst), members)
    lowest = np.arange(members)
    while (lowest[src] != lowest[dst]).any():
        joined = lowest.copy()
        np.minimum.at(joined, lowest[src], lowest[dst])
        np.minimum.at(joined, lowest[dst], lowest[src])
        # follow the chains of members joined in this round
        while (joined != joined[joined]).any():
            joined = joined[joined]
        lowest = joined[lowest]
    return lowest
