"""Match overloaded ranks with ranks that have room, using few pairs and, where possible, nearby ranks."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping

import numpy as np

from distattn.ir.intervals import Ints


def match_work(excess: Ints, room: Ints, node: Ints, peers: Mapping[int, Ints]) -> tuple[Ints, Ints, Ints]:
    """Match each rank's excess work with other ranks' room. Return (sender, cost, receiver), sorted by sender.

    excess, room: one value per rank, in units of cost. Match first with ranks that have tokens of the same documents (a
    sender's `peers`), then within nodes, then anywhere. The sender with the largest excess chooses first. It takes the smallest
    room that fits all of its excess, or otherwise the largest room. Fewer pairs move fewer bytes.
    """
    left, free = excess.tolist(), room.tolist()
    transfers: list[tuple[int, int, int]] = []
    senders = sorted(np.flatnonzero(excess).tolist(), key=lambda rank: (-left[rank], rank))
    receivers = np.flatnonzero(room).tolist()
    receivers_of_node: dict[int, list[int]] = {}
    for rank in receivers:
        receivers_of_node.setdefault(int(node[rank]), []).append(rank)
    for rank in senders:
        _match([rank], (int(peer) for peer in np.unique(peers[rank])), left, free, transfers)
    if len(receivers_of_node) > 1:
        senders_of_node: dict[int, list[int]] = {}
        for rank in senders:
            senders_of_node.setdefault(int(node[rank]), []).append(rank)
        for where, some in senders_of_node.items():
            _match(some, receivers_of_node.get(where, []), left, free, transfers)
    _match(senders, receivers, left, free, transfers)
    rows = np.array(sorted(transfers), np.int64).reshape(-1, 3)
    return rows[:, 0], rows[:, 2], rows[:, 1]


def _match(
    senders: Iterable[int],
    receivers: Iterable[int],
    left: list[int],
    free: list[int],
    transfers: list[tuple[int, int, int]],
) -> None:
    """Match by best fit: append (sender, receiver, cost) to `transfers`, and subtract the cost from `left` and `free`."""
    rooms = sorted((free[receiver], -receiver) for receiver in receivers if free[receiver])
    for sender in senders:
        while left[sender] and rooms:
            at = bisect_left(rooms, (left[sender], -len(free)))
            space, receiver = rooms.pop(min(at, len(rooms) - 1))
            amount = min(space, left[sender])
            transfers.append((sender, -receiver, amount))
            left[sender] -= amount
            free[-receiver] = space - amount
            if space > amount:
                insort(rooms, (space - amount, receiver))
