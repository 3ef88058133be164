"""Messages of attention, watched from the host: how long a rank has waited for those of others, and a look at what it sends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from distattn.parallel.runtime.transport import Packet

Result = TypeVar("Result")


class MessageMonitor:
    """Of one driver. seconds: waits of the thread that runs the model, added up: for messages, and for others' mean losses.

    Waits of a trainer's own collectives (FSDP2's) are not among them unless the trainer has them timed here, nor is the
    comparison of plans where a shape of attention is new to the run, in its first steps. complete: whether all waits for messages
    are. They are not where waiting is left to a device's stream (NCCL): the host goes on, and only a profile of the device can
    tell. on_send: is given what this rank is about to send, once for each exchange of messages, also where it sends nothing;
    None by default.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.complete = True
        # a wait inside a wait counts once
        self._waits = False
        self.on_send: Callable[[Sequence[Packet]], None] | None = None

    def timed(self, wait: Callable[[], Result]) -> Result:
        """What `wait` returns; the time it takes counts."""
        if self._waits:
            return wait()
        began, self._waits = time.perf_counter(), True
        try:
            return wait()
        finally:
            self.seconds += time.perf_counter() - began
            self._waits = False
