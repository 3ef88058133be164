"""Tensors that wait for the backward pass in pinned memory of the host: copied out during the forward pass, and back in time.

Copies have a stream of their own. A tensor that leaves keeps its place on the device until it has been copied; a few may be on
their way at once, then the next layer waits for the oldest. In the backward pass tensors come back in the opposite order, a few
ahead of the one that was asked for.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.kernels.devices import has_streams
from distattn.memory import pinned_memory


class HostOffload:
    """The tensors of a rank that wait on the host, in the order in which they went there.

    in_flight: how many tensors may be on the device beside those in use, on their way out, and on their way back; at least 1.
    On a device without streams, a CPU, tensors are copied on the spot.
    """

    def __init__(self, in_flight: int = 2):
        self._streams: dict[torch.device, Any] = {}
        if in_flight < 1:
            raise DistattnError(f"in_flight is at least 1, not {in_flight}.")
        self.in_flight = in_flight
        self._lock = threading.RLock()
        # on their way out, oldest first; those that may be asked for, in the order in which they came
        self._leaving: deque[Ticket] = deque()
        self._waiting: list[weakref.ref[Ticket]] = []
        # pinned bytes of tickets that are gone. All copies of a device are on one stream, so they are used again in its order
        self._free: dict[torch.device, list[Tensor]] = {}

    def put(self, x: Tensor) -> Ticket:
        """Take a tensor to the host; the caller drops it. In the current stream of this thread, which made it."""
        with self._lock:
            ticket = Ticket(self, x, self._stream(x.device))
            self._waiting = [one for one in self._waiting if one() is not None]
            self._waiting.append(weakref.ref(ticket))
            self._leaving.append(ticket)
            while len(self._leaving) > self.in_flight:
                self._leaving.popleft().leave()
        return ticket

    @property
    def host_bytes(self) -> int:
        """Bytes on the host at this moment."""
        return sum(ticket.host.nbytes for one in self._waiting if (ticket := one()) is not None)

    def get(self, ticket: Ticket) -> Tensor:
        """The tensor of a ticket, on its device; those that went out before it are on their way back after this."""
        with self._lock:
            if ticket in self._leaving:
                self._leaving.remove(ticket)
            x = ticket.arrive()
            alive = [one() for one in self._waiting]
            before = alive[: alive.index(ticket)] if ticket in alive else []
            ahead = [one for one in before if one is not None][-self.in_flight :]
            for one in reversed(ahead):
                one.fetch()
        return x

    def take_pinned(self, x: Tensor) -> Tensor:
        """Return pinned bytes (at least those of x), free ones if some are large enough: pinning takes long."""
        with self._lock:
            free = self._free.setdefault(x.device, [])
            fitting = [number for number, buffer in enumerate(free) if buffer.nbytes >= x.nbytes]
            if fitting:
                return free.pop(min(fitting, key=lambda number: free[number].nbytes))
            if free:
                # a larger one takes the place of a smaller one, whose copies have to be over
                self._streams[x.device].synchronize()
                del free[max(range(len(free)), key=lambda number: free[number].nbytes)]
        return pinned_memory.pinned_bytes(x.nbytes)

    def give_pinned(self, device: torch.device, buffer: Tensor) -> None:
        """Take back the pinned bytes of a tensor of a device."""
        with self._lock:
            self._free[device].append(buffer)

    def __del__(self) -> None:
        # the allocator knows nothing of these pages: they must not be given back before the copies from and to them are over
        for stream in self._streams.values():
            stream.synchronize()

    def _stream(self, device: torch.device) -> Any:
        if not has_streams(device):
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Ticket:
    """A tensor on the host. device: where it is, or is on its way back to, if it is there; event: after which it is."""

    def __init__(self, owner: HostOffload, x: Tensor, stream: Any):
        self._owner, self._stream, self._like = owner, stream, x.new_empty(0)
        self._event: Any = None
        self._device: Tensor | None = x
        self._pinned: Tensor | None = None
        if stream is None:
            self.host = x.clone()
            return
        self._pinned = owner.take_pinned(x)
        self.host = self._pinned[: x.nbytes].view(x.dtype).view(x.shape)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
            self._event = stream.record_event()

    def __del__(self) -> None:
        # a copy that is under way when a graph is dropped: its memory must not be used before the copy is over
        self.leave()
        if self._pinned is not None:
            self._owner.give_pinned(self._like.device, self._pinned)

    def get(self) -> Tensor:
        """The tensor on its device, of which the caller has the only reference. Its numbers are those that went out."""
        return self._owner.get(self)

    def leave(self) -> None:
        """Give up the tensor's place on the device: the current stream waits until it has been copied."""
        if self._event is not None:
            torch.cuda.current_stream(self._like.device).wait_event(self._event)
        self._device = self._event = None

    def fetch(self) -> None:
        """Begin to copy the tensor back, unless it is there or on its way."""
        if self._device is not None:
            return
        # made in the current stream, where it is used and freed; what had its place before is over when the copy begins
        self._device = torch.empty(self.host.shape, dtype=self.host.dtype, device=self._like.device)
        if self._stream is None:
            self._device.copy_(self.host)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._like.device))
        with torch.cuda.stream(self._stream):
            self._device.copy_(self.host, non_blocking=True)
            self._event = self._stream.record_event()

    def arrive(self) -> Tensor:
        """The tensor, once the current stream has waited for it; the ticket does not keep it."""
        self.fetch()
        if self._event is not None:
            torch.cuda.current_stream(self._like.device).wait_event(self._event)
        x, self._device, self._event = self._device, None, None
        assert x is not None
        return x
