"""How long a rank has waited for others: seconds on the host until messages of attention, and mean losses, had come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class WaitClock:
    """Adds up waits of the thread that runs the model. complete: whether it sees all waits for messages of attention.

    Waits of a trainer's own collectives (FSDP2's) are not among them, nor is the comparison of plans where a shape of attention
    is new to the run, in its first steps. It does not see all where waiting is left to a device's stream (NCCL): the host goes
    on, and only a profile of the device can tell.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.complete = True

    def timed(self, wait: Callable[[], Result]) -> Result:
        """What `wait` returns; the time it takes counts."""
        began = time.perf_counter()
        try:
            return wait()
        finally:
            self.seconds += time.perf_counter() - began
