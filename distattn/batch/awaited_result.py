"""Results that a thread of this rank makes of other ranks' words, and a main thread that says when it waits for those."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TypeVar

from distattn.supervision.heartbeats import telling

Result = TypeVar("Result")


class AwaitedResult(Future[Result]):
    """A future whose thread asks other ranks first. Whoever waits for it is told to wait for them while it asks, and not else.

    So a rank that hangs elsewhere is found by what it has told, and this one is not to blame. what: is asked.
    """

    def __init__(self, what: str):
        super().__init__()
        self._what = what
        self._asks, self._heard = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """By the thread: other ranks are asked in here."""
        self._asks.set()
        try:
            yield
        finally:
            self._heard.set()

    def result(self, timeout: float | None = None) -> Result:
        """As of any future; timeout: in seconds, for what follows after the others have been heard."""
        self._asks.wait()
        if not self._heard.is_set():
            with telling(self._what, waits=True):
                self._heard.wait()
        return super().result(timeout)

    def set_result(self, result: Result) -> None:
        """By the thread, which may not have had to ask."""
        super().set_result(result)
        self._go_on()

    def set_exception(self, exception: BaseException | None) -> None:
        """By the thread, as `set_result`."""
        super().set_exception(exception)
        self._go_on()

    def _go_on(self) -> None:
        self._asks.set()
        self._heard.set()
