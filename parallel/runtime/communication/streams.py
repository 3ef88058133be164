"""Ordering of work between threads on devices with streams: work is ordered by events, not by the order of calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.kernels.devices import has_streams


def copy_to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy a host tensor to a device without blocking the host.

    The copy goes through pinned memory. A copy from pageable memory would make the host wait for all work on the device's
    current stream.
    """
    if not has_streams(device):
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


class Handover(NamedTuple):
    """Tensors that one thread creates on its current stream for other threads' streams, and an event that fires when they are
    ready."""

    tensors: list[Tensor]
    ready: Any

    @staticmethod
    def of(tensors: Iterable[Tensor]) -> Handover:
        """Record an event on this thread's current stream. Host tensors are already ready; all others must be on one device."""
        streamed = [tensor for tensor in tensors if has_streams(tensor.device)]
        return Handover(streamed, torch.cuda.current_stream(streamed[0].device).record_event() if streamed else None)

    def join(self) -> None:
        """Make the current stream wait for the tensors, and keep their memory from being reused while the stream is using
        them."""
        if self.tensors:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.ready)
            for tensor in self.tensors:
                tensor.record_stream(stream)
