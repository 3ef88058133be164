"""How the messages of one step travel: over torch.distributed (NCCL, gloo), or between ranks of one process in lock step.

A transport has one method, `exchange`: it starts all sends and receives of a step and returns something to wait for.
"""

from __future__ import annotations

import inspect
import weakref
from collections import defaultdict, deque
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from distattn.ir.errors import DistattnError, LostRankError
from distattn.ir.plan import Payload
from distattn.parallel.runtime.attendance import attended


class Packet(NamedTuple):
    """One tensor to or from a peer (its rank in the group), contiguous where it is received, and the payload it is part of."""

    peer: int
    payload: Payload
    tensor: Tensor


class PendingMessages(Protocol):
    """The messages of a step in flight."""

    def wait(self) -> None:
        """Return when all have arrived. Raises DistattnError naming the peers that stopped answering."""
        ...


class Transport(Protocol):
    """What the executor asks of a transport."""

    def exchange(self, sends: list[Packet], receives: list[Packet], collective: bool) -> PendingMessages:
        """Start all sends and receives of a step. Packets between two ranks match in order.

        collective: all ranks call, also those without packets, and packets travel in one uneven all-to-all; otherwise they
        are single messages.
        """
        ...


class GroupTransport:
    """Messages on a torch.distributed process group: batched point-to-point calls, or all-to-all of packed bytes."""

    def __init__(self, group: dist.ProcessGroup):
        # torch.distributed keeps the group until destroy_process_group; alive any longer, it would abort the process at its end
        self._group = weakref.ref(group)

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise DistattnError("the process group this plan was prepared for has been destroyed; prepare it again.")
        return group

    @staticmethod
    def with_own_group(group: dist.ProcessGroup, timeout: timedelta | None = None) -> GroupTransport:
        """A transport on a new group of the same ranks, so that nothing else queues in it. A collective call of these ranks.

        On NCCL its stream has high priority: messages start before the kernels that they overlap with. timeout: how long a
        message may take, by default the group's own.
        """
        options = None
        if dist.get_backend(group) == "nccl":
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)

        def open_group() -> dist.ProcessGroup:
            made: dist.ProcessGroup = duplicate_group(group, timeout or timeout_of(group), pg_options=options)
            return made

        return GroupTransport(attended(group, "the making of a communicator", open_group))

    def exchange(self, sends: list[Packet], receives: list[Packet], collective: bool) -> PendingMessages:
        if collective:
            return self._all_to_all(sends, receives)
        sends = [packet._replace(tensor=packet.tensor.contiguous()) for packet in sends]
        operations = [
            dist.P2POp(call, packet.tensor, dist.get_global_rank(self.group, packet.peer), self.group)
            for call, packets in ((dist.isend, sends), (dist.irecv, receives))
            for packet in packets
        ]
        peers = {packet.peer for packet in (*sends, *receives)}
        try:
            requests = dist.batch_isend_irecv(operations) if operations else []
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _peer_stopped(peers, error) from None
        # the tensors live until the work is waited for
        return _PendingRequests(requests, (sends, receives))

    def _all_to_all(self, sends: list[Packet], receives: list[Packet]) -> PendingMessages:
        size = dist.get_world_size(self.group)
        # stable: packets of one peer keep their order
        sends, receives = (sorted(packets, key=lambda packet: packet.peer) for packets in (sends, receives))
        splits = [[0] * size, [0] * size]
        for counts, packets in zip(splits, (sends, receives), strict=True):
            for packet in packets:
                counts[packet.peer] += packet.tensor.nbytes
        like = next((packet.tensor for packet in (*sends, *receives)), torch.empty(0, device=self._device()))
        outgoing = like.new_empty(sum(splits[0]), dtype=torch.uint8)
        for packet, part in zip(sends, outgoing.split([packet.tensor.nbytes for packet in sends]), strict=True):
            _pack(part, packet.tensor)
        incoming = like.new_empty(sum(splits[1]), dtype=torch.uint8)
        request = dist.all_to_all_single(incoming, outgoing, splits[1], splits[0], group=self.group, async_op=True)
        return _PendingAllToAll(request, incoming, outgoing, receives)

    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """The time-out a process group was made with; the shortest where it has several backends."""
    kinds = group._device_types  # type: ignore[attr-defined]
    options = [group._get_backend(kind).options for kind in kinds]  # type: ignore[attr-defined]
    # some backends have none
    return min((one._timeout for one in options if one is not None), default=default_pg_timeout)


