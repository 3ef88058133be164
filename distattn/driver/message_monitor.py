"""A host-side monitor of attention's messages: how long a rank has waited for other ranks, and a hook on its sends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from distattn.parallel.runtime.communication.transport import Packet

Result = TypeVar("Result")


class MessageMonitor:
    """The monitor of one driver. seconds: total time that the thread running the model waited for messages and mean losses.

    `seconds` excludes the trainer's own collectives (FSDP2's), unless the trainer times them here, and the comparison of plans
    for a new attention shape, in a run's first steps. complete: True if all waits for messages are included. It is False if a
    device's stream waits (NCCL): the host continues in that case, so only a profile of the device shows the waits. on_send:
    called with the packets that this rank is about to send, once for each exchange of messages, even without packets; None by
    default.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.complete = True
        # True while a wait is timed, so that nested waits count only once
        self._waits = False
        self.on_send: Callable[[Sequence[Packet]], None] | None = None

    def timed(self, wait: Callable[[], Result]) -> Result:
        """Run `wait` and add its time; return its result."""
        if self._waits:
            return wait()
        began, self._waits = time.perf_counter(), True
        try:
            return wait()
        finally:
            self.seconds += time.perf_counter() - began
            self._waits = False
