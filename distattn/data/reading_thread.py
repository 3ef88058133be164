"""A background thread that does work ahead of time, unless a caller needs the result before the thread has begun."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


class PendingRead(Generic[_Result]):
    """Work queued for the thread. If the result is requested before the thread has begun it, the caller does it instead."""

    def __init__(self, work: Callable[[], _Result]) -> None:
        self._work: Callable[[], _Result] | None = work
        self._future: Future[_Result] = Future()
        self._process = os.getpid()

    def run(self) -> None:
        """Run the work on the calling thread. An error is kept for `result` to raise."""
        work = self._work
        if work is None or not self._future.set_running_or_notify_cancel():
            return
        try:
            self._future.set_result(work())
        except BaseException as error:
            self._future.set_exception(error)
        # break the reference cycle if the work holds an object that holds this one
        self._work = None

    def result(self) -> _Result:
        """Return the result of the work, or raise its error."""
        work = self._work
        # a process forked in the meantime has no thread to finish the work
        forked = self._process != os.getpid() and not self._future.done()
        if work and (forked or self._future.cancel()):
            return work()
        return self._future.result()


class ReadingThread:
    """A daemon thread that does one piece of work after another.

    The thread starts with the first piece of work, and is started again in a forked process. It ends when this object is no
    longer referenced, or with the process.
    """

    def __init__(self) -> None:
        self._process: int | None = None
        self._lock = threading.Lock()

    def start(self, work: Callable[[], _Result]) -> PendingRead[_Result]:
        """Append work to the thread's queue. Return its pending result."""
        started = PendingRead(work)
        with self._lock:
            if self._process != os.getpid():
                self._process = os.getpid()
                self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
                # the thread must not keep this object alive
                threading.Thread(target=_run, args=(self._queue,), daemon=True, name="distattn-reading").start()
                weakref.finalize(self, self._queue.put, None)
        self._queue.put(started.run)
        return started


def _run(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := queue.get()) is not None:
        work()
        # drop the reference while waiting for the next piece of work
        del work
