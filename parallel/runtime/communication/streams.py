"""Devices whose work is queued on streams: events order the work of several threads, not the order of their calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.kernels.devices import has_streams


def copy_to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy a tensor of the host to a device; the host does not wait for the copy.

    From pageable memory it would wait for all work on the device's current stream.
    """
    if not has_streams(device):
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


class Handover(NamedTuple):
    """Tensors that one thread makes in its current stream for other threads' streams, with the event after which they are
    ready."""

    tensors: list[Tensor]
    ready: Any

    @staticmethod
    def of(tensors: Iterable[Tensor]) -> Handover:
        """Record tensors of this thread's current stream. Tensors on the host are ready anyway; all others are on one device."""
        streamed = [tensor for tensor in tensors if has_streams(tensor.device)]
        return Handover(streamed, torch.cuda.current_stream(streamed[0].device).record_event() if streamed else None)

    def join(self) -> None:
        """Let the current stream wait for the tensors, and keep their memory from reuse until it is done."""
        if self.tensors:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.ready)
            for tensor in self.tensors:
                tensor.record_stream(stream)
