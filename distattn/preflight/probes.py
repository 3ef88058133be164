"""Measure each rank's device and links within a second, by short matrix products and messages. The best of a few trials counts.

First the ranks of a node exchange messages in pairs. Then each rank exchanges messages with the ranks at the same position in
other nodes, so that all network adapters of two nodes are busy at the same time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.ir.errors import LostRankError
from distattn.parallel.runtime.communication.transport import GroupTransport, Packet

# the side of the matrices, and the number of timed products
_SIDE = {"cpu": 320, "cuda": 8192}
_PRODUCTS = 5
# the bytes of a message between two ranks, and the total bytes that a rank sends to all others in an all-to-all
_MESSAGE = {"cpu": 1 << 18, "cuda": 1 << 26}
_TO_ALL = {"cpu": 1 << 18, "cuda": 1 << 27}
# the approximate bytes that a rank sends to other nodes in total, so messages are shorter with many nodes; the minimum size of
# a message
_ACROSS_BYTES, _LEAST_MESSAGE = 1 << 31, 1 << 22
# the number of short and long messages per link; short messages measure the latency, and the first of them connects
_SHORT, _LONG = 3, 4
# the maximum number of links to ranks on the same node that each rank measures
_MOST_INSIDE = 15


class Link(NamedTuple):
    """A link to another rank, measured while both send. gbs: 10^9 bytes per second and direction. latency_us: µs for 8 bytes."""

    peer: int
    gbs: float
    latency_us: float


class RankSpeed(NamedTuple):
    """The speeds of one rank. tflops: of matrix products. all_to_all_gbs: of sends to all other ranks, 0 for a single rank.

    inside, across: the links to ranks on the same node and on other nodes.
    """

    tflops: float
    all_to_all_gbs: float
    inside: list[Link]
    across: list[Link]


def measure_speed(
    rank: int, nodes: Sequence[Sequence[int]], transport: GroupTransport | None, device: torch.device, limit: timedelta
) -> RankSpeed:
    """Measure the speed of matrix products and of links on this rank. A collective call.

    nodes: the ranks of each node. transport: connects all ranks; None for a single rank. Raises LostRankError naming the ranks
    that do not answer.
    """
    tflops = _product_tflops(device)
    if transport is None:
        return RankSpeed(tflops, 0.0, [], [])
    probe = _LinkProbe(transport, device, limit)
    all_to_all = probe.all_to_all(rank, [other for node in nodes for other in node])
    longest = _MESSAGE[device.type]
    local_ranks = next(node for node in nodes if rank in node)
    inside = [probe.link(peer, longest) for peer in _peers(rank, list(rounds_of(local_ranks))[:_MOST_INSIDE])]
    rounds = list(rounds_across(nodes))
    size = min(longest, max(_ACROSS_BYTES // max(len(rounds), 1), _LEAST_MESSAGE))
    across = [probe.link(peer, size) for peer in _peers(rank, rounds)]
    return RankSpeed(tflops, all_to_all, inside, across)


def rounds_of(members: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of pairs that together contain all pairs of members, each member at most once per round (circle method)."""
    circle: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    half = len(circle) // 2
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def rounds_across(nodes: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of rank pairs. Each pair of nodes meets in one round, where ranks at the same position form pairs."""
    for pairs in rounds_of(range(len(nodes))):
        yield [ranks for a, b in pairs for ranks in zip(nodes[a], nodes[b], strict=False)]


def _product_tflops(device: torch.device) -> float:
    side, dtype = _SIDE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(_PRODUCTS):
        _synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


def _peers(rank: int, rounds: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """Return a rank's partners in the order of the rounds."""
    return [b if a == rank else a for pairs in rounds for a, b in pairs if rank in (a, b)]


class _LinkProbe(NamedTuple):
    transport: GroupTransport
    device: torch.device
    limit: timedelta

    def all_to_all(self, rank: int, ranks: Sequence[int]) -> float:
        """Return the total speed in 10^9 bytes per second at which this rank sends to all other ranks."""
        peers = [other for other in sorted(ranks) if other != rank]
        size = max(_TO_ALL[self.device.type] // len(ranks), 1)
        out, back = self._bytes(size), {peer: self._bytes(size) for peer in peers}
        sends = [Packet(peer, "all-to-all", out) for peer in peers]
        receives = [Packet(peer, "all-to-all", back[peer]) for peer in peers]
        return 1e-9 * size * len(peers) / self._best_seconds(sends, receives, True, _LONG)

    def link(self, peer: int, size: int) -> Link:
        """Measure the link to a peer, which must measure its link to this rank at the same time."""

        def seconds(size: int, times: int) -> float:
            sends, receives = ([Packet(peer, "message", self._bytes(size))] for _ in range(2))
            return self._best_seconds(sends, receives, False, times)

        short = seconds(8, _SHORT)
        return Link(peer, 1e-9 * size / seconds(size, _LONG), 1e6 * short)

    def _bytes(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def _best_seconds(self, sends: list[Packet], receives: list[Packet], collective: bool, times: int) -> float:
        best = math.inf
        for _ in range(times):
            _synchronize(self.device)
            began = time.perf_counter()
            self.transport.exchange(sends, receives, collective, "of the preflight").wait()
            self._finish(receives)
            best = min(best, time.perf_counter() - began)
        return best

    def _finish(self, receives: list[Packet]) -> None:
        """Wait for messages on a GPU, at most for the time limit, because NCCL itself would wait forever."""
        if self.device.type == "cpu":
            return
        arrived, ends = torch.cuda.Event(), time.monotonic() + self.limit.total_seconds()
        arrived.record()
        while not arrived.query():
            if time.monotonic() > ends:
                self.transport.abort()
                peers = [packet.peer for packet in receives]
                raise LostRankError(
                    f"messages of the preflight between this rank and {', '.join(map(str, peers))} did not arrive; look at "
                    "the link.",
                    peers,
                )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
