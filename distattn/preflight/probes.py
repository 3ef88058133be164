"""How fast each rank's device and each pair's link are, in a second: short products and messages, each the best of a few.

Ranks of a node meet each other, two by two; then each rank meets those of other nodes that have its number within their node, so
that all network adapters of two nodes are at work together.
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
from distattn.parallel.runtime.transport import GroupTransport, Packet

# side of a product, and how many are timed
_SIDE = {"cpu": 320, "cuda": 8192}
_PRODUCTS = 5
# bytes of a message between two ranks, and bytes that one rank sends to all others at once
_MESSAGE = {"cpu": 1 << 18, "cuda": 1 << 26}
_TO_ALL = {"cpu": 1 << 18, "cuda": 1 << 27}
# bytes that a rank sends to ranks of other nodes, about: with many nodes messages are shorter, but not too short to tell
_ACROSS_BYTES, _LEAST_MESSAGE = 1 << 31, 1 << 22
# messages of a link that are timed: short ones tell the latency, the first of them connects
_SHORT, _LONG = 3, 4
# ranks of one node that a rank meets, at most
_MOST_INSIDE = 15


class Link(NamedTuple):
    """A link from one rank to another while both send: 10^9 bytes a second in one direction, and µs of a message of 8 bytes."""

    peer: int
    gbs: float
    latency_us: float


class RankSpeed(NamedTuple):
    """What a rank measured. tflops: of matrix products; all_to_all_gbs: what it sent to all others together, 0 without others."""

    tflops: float
    all_to_all_gbs: float
    inside: list[Link]
    across: list[Link]


def measure_speed(
    rank: int, nodes: Sequence[Sequence[int]], transport: GroupTransport | None, device: torch.device, limit: timedelta
) -> RankSpeed:
    """Measure products and links of this rank. All ranks call it together; nodes: the ranks of each.

    transport: between all ranks, None for a rank that is alone. Raises LostRankError naming a rank that does not answer.
    """
    tflops = _product_tflops(device)
    if transport is None:
        return RankSpeed(tflops, 0.0, [], [])
    probe = _LinkProbe(transport, device, limit)
    everyone = [other for node in nodes for other in node]
    all_to_all = probe.all_to_all(rank, everyone)
    longest = _MESSAGE[device.type]
    own = next(node for node in nodes if rank in node)
    inside = [probe.link(peer, longest) for peer in _peers(rank, list(rounds_of(own))[:_MOST_INSIDE])]
    rounds = list(rounds_across(nodes))
    size = min(longest, max(_ACROSS_BYTES // max(len(rounds), 1), _LEAST_MESSAGE))
    across = [probe.link(peer, size) for peer in _peers(rank, rounds)]
    return RankSpeed(tflops, all_to_all, inside, across)


def rounds_of(members: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """All pairs of members, in rounds in which each is in one pair at most: all but one go round a circle."""
    circle: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    half = len(circle) // 2
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def rounds_across(nodes: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, int]]]:
    """All pairs of nodes, in rounds; of two nodes the ranks of equal numbers meet."""
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
    """Whom a rank meets, in the order of the rounds."""
    return [b if a == rank else a for pairs in rounds for a, b in pairs if rank in (a, b)]


class _LinkProbe(NamedTuple):
    transport: GroupTransport
    device: torch.device
    limit: timedelta

    def all_to_all(self, rank: int, everyone: Sequence[int]) -> float:
        """10^9 bytes a second that this rank sends to all others together."""
        peers = [other for other in sorted(everyone) if other != rank]
        size = max(_TO_ALL[self.device.type] // len(everyone), 1)
        out, back = self._bytes(size), {peer: self._bytes(size) for peer in peers}
        sends = [Packet(peer, "all-to-all", out) for peer in peers]
        receives = [Packet(peer, "all-to-all", back[peer]) for peer in peers]
        return 1e-9 * size * len(peers) / self._best_seconds(sends, receives, True, _LONG)

    def link(self, peer: int, size: int) -> Link:
        """The link to a rank that measures at the same time."""

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
        """Wait for a device's messages, but not for ever: NCCL's own wait has no end."""
        if self.device.type == "cpu":
            return
        arrived, ends = torch.cuda.Event(), time.monotonic() + self.limit.total_seconds()
        arrived.record()
        while not arrived.query():
            if time.monotonic() > ends:
                self.transport.abort()
                peers = ", ".join(str(packet.peer) for packet in receives)
                raise LostRankError(
                    f"messages of the preflight between this rank and {peers} did not arrive; look at the link."
                )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
