"""How long a thread waits for other ranks in torch.distributed, whoever calls it: FSDP2, DeepSpeed, Megatron-core, attention."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from distattn.driver.message_monitor import MessageMonitor


def count_waits(waits: MessageMonitor) -> Callable[[], None]:
    """Add the time that this thread waits for `Work` of torch.distributed to a monitor, until the function returned is called.

    There is no hook for it, so the method `Work.wait` is replaced meanwhile. Over gloo the host waits there, over NCCL only the
    device's stream does. Waits that C++ code makes by itself, as functional collectives do, do not pass through it.
    """
    original, thread = dist.Work.wait, threading.get_ident()

    def wait(work: Any, *given: Any, **named: Any) -> Any:
        if threading.get_ident() != thread:
            # of planning, or of a checkpoint's writer
            return original(work, *given, **named)
        return waits.timed(partial(original, work, *given, **named))

    def stop() -> None:
        dist.Work.wait = original  # type: ignore[method-assign]

    dist.Work.wait = wait  # type: ignore[method-assign, assignment]
    return stop
