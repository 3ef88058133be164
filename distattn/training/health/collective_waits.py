"""Measures how long a thread waits for other ranks in torch.distributed, whichever engine or attention issued the work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from distattn.driver.message_monitor import MessageMonitor


def count_waits(waits: MessageMonitor) -> Callable[[], None]:
    """Add the time that this thread spends in torch.distributed's `Work.wait` to a monitor. Returns a function to stop it.

    PyTorch has no hook for this, so `Work.wait` is replaced until then. With gloo the host waits there; with NCCL only
    the device's stream does. Waits inside C++ code, such as those of functional collectives, are not counted.
    """
    original, thread = dist.Work.wait, threading.get_ident()

    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            # do not count other threads, such as those that plan or write checkpoints
            return original(work, *args, **kwargs)
        return waits.timed(partial(original, work, *args, **kwargs))

    def stop() -> None:
        dist.Work.wait = original  # type: ignore[method-assign]

    dist.Work.wait = wait  # type: ignore[method-assign, assignment]
    return stop
