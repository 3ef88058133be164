"""Devices whose work is queued on streams: events and waits put it in order, not the order of calls in several threads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.kernels.devices import has_streams


def copied_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a tensor of the host on a device; the host does not wait for the copy.

    From pageable memory it would wait for all that the device's current stream has to do.
    """
    if not has_streams(device):
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


class Handover(NamedTuple):
    """Tensors that one thread makes in its current stream and others use in theirs, with the event after which they are there."""

    tensors: list[Tensor]
    ready: Any

    @staticmethod
    def of(tensors: Iterable[Tensor]) -> Handover:
        """From the current stream of this thread. Tensors on the host are there anyway; all others are on one device."""
        streamed = [tensor for tensor in tensors if has_streams(tensor.device)]
        return Handover(streamed, torch.cuda.current_stream(streamed[0].device).record_event() if streamed else None)

    def join(self) -> None:
        """The current stream may read the tensors: it waits for them, and their memory is not reused before it is done."""
        if self.tensors:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.ready)
            for tensor in self.tensors:
                tensor.record_stream(stream)
