"""Shutdown of our own communicators. Each is shut down once: when its last driver closes, when its group is freed, or at exit.

PyTorch's NCCL backend prints a warning and aborts if it is destroyed without `shutdown` or `abort` (see the destructor in
ProcessGroupNCCL.cpp), and `destroy_process_group` ends only communicators that PyTorch itself has created. `shutdown` waits
without a timeout for unfinished messages and for the other ranks; `abort` ends messages. The base class of backends
(Backend.hpp) has both in torch 2.11, 2.12 and 2.13.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist

# Seconds within which all ranks must call `end_communicator`. After that, the communicator is aborted.
_END_SECONDS = 20.0
# The same at exit if `close` was not called: a rank that exits with an error must not be delayed for long.
_LATE_SECONDS = 5.0
# Seconds to wait for an abort, which then continues in the background. An abort cannot end a hanging shutdown, because both
# take the same lock in the NCCL backend.
_ABORT_SECONDS = 1.0


class _Open(NamedTuple):
    """An open communicator. finalizer: ends it when its group is freed, or at exit. process: the id of the process that
    opened it."""

    backend: Any
    farewell: Callable[[float], None] | None
    finalizer: Any
    helper: _Helper
    process: int


# keyed by the backend's id, which stays valid because the entry keeps the backend alive
_OPEN: dict[int, _Open] = {}
# backends that have ended and must not be ended again: NCCL's must not be aborted after its shutdown
_ENDED: weakref.WeakSet[Any] = weakref.WeakSet()
# reentrant, since garbage collection may end a group, and with it a communicator, on a thread that holds the lock
_LOCK = threading.RLock()


def end_with_group(backend: Any, group: dist.ProcessGroup, farewell: Callable[[float], None] | None = None) -> None:
    """Register a new communicator to end with its process group or at exit, unless `end_communicator` ends it earlier.

    farewell: a function that returns once all ranks have called it, and raises if any of them has not done so within the
    given seconds. It is called before a shutdown, which waits for the other ranks without a timeout.
    """
    finalizer = weakref.finalize(group, _end_late, backend)
    with _LOCK:
        _OPEN[id(backend)] = _Open(backend, farewell, finalizer, _Helper(), os.getpid())


def end_communicator(backend: Any, gracefully: bool = True, seconds: float | None = None) -> None:
    """Shut down a communicator unless it has already ended. All of its ranks must call this, in the same order for all
    communicators.

    gracefully: wait at most `seconds` (default: _END_SECONDS) for unfinished messages and other ranks; if False, abort the
    communicator immediately. It is also aborted if a rank does not call this in time, or if the shutdown fails. Nothing is
    printed or raised. This also works for a backend that was never passed to `end_with_group`.
    """
    with _LOCK:
        if backend in _ENDED:
            return
        _ENDED.add(backend)
        entry = _OPEN.pop(id(backend), None)
    if entry is not None:
        entry.finalizer.detach()
        if entry.process != os.getpid():
            # a forked process does not own its parent's communicators
            return
    helper = _Helper() if entry is None else entry.helper
    farewell = None if entry is None else entry.farewell
    limit = _END_SECONDS if seconds is None else seconds
    try:
        all_are_here = gracefully and (farewell is None or helper.run(partial(farewell, limit), limit))
        if not (all_are_here and helper.run(backend.shutdown, limit)):
            helper.run(backend.abort, _ABORT_SECONDS)
    finally:
        helper.close()


def _end_late(backend: Any) -> None:
    """End a communicator when its group is freed or its process exits. After an unhandled exception, do not wait for other
    ranks."""
    end_communicator(backend, gracefully=not hasattr(sys, "last_value"), seconds=_LATE_SECONDS)


class _Helper:
    """Threads that wait for a communicator to end, so that the caller can stop waiting after a time limit.

    They are started with the communicator, because since Python 3.12 an exiting process cannot start threads. There are two,
    because one may hang.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        names = (f"distattn-communicator-end-{number}" for number in range(2))
        self.threads = [
            threading.Thread(target=self._work, args=(self._calls,), daemon=True, name=name) for name in names
        ]
        for thread in self.threads:
            thread.start()

    def run(self, work: Callable[[], None], seconds: float) -> bool:
        """Run `work` on a thread. Return whether it succeeded within `seconds`."""
        succeeded: list[bool] = []
        done = threading.Event()
        self._calls.put((work, succeeded, done))
        done.wait(seconds)
        return bool(succeeded)

    def close(self) -> None:
        """End the threads. A thread that hangs is left behind."""
        for _ in self.threads:
            self._calls.put(None)
        ends = time.monotonic() + 1.0
        for thread in self.threads:
            # skip the current thread: garbage collection may end a communicator on one of these threads
            if thread is not threading.current_thread():
                thread.join(max(ends - time.monotonic(), 0.0))

    @staticmethod
    def _work(calls: Any) -> None:
        while (call := calls.get()) is not None:
            work, succeeded, done = call
            # the caller aborts after a failure, and nothing can be done if the abort fails
            with suppress(Exception):
                work()
                succeeded.append(True)
            del work, call
            done.set()
