"""Work that begins ahead of time on a thread, and is finished by the thread or by the first caller that needs it."""

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
    """Work that the thread will do, unless its result is asked for before the thread begins: then the caller does it itself."""

    def __init__(self, work: Callable[[], _Result]) -> None:
        self._work: Callable[[], _Result] | None = work
        self._future: Future[_Result] = Future()
        self._process = os.getpid()

    def run(self) -> None:
        """Run the work on this thread. `result` raises its error."""
        work = self._work
        if work is None or not self._future.set_running_or_notify_cancel():
            return
        try:
            self._future.set_result(work())
        except BaseException as error:
            self._future.set_exception(error)
        # the work may hold an object that holds this one
        self._work = None

    def result(self) -> _Result:
        """Return the result of the work, or raise its error."""
        work = self._work
        # in a process that was forked meanwhile there is no thread that would finish it
        forked = self._process != os.getpid() and not self._future.done()
        if work and (forked or self._future.cancel()):
            return work()
        return self._future.result()


class ReadingThread:
    """A daemon thread that does one piece of work after another.

    It begins with the first piece of work, and again in a forked process. It ends with the last reference to this object, or with
    the process.
    """

    def __init__(self) -> None:
        self._process: int | None = None
        self._lock = threading.Lock()

    def start(self, work: Callable[[], _Result]) -> PendingRead[_Result]:
        """Append work to the queue, after all work that was started before."""
        started = PendingRead(work)
        with self._lock:
            if self._process != os.getpid():
                self._process = os.getpid()
                self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
                # the thread must not hold this object
                threading.Thread(target=_run, args=(self._queue,), daemon=True, name="distattn-reading").start()
                weakref.finalize(self, self._queue.put, None)
        self._queue.put(started.run)
        return started


def _run(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := queue.get()) is not None:
        work()
        # hold no reference while waiting for the next piece of work
        del work
