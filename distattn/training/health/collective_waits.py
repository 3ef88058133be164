"""Time that a thread waits for other ranks in torch.distributed, for FSDP2, DeepSpeed, Megatron-core and attention
alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from distattn.driver.message_monitor import MessageMonitor


def count_waits(waits: MessageMonitor) -> Callable[[], None]:
    """Add the time that this thread waits for `Work` of torch.distributed to a monitor. Call the returned function to
    stop.

    PyTorch has no hook for this, so the method `Work.wait` is replaced meanwhile. Over gloo the host waits there; over
    NCCL only the device's stream does. Waits inside C++ code, as those of functional collectives, are not counted.
    """
    original, thread = dist.Work.wait, threading.get_ident()

    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            # the thread that plans, or that writes a checkpoint
            return original(work, *args, **kwargs)
        return waits.timed(partial(original, work, *args, **kwargs))

    def stop() -> None:
        dist.Work.wait = original  # type: ignore[method-assign]

    dist.Work.wait = wait  # type: ignore[method-assign, assignment]
    return stop
