"""Transports for a step's messages: over torch.distributed (NCCL, gloo), or between ranks that run in lockstep in one process.

A transport has one method, `exchange`, which starts all sends and receives of a step and returns an object to wait on.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.ir.errors import DistattnError, LostRankError, named_ranks
from distattn.ir.plan import Payload
from distattn.parallel.runtime.communication.communicator_end import end_communicator
from distattn.parallel.runtime.lowering.row_bundles import RowFormat


class Packet(NamedTuple):
    """A tensor sent to or received from a peer (its rank in the group), and its payload. A received tensor is contiguous.

    row_bytes: if each row holds parts of several tensors, the bytes per payload in a row. row_format: the layout of such a
    row.
    """

    peer: int
    payload: Payload | str
    tensor: Tensor
    row_bytes: tuple[tuple[Payload, int], ...] = ()
    row_format: RowFormat | None = None

    @property
    def name(self) -> str:
        """The names of the payloads that the packet carries."""
        if self.row_bytes:
            return ", ".join(dict.fromkeys(payload.name for payload, _ in self.row_bytes))
        return self.payload if isinstance(self.payload, str) else self.payload.name

    def tensors(self) -> list[Tensor]:
        """Return views of the tensors that the packet carries, each in its own dtype, as (rows, elements) if rows hold
        several tensors."""
        if self.row_format is None:
            return [self.tensor]
        fields = [field for part in self.row_format.tensors for field in part]
        return [
            self.tensor.view(field.dtype)[:, field.first : field.first + field.heads * (field.width or 1)]
            for field in fields
        ]


class PendingMessages(Protocol):
    """The messages of a step while they are in flight."""

    def wait(self) -> None:
        """Wait until all messages have arrived. On GPUs, only make the current stream wait for them.

        Raise LostRankError naming the peers that stopped answering.
        """
        ...


class Transport(Protocol):
    """The interface that the executor expects of a transport."""

    def exchange(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> PendingMessages:
        """Start all sends and receives of a step. The packets between two ranks are matched in order.

        collective: if True, all ranks call this, even those without packets, and packets may travel in one uneven all-to-all.
        Otherwise they travel as point-to-point messages. where: a description of the step, for errors.
        """
        ...


class GroupTransport:
    """A transport that sends messages over its own communicator, separate from the process group.

    NCCL accepts all messages of a step in one call, without copies. gloo accepts them one at a time, or packed as the bytes
    of one all-to-all.
    """

    def __init__(self, group: dist.ProcessGroup, backend: Any):
        """Create a transport that no driver uses yet. backend: see `open_communicator`."""
        # a weak reference: torch.distributed keeps the group until destroy_process_group, and the process would abort at exit
        # if the group outlived that
        self._group = weakref.ref(group)
        self._backend = backend
        self.is_open = True
        # the number of drivers that use this transport, and whether all drivers released so far ended gracefully
        self._users, self._is_healthy = 0, True
        # True if waiting only orders streams, so that the host continues
        self.waits_on_stream = bool(backend.supports_coalescing)

    def exchange(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> PendingMessages:
        if self._group() is None:
            raise DistattnError("the process group this plan was prepared for has been destroyed; prepare it again.")
        if not self._is_healthy:
            # the type of error that NCCL raises, so that the code waiting for messages finds out which rank is lost
            raise RuntimeError(
                "the communicator of these messages was aborted, since a rank was lost or a message failed."
            )
        if not self.is_open:
            raise DistattnError(
                "this plan can send no more messages, because its ContextParallel was closed; create another one, and "
                "close it after the last backward pass."
            )
        if self._backend.supports_coalescing:
            # NCCL's all-to-all would send the same messages, but packed
            return self._all_at_once(sends, receives, where)
        return self._all_to_all(sends, receives, where) if collective else self._one_by_one(sends, receives, where)

    def abort(self) -> None:
        """Drop all unfinished messages. Kernels on a device stop waiting for them."""
        self.close(gracefully=False)

    def acquire(self) -> None:
        """Register one more driver, which sends through this transport until it calls `release`."""
        self._users += 1

    def release(self, gracefully: bool) -> None:
        """Drop one driver, and close the transport (see `close`) once no driver uses it."""
        self._users -= 1
        self._is_healthy = self._is_healthy and gracefully
        if not self._users:
            self.close(self._is_healthy)

    def close(self, gracefully: bool = True) -> None:
        """End the communicator if it has not ended yet. If `gracefully`, all ranks must call this. See `end_communicator`."""
        self.is_open = False
        self._is_healthy = self._is_healthy and gracefully
        end_communicator(self._backend, gracefully)

    def _all_at_once(self, sends: list[Packet], receives: list[Packet], where: str) -> PendingMessages:
        if not sends and not receives:
            return _PendingRequests([], ([], []), where)
        sends = [packet._replace(tensor=packet.tensor.contiguous()) for packet in sends]

        def start() -> list[Any]:
            self._backend._start_coalescing()
            try:
                for packet in sends:
                    self._backend.send([packet.tensor], packet.peer, 0)
                for packet in receives:
                    self._backend.recv([packet.tensor], packet.peer, 0)
            except BaseException:
                # end the group of calls: if left open, it would swallow all later calls
                self.abort()
                raise
            return [self._backend._end_coalescing()]

        return _PendingRequests(_started(start, sends, receives, where), (sends, receives), where)

    def _one_by_one(self, sends: list[Packet], receives: list[Packet], where: str) -> PendingMessages:
        sends = [packet._replace(tensor=packet.tensor.contiguous()) for packet in sends]

        def start() -> list[Any]:
            requests = [self._backend.send([packet.tensor], packet.peer, 0) for packet in sends]
            return requests + [self._backend.recv([packet.tensor], packet.peer, 0) for packet in receives]

        # the pending object keeps the tensors alive until the work is done
        return _PendingRequests(_started(start, sends, receives, where), (sends, receives), where)

    def _all_to_all(self, sends: list[Packet], receives: list[Packet], where: str) -> PendingMessages:
        size = self._backend.size()
        # the sort is stable: packets of one peer keep their order
        sends, receives = (sorted(packets, key=lambda packet: packet.peer) for packets in (sends, receives))
        splits = [[0] * size, [0] * size]
        for counts, packets in zip(splits, (sends, receives), strict=True):
            for packet in packets:
                counts[packet.peer] += packet.tensor.nbytes
        outgoing = torch.empty(sum(splits[0]), dtype=torch.uint8)
        for packet, part in zip(sends, outgoing.split([packet.tensor.nbytes for packet in sends]), strict=True):
            _pack(part, packet.tensor)
        incoming = torch.empty(sum(splits[1]), dtype=torch.uint8)

        def start() -> list[Any]:
            return [self._backend.alltoall_base(incoming, outgoing, splits[1], splits[0])]

        (request,) = _started(start, sends, receives, where)
        return _PendingAllToAll(request, incoming, outgoing, receives, where)


def _started(start: Callable[[], list[Any]], sends: list[Packet], receives: list[Packet], where: str) -> list[Any]:
    """Call `start` and return its result. Raise LostRankError if a connection is broken."""
    try:
        return start()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _peer_stopped([*sends, *receives], where, error) from None


class _PendingRequests(NamedTuple):
    requests: list[Any]
    alive: tuple[list[Packet], list[Packet]]
    where: str

    def wait(self) -> None:
        packets = [packet for packets in self.alive for packet in packets]
        for number, request in enumerate(self.requests):
            try:
                request.wait()
            except RuntimeError as error:
                # NCCL has one request for all messages, gloo one for each
                late = [packets[number]] if len(self.requests) == len(packets) else packets
                raise _peer_stopped(late, self.where, error) from None


class _PendingAllToAll(NamedTuple):
    request: Any
    incoming: Tensor
    outgoing: Tensor
    receives: list[Packet]
    where: str

    def wait(self) -> None:
        try:
            self.request.wait()
        except RuntimeError as error:
            raise _peer_stopped(self.receives, self.where, error) from None
        sizes = [packet.tensor.nbytes for packet in self.receives]
        for packet, part in zip(self.receives, self.incoming.split(sizes), strict=True):
            _as_bytes(packet.tensor).copy_(part)


def _peer_stopped(packets: list[Packet], where: str, error: RuntimeError) -> LostRankError:
    payloads = ", ".join(dict.fromkeys(packet.name for packet in packets))
    step = f" ({payloads} {where})" if where else ""
    return LostRankError(
        f"{named_ranks(packet.peer for packet in packets)} of the group stopped answering{step}: {error}"
    )


def _pack(part: Tensor, tensor: Tensor) -> None:
    """Copy a tensor with any strides into bytes, in one pass if `part` is aligned to the tensor's element size."""
    if part.storage_offset() % tensor.element_size() == 0:
        part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    else:
        part.copy_(_as_bytes(tensor.contiguous()))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


