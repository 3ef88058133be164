"""A monitor of attention's messages on the host: how long a rank has waited for other ranks, and a hook on what it sends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from distattn.parallel.runtime.communication.transport import Packet

Result = TypeVar("Result")


class MessageMonitor:
    """The monitor of one driver. seconds: total time that the thread which runs the model waited for messages and mean losses.

    Not included are waits of a trainer's own collectives (FSDP2's), unless the trainer has them timed here, and the comparison of
    plans when a run meets a new shape of attention, in its first steps. complete: whether all waits for messages are included.
    They are not if a device's stream waits (NCCL): then the host continues, and only a profile of the device shows the waits.
    on_send: called with the packets that this rank is about to send, once for each exchange of messages, also without packets;
    None by default.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.complete = True
        # whether a wait is being timed; a wait inside a wait counts once
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