def duplicate_group(group: dist.ProcessGroup, timeout: timedelta | None = None, **how: Any) -> Any:
    """Another process group of the same ranks. A collective call of these ranks alone; `how` goes to `new_group`."""
    # PyTorch names such a group by the number of groups its maker is in: where some are in fewer, as ranks that only serve are,
    # they would wait for each other under different names
    counts: list[Any] = [None] * dist.get_world_size(group)
    mine = len(dist.distributed_c10d._world.pg_names)
    dist.all_gather_object(counts, mine, group=group)
    for _ in range(max(counts) - mine):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
    # newer PyTorch sorts ranks unless told not to; older groups are all sorted
    if "sort_ranks" in inspect.signature(dist.new_group).parameters:
        how["sort_ranks"] = False
    return dist.new_group(dist.get_process_group_ranks(group), timeout, use_local_synchronization=True, **how)


class _PendingRequests(NamedTuple):
    requests: list[dist.Work]
    alive: tuple[list[Packet], list[Packet]]

    def wait(self) -> None:
        peers = [packet.peer for packets in self.alive for packet in packets]
        for number, request in enumerate(self.requests):
            try:
                request.wait()
            except RuntimeError as error:
                # NCCL gives one request for all messages
                who = {peers[number]} if len(self.requests) == len(peers) else set(peers)
                raise _peer_stopped(who, error) from None


class _PendingAllToAll(NamedTuple):
    request: dist.Work
    incoming: Tensor
    outgoing: Tensor
    receives: list[Packet]

    def wait(self) -> None:
        try:
            self.request.wait()
        except RuntimeError as error:
            raise _peer_stopped({packet.peer for packet in self.receives}, error) from None
        sizes = [packet.tensor.nbytes for packet in self.receives]
        for packet, part in zip(self.receives, self.incoming.split(sizes), strict=True):
            _as_bytes(packet.tensor).copy_(part)


def _peer_stopped(peers: set[int], error: RuntimeError) -> LostRankError:
    who = ", ".join(map(str, sorted(peers)))
    return LostRankError(f"{'ranks' if len(peers) > 1 else 'rank'} {who} of the group stopped answering: {error}")


def _pack(part: Tensor, tensor: Tensor) -> None:
    """Write a tensor of any strides into bytes: in one pass where the place is aligned to its numbers."""
    if part.storage_offset() % tensor.element_size() == 0:
        part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    else:
        part.copy_(_as_bytes(tensor.contiguous()))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


class InProcessNetwork:
    """What joins all ranks of one process: rank r uses `transport(r)`, and waits once every rank has posted its step.

    A packet is copied as soon as both ends have posted it, so that no end outlives its step.
    """

    def __init__(self) -> None:
        # per (source, destination): tensors whose other end has not been posted yet
        self._sent: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        self._wanted: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)

    def transport(self, rank: int) -> Transport:
        """The transport of one rank."""
        return InProcessTransport(self, rank)

    def post(self, sent: list[tuple[int, int, Tensor]], wanted: list[tuple[int, int, Tensor]]) -> None:
        """Post (source, destination, tensor) of packets that a rank sends, and that it wants."""
        for queue, others, packets in ((self._sent, self._wanted, sent), (self._wanted, self._sent, wanted)):
            for src, dst, tensor in packets:
                if others[src, dst]:
                    other = others[src, dst].popleft()
                    source, target = (tensor, other) if queue is self._sent else (other, tensor)
                    target.copy_(source)
                else:
                    queue[src, dst].append(tensor)

    def has_pending(self, rank: int) -> bool:
        """Whether this rank still waits for a packet."""
        return any(queue for (_, dst), queue in self._wanted.items() if dst == rank)


class InProcessTransport(NamedTuple):
    """The transport of one rank of a process that runs all ranks."""

    network: InProcessNetwork
    rank: int

    def exchange(self, sends: list[Packet], receives: list[Packet], collective: bool) -> PendingMessages:
        self.network.post(
            [(self.rank, packet.peer, packet.tensor) for packet in sends],
            [(packet.peer, self.rank, packet.tensor) for packet in receives],
        )
        return _PendingInProcess(self.network, self.rank)


class _PendingInProcess(NamedTuple):
    network: InProcessNetwork
    rank: int

    def wait(self) -> None:
        assert not self.network.has_pending(self.rank), f"rank {self.rank} waits for a packet that nobody has posted"


class SingleRankTransport:
    """The transport of a plan for one rank: there is nobody to talk to."""

    def exchange(self, sends: list[Packet], receives: list[Packet], collective: bool) -> PendingMessages:
        assert not sends and not receives, "a plan for one rank has no moves"
        return _PendingRequests([], ([], []))