class InProcessNetwork:
    """A network between ranks in one process. Rank r uses `transport(r)`, and waits only after every rank has posted its
    step.

    A packet is copied as soon as both ends have posted it, so the tensors at either end need not outlive their step.
    """

    def __init__(self) -> None:
        # for each (source, destination): tensors whose counterpart has not been posted yet
        self._sent: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        self._wanted: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)

    def transport(self, rank: int) -> Transport:
        """Return the transport for one rank."""
        return InProcessTransport(self, rank)

    def post(self, sent: list[tuple[int, int, Tensor]], received: list[tuple[int, int, Tensor]]) -> None:
        """Post the packets that a rank sends and receives, each as (source, destination, tensor)."""
        for queue, others, packets in ((self._sent, self._wanted, sent), (self._wanted, self._sent, received)):
            for src, dst, tensor in packets:
                if others[src, dst]:
                    other = others[src, dst].popleft()
                    source, target = (tensor, other) if queue is self._sent else (other, tensor)
                    target.copy_(source)
                else:
                    queue[src, dst].append(tensor)

    def has_pending(self, rank: int) -> bool:
        """Return whether a rank is still waiting for a packet."""
        return any(queue for (_, dst), queue in self._wanted.items() if dst == rank)


class InProcessTransport(NamedTuple):
    """The transport of one rank in a process that runs all ranks."""

    network: InProcessNetwork
    rank: int

    def exchange(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> PendingMessages:
        self.network.post(
            [(self.rank, packet.peer, packet.tensor) for packet in sends],
            [(packet.peer, self.rank, packet.tensor) for packet in receives],
        )
        return _PendingInProcess(self.network, self.rank)


class _PendingInProcess(NamedTuple):
    network: InProcessNetwork
    rank: int

    def wait(self) -> None:
        assert not self.network.has_pending(self.rank), f"rank {self.rank} waits for a packet that no rank has posted"


class SingleRankTransport:
    """The transport for a plan with a single rank, which has no messages."""

    def exchange(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> PendingMessages:
        assert not sends and not receives, "a plan for one rank has no moves"
        return _PendingRequests([], ([], []), where)
