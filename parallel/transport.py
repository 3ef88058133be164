"""How messages of one step travel: over torch.distributed (NCCL, gloo), or inside one process in lock step.

A transport has one method, `exchange`: it starts all sends and receives of a step and returns something to wait for.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from distattn.plan import Payload


class Packet(NamedTuple):
    """One contiguous tensor to or from a peer (rank in the group); payload says what it is part of."""

    peer: int
    payload: Payload
    tensor: Tensor


class Work(Protocol):
    """A step's messages in flight."""

    def wait(self) -> None: ...


class Transport(Protocol):
    """Sends and receives start together; packets between two ranks match in order."""

    def exchange(self, sends: list[Packet], receives: list[Packet]) -> Work: ...


class GroupTransport:
    """Batched point-to-point calls on a torch.distributed process group."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def exchange(self, sends: list[Packet], receives: list[Packet]) -> Work:
        operations = [
            dist.P2POp(call, packet.tensor, dist.get_global_rank(self.group, packet.peer), self.group)
            for call, packets in ((dist.isend, sends), (dist.irecv, receives))
            for packet in packets
        ]
        # the tensors live until the work is waited for
        return _Requests(dist.batch_isend_irecv(operations) if operations else [], (sends, receives))


class _Requests(NamedTuple):
    requests: Iterable[dist.Work]
    alive: tuple[list[Packet], list[Packet]]

    def wait(self) -> None:
        for request in self.requests:
            request.wait()


class LockStep:
    """All ranks in one process: rank r uses `transport(r)`; a rank may wait once every rank has posted its step.

    A packet is copied as soon as both ends have posted it, so that no end outlives its step.
    """

    def __init__(self) -> None:
        # per (source, destination): tensors whose other end has not been posted yet
        self._sent: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        self._wanted: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)

    def transport(self, rank: int) -> Transport:
        return _Mailbox(self, rank)

    def post(self, sent: list[tuple[int, int, Tensor]], wanted: list[tuple[int, int, Tensor]]) -> None:
        for queue, others, packets in ((self._sent, self._wanted, sent), (self._wanted, self._sent, wanted)):
            for src, dst, tensor in packets:
                if others[src, dst]:
                    other = others[src, dst].popleft()
                    source, target = (tensor, other) if queue is self._sent else (other, tensor)
                    target.copy_(source)
                else:
                    queue[src, dst].append(tensor)

    def awaited(self, rank: int) -> bool:
        """Whether a packet for this rank is still under way."""
        return any(queue for (_, dst), queue in self._wanted.items() if dst == rank)


class _Mailbox(NamedTuple):
    hub: LockStep
    rank: int

    def exchange(self, sends: list[Packet], receives: list[Packet]) -> Work:
        self.hub.post(
            [(self.rank, packet.peer, packet.tensor) for packet in sends],
            [(packet.peer, self.rank, packet.tensor) for packet in receives],
        )
        return _Delivery(self.hub, self.rank)


class _Delivery(NamedTuple):
    hub: LockStep
    rank: int

    def wait(self) -> None:
        assert not self.hub.awaited(self.rank), f"rank {self.rank} waits for a packet that nobody has posted"


class Alone:
    """The transport of a plan for one rank: there is nobody to talk to."""

    def exchange(self, sends: list[Packet], receives: list[Packet]) -> Work:
        assert not sends and not receives, "a plan for one rank has no moves"
        return _Requests([], ([], []))
