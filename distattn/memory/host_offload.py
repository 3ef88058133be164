"""Tensors that wait for the backward pass in pinned host memory.

Copies run on a separate stream. A tensor keeps its device memory until it has been copied to the host. A few copies may be in
flight; beyond that, the next layer waits for the oldest. In the backward pass, tensors return in reverse order, and the next few
are fetched before they are needed.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.kernels.devices import current_device, has_streams
from distattn.memory import pinned_memory


class HostOffload:
    """A rank's tensors that wait on the host, in the order in which they were copied there.

    in_flight: how many tensors may be on the device only because they are being copied, in each direction; at least 1. On a
    device without streams, such as a CPU, tensors are copied synchronously.
    """

    def __init__(self, in_flight: int = 2):
        self._streams: dict[torch.device, Any] = {}
        if in_flight < 1:
            raise DistattnError(f"in_flight must be at least 1, not {in_flight}.")
        self.in_flight = in_flight
        self._lock = threading.RLock()
        # tensors being copied out, oldest first, and all tensors that may be requested, in the order of `put`
        self._leaving: deque[Ticket] = deque()
        self._waiting: list[weakref.ref[Ticket]] = []
        # pinned buffers of dead tickets; a device's copies all run on one stream, so reuse follows stream order
        self._free: dict[torch.device, list[Tensor]] = {}

    def put(self, x: Tensor) -> Ticket:
        """Copy a tensor to the host. The current stream must have computed it, and the caller must then drop it."""
        with self._lock:
            ticket = Ticket(self, x, self._stream(x.device))
            self._waiting = [waiting for waiting in self._waiting if waiting() is not None]
            self._waiting.append(weakref.ref(ticket))
            self._leaving.append(ticket)
            while len(self._leaving) > self.in_flight:
                self._leaving.popleft().leave()
        return ticket

    @property
    def host_bytes(self) -> int:
        """The number of bytes on the host now."""
        return sum(ticket.host.nbytes for waiting in self._waiting if (ticket := waiting()) is not None)

    def get(self, ticket: Ticket) -> Tensor:
        """Return a ticket's tensor on its device, and start copying back the tensors that were put before it."""
        with self._lock:
            if ticket in self._leaving:
                self._leaving.remove(ticket)
            x = ticket.arrive()
            alive = [waiting() for waiting in self._waiting]
            before = alive[: alive.index(ticket)] if ticket in alive else []
            next_tickets = [earlier for earlier in before if earlier is not None][-self.in_flight :]
            for next_ticket in reversed(next_tickets):
                next_ticket.fetch()
        return x

    def take_pinned(self, x: Tensor) -> Tensor:
        """Return a pinned buffer with at least as many bytes as x. Reuse a free buffer if possible, since pinning is slow."""
        with self._lock:
            free = self._free.setdefault(x.device, [])
            fitting = [number for number, buffer in enumerate(free) if buffer.nbytes >= x.nbytes]
            if fitting:
                return free.pop(min(fitting, key=lambda number: free[number].nbytes))
            if free:
                # drop the largest free buffer, which a larger one replaces, once all copies from and to it are complete
                self._streams[x.device].synchronize()
                del free[max(range(len(free)), key=lambda number: free[number].nbytes)]
        with current_device(x.device):
            return pinned_memory.pinned_bytes(x.nbytes)

    def give_pinned(self, device: torch.device, buffer: Tensor) -> None:
        """Add a dead ticket's pinned buffer to its device's free buffers."""
        with self._lock:
            self._free[device].append(buffer)

    def __del__(self) -> None:
        # PyTorch's allocator does not know these pages, so copies from and to them must be complete before they are freed
        for stream in self._streams.values():
            stream.synchronize()

    def _stream(self, device: torch.device) -> Any:
        if not has_streams(device):
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Ticket:
    """A tensor on the host, which is also on the device while a copy is in flight."""

    def __init__(self, owner: HostOffload, x: Tensor, stream: Any):
        self._owner, self._stream, self._like = owner, stream, x.new_empty(0)
        # the event recorded after the latest copy, and the tensor on the device while it is there
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
        # a copy may be in flight when a graph is dropped; its memory must not be reused before the copy is complete
        self.leave()
        if self._pinned is not None:
            self._owner.give_pinned(self._like.device, self._pinned)

    def get(self) -> Tensor:
        """Return the tensor on its device, with the same elements. The caller has the only reference to it."""
        return self._owner.get(self)

    def leave(self) -> None:
        """Release the tensor's device memory. The current stream waits until the tensor has been copied."""
        if self._event is not None:
            torch.cuda.current_stream(self._like.device).wait_event(self._event)
        self._device = self._event = None

    def fetch(self) -> None:
        """Start copying the tensor back, unless it is already on the device or on its way there."""
        if self._device is not None:
            return
        # allocate on the current stream, where the tensor is used and freed; the copy waits for earlier work on this memory
        self._device = torch.empty(self.host.shape, dtype=self.host.dtype, device=self._like.device)
        if self._stream is None:
            self._device.copy_(self.host)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._like.device))
        with torch.cuda.stream(self._stream):
            self._device.copy_(self.host, non_blocking=True)
            self._event = self._stream.record_event()

    def arrive(self) -> Tensor:
        """Make the current stream wait for the tensor's copy, and return the tensor. The ticket drops its reference to it."""
        self.fetch()
        if self._event is not None:
            torch.cuda.current_stream(self._like.device).wait_event(self._event)
        x, self._device, self._event = self._device, None, None
        assert x is not None
        return x
