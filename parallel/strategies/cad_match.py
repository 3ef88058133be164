"""Who gives how much of its work to whom: as few and as near pairs as may be."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping

import numpy as np

from distattn.ir.intervals import Ints


def match_work(excess: Ints, room: Ints, node: Ints, peers: Mapping[int, Ints]) -> tuple[Ints, Ints, Ints]:
    """Shares (giver, cost, taker), sorted by giver: the excess goes where there is room.

    First to ranks that see the same documents (`peers` of a giver), then inside nodes, then anywhere. The largest excess
    chooses first: the smallest room that takes all of it, or else the largest room. Fewer shares move fewer bytes.
    """
    left, free = excess.tolist(), room.tolist()
    shares: list[tuple[int, int, int]] = []
    senders = sorted(np.flatnonzero(excess).tolist(), key=lambda rank: (-left[rank], rank))
    receivers = np.flatnonzero(room).tolist()
    nodes: dict[int, list[int]] = {}
    for rank in receivers:
        nodes.setdefault(int(node[rank]), []).append(rank)
    for rank in senders:
        _fill([rank], (int(peer) for peer in np.unique(peers[rank])), left, free, shares)
    if len(nodes) > 1:
        by_node: dict[int, list[int]] = {}
        for rank in senders:
            by_node.setdefault(int(node[rank]), []).append(rank)
        for where, some in by_node.items():
            _fill(some, nodes.get(where, []), left, free, shares)
    _fill(senders, receivers, left, free, shares)
    rows = np.array(sorted(shares), np.int64).reshape(-1, 3)
    return rows[:, 0], rows[:, 2], rows[:, 1]


def _fill(senders: Iterable[int], receivers: Iterable[int], left: list[int], free: list[int], shares: list) -> None:
    rooms = sorted((free[receiver], -receiver) for receiver in receivers if free[receiver])
    for sender in senders:
        while left[sender] and rooms:
            at = bisect_left(rooms, (left[sender], -len(free)))
            space, receiver = rooms.pop(min(at, len(rooms) - 1))
            amount = min(space, left[sender])
            shares.append((sender, -receiver, amount))
            left[sender] -= amount
            free[-receiver] = space - amount
            if space > amount:
                insort(rooms, (space - amount, receiver))
