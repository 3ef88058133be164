"""The end of communicators of our own: each is shut down once, when its last driver closes, when its group goes, or at exit.

PyTorch's NCCL backend prints a warning and aborts where it is destroyed without `shutdown` or `abort` (ProcessGroupNCCL.cpp,
the destructor), and `destroy_process_group` ends only communicators that it has made. `shutdown` waits for messages under way
and for the other ranks, without a time-out; `abort` ends messages. The base class of backends has both (Backend.hpp) in
torch 2.11, 2.12 and 2.13.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch.distributed as dist

# A healthy communicator shuts down at once. After this it is aborted, which may take as long again; in seconds.
_END_SECONDS = 20.0


class _Open(NamedTuple):
    """An open communicator. finalizer: ends it with its group, or at exit. process: the id of the process that opened it."""

    backend: Any
    finalizer: Any
    process: int


# by id: the backend lives as long as its entry
_OPEN: dict[int, _Open] = {}
# NCCL's backend must not be aborted after its shutdown
_ENDED: weakref.WeakSet[Any] = weakref.WeakSet()
# garbage collection may end a group, and so a communicator, on a thread that holds the lock
_LOCK = threading.RLock()


def end_with_group(backend: Any, group: dist.ProcessGroup) -> None:
    """Have a new communicator ended with its process group or at exit, unless `end_communicator` ends it before."""
    _Helpers.acquire()
    finalizer = weakref.finalize(group, _end_late, backend)
    with _LOCK:
        _OPEN[id(backend)] = _Open(backend, finalizer, os.getpid())


def end_communicator(backend: Any, gracefully: bool = True) -> None:
    """Shut a communicator down, unless it has ended: a collective call of its ranks, which make such calls in one order.

    gracefully: messages under way and other ranks are waited for; otherwise the communicator is aborted. It is aborted as well
    where a shutdown fails or takes longer than _END_SECONDS, as where a rank is lost. Prints and raises nothing. A backend that
    `end_with_group` was not called for is ended as well.
    """
    with _LOCK:
        if backend in _ENDED:
            return
        _ENDED.add(backend)
        found = _OPEN.pop(id(backend), None)
    if found is None:
        _Helpers.acquire()
    else:
        found.finalizer.detach()
        if found.process != os.getpid():
            # a process that was forked has no part in what its parent opened
            return
    try:
        if not (gracefully and _Helpers.run(backend.shutdown, _END_SECONDS)):
            _Helpers.run(backend.abort, _END_SECONDS)
    finally:
        _Helpers.release()


def _end_late(backend: Any) -> None:
    """End a communicator whose group has gone, or whose process ends; after an unhandled error do not wait for other ranks."""
    end_communicator(backend, gracefully=not hasattr(sys, "last_value"))


class _Helpers:
    """Threads that wait for ends of communicators, so that the caller's wait has a limit.

    They are started with the first communicator, since from Python 3.12 on a process that is ending cannot start threads, and
    end with the last one. There are two, so that an abort can end a shutdown that hangs.
    """

    _calls: queue.SimpleQueue[tuple[Callable[[], None], list[bool], threading.Event] | None] = queue.SimpleQueue()
    _threads: tuple[threading.Thread, ...] = ()
    _process = 0
    _users = 0

    @classmethod
    def acquire(cls) -> None:
        """Note one more communicator that is to be ended. Start the threads of this process for the first one."""
        with _LOCK:
            if cls._process != os.getpid():
                cls._process, cls._users = os.getpid(), 0
            cls._users += 1
            if cls._users == 1:
                cls._calls = queue.SimpleQueue()
                names = (f"distattn-communicator-end-{number}" for number in range(2))
                cls._threads = tuple(
                    threading.Thread(target=cls._work, args=(cls._calls,), daemon=True, name=name) for name in names
                )
                for thread in cls._threads:
                    thread.start()

    @classmethod
    def release(cls) -> None:
        """Note that a communicator has ended. End the threads after the last one."""
        with _LOCK:
            cls._users -= 1
            if cls._users:
                return
            ending, cls._threads = cls._threads, ()
            for _ in ending:
                cls._calls.put(None)
        for thread in ending:
            # garbage collection may end a communicator on one of these threads, and a call that hangs is left behind
            if thread is not threading.current_thread():
                thread.join(1.0)

    @classmethod
    def run(cls, work: Callable[[], None], seconds: float) -> bool:
        """Return whether `work` ended well within some seconds."""
        succeeded: list[bool] = []
        done = threading.Event()
        cls._calls.put((work, succeeded, done))
        done.wait(seconds)
        return bool(succeeded)

    @staticmethod
    def _work(calls: Any) -> None:
        while (call := calls.get()) is not None:
            work, succeeded, done = call
            # what fails is aborted by the caller, and there is nothing to do about an abort that fails
            with suppress(Exception):
                work()
                succeeded.append(True)
            del work, call
            done.set()
