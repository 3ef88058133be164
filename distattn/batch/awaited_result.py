"""Results of a thread that asks other ranks, and whoever waits for them."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from typing import TypeVar

from distattn.supervision.heartbeats import awaiting_thread

Result = TypeVar("Result")


class AwaitedResult(Future[Result]):
    """A future whose thread may ask other ranks first: whoever waits for it is told to wait for them meanwhile, and not else."""

    def __init__(self, thread: int):
        """thread: that makes the result, by its ident."""
        super().__init__()
        self._thread = thread

    def result(self, timeout: float | None = None) -> Result:
        """As of any future."""
        with contextlib.nullcontext() if self.done() else awaiting_thread(self._thread):
            return super().result(timeout)
