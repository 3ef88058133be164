"""The end of our own communicators: each is shut down once, when its last driver closes, when its group is freed, or at exit.

PyTorch's NCCL backend prints a warning and aborts if it is destroyed without `shutdown` or `abort` (ProcessGroupNCCL.cpp,
the destructor), and `destroy_process_group` ends only communicators that it has made. `shutdown` waits for unfinished messages
and for the other ranks, without a time-out; `abort` ends messages. The base class of backends has both (Backend.hpp) in
torch 2.11, 2.12 and 2.13.
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

# Seconds for all ranks to come to the end; after that the communicator is aborted.
_END_SECONDS = 20.0
# The same at exit, if `close` was forgotten: a rank that ends with an error must not be delayed for long.
_LATE_SECONDS = 5.0
# An abort continues in the background after this. It cannot end a shutdown that hangs: both take the same lock in NCCL's backend.
_ABORT_SECONDS = 1.0


class _Open(NamedTuple):
    """An open communicator. finalizer: ends it with its group, or at exit. process: the id of the process that opened it."""

    backend: Any
    farewell: Callable[[float], None] | None
    finalizer: Any
    helper: _Helper
    process: int


# by id: the backend lives as long as its entry
_OPEN: dict[int, _Open] = {}
# NCCL's backend must not be aborted after its shutdown
_ENDED: weakref.WeakSet[Any] = weakref.WeakSet()
# garbage collection may end a group, and thereby a communicator, on a thread that holds the lock
_LOCK = threading.RLock()


def end_with_group(backend: Any, group: dist.ProcessGroup, farewell: Callable[[float], None] | None = None) -> None:
    """Register a new communicator to end with its process group or at exit, unless `end_communicator` ends it before.

    farewell: returns once all ranks have called it, and raises if one has not within the given seconds. It precedes a
    shutdown, which waits for the other ranks without a time-out.
    """
    finalizer = weakref.finalize(group, _end_late, backend)
    with _LOCK:
        _OPEN[id(backend)] = _Open(backend, farewell, finalizer, _Helper(), os.getpid())


def end_communicator(backend: Any, gracefully: bool = True, seconds: float | None = None) -> None:
    """Shut a communicator down, unless it has ended: a collective call of its ranks, which make such calls in one order.

    gracefully: wait for unfinished messages and other ranks, for at most `seconds`, by default _END_SECONDS; otherwise abort
    the communicator. It is also aborted if a rank does not come to the end, or a shutdown fails. Print and raise nothing.
    Also end a backend for which `end_with_group` was not called.
    """
    with _LOCK:
        if backend in _ENDED:
            return
        _ENDED.add(backend)
        entry = _OPEN.pop(id(backend), None)
    if entry is not None:
        entry.finalizer.detach()
        if entry.process != os.getpid():
            # a forked process does not own what its parent opened
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
    """End a communicator whose group was freed, or whose process ends; after an unhandled error do not wait for other ranks."""
    end_communicator(backend, gracefully=not hasattr(sys, "last_value"), seconds=_LATE_SECONDS)


class _Helper:
    """Threads that wait for the end of a communicator, so that the caller's wait has a limit.

    They are started with the communicator, since from Python 3.12 on a process that is ending cannot start threads. There are
    two, because one may hang.
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
        """Return whether `work` ended well within some seconds."""
        succeeded: list[bool] = []
        done = threading.Event()
        self._calls.put((work, succeeded, done))
        done.wait(seconds)
        return bool(succeeded)

    def close(self) -> None:
        """End the threads, except for one that hangs."""
        for _ in self.threads:
            self._calls.put(None)
        ends = time.monotonic() + 1.0
        for thread in self.threads:
            # garbage collection may end a communicator on one of these threads
            if thread is not threading.current_thread():
                thread.join(max(ends - time.monotonic(), 0.0))

    @staticmethod
    def _work(calls: Any) -> None:
        while (call := calls.get()) is not None:
            work, succeeded, done = call
            # the caller aborts what fails, and nothing can be done about an abort that fails
            with suppress(Exception):
                work()
                succeeded.append(True)
            del work, call
            done.set()
