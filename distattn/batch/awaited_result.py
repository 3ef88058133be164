"""Futures of results that a thread computes together with other ranks. Waits for them appear in the heartbeat."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from typing import TypeVar

from distattn.supervision.heartbeats import awaiting_thread

Result = TypeVar("Result")


class AwaitedResult(Future[Result]):
    """A future computed on a thread that may wait for other ranks; threads waiting for it report this in their heartbeat."""

    def __init__(self, thread: int):
        """Create the future without a result. thread: the identifier of the thread that computes the result."""
        super().__init__()
        self._thread = thread

    def result(self, timeout: float | None = None) -> Result:
        """Return the result. Until it is ready, the heartbeat shows what the computing thread is waiting for."""
        with contextlib.nullcontext() if self.done() else awaiting_thread(self._thread):
            return super().result(timeout)
