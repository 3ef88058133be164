"""Results that a thread computes together with other ranks, and the heartbeat of the thread that waits for them."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from typing import TypeVar

from distattn.supervision.heartbeats import awaiting_thread

Result = TypeVar("Result")


class AwaitedResult(Future[Result]):
    """A future whose thread may have to wait for other ranks. While a thread waits for the future, its heartbeat says so."""

    def __init__(self, thread: int):
        """Begin without a result. thread: the ident of the thread that computes it."""
        super().__init__()
        self._thread = thread

    def result(self, timeout: float | None = None) -> Result:
        """Return the result like any future."""
        with contextlib.nullcontext() if self.done() else awaiting_thread(self._thread):
            return super().result(timeout)
