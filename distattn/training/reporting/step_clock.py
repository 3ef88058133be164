"""The cost of a step on this rank: memory, and seconds in total, waiting for data and waiting for other ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from distattn.driver.message_monitor import MessageMonitor

Step = TypeVar("Step")
_STATM = Path("/proc/self/statm")


class StepCosts(NamedTuple):
    """Costs of one step on this rank.

    seconds: wall time since the previous step. It includes data_seconds, spent waiting for the step's batches, and
    wait_seconds, spent on the host waiting for messages and reductions from other ranks (None if the device waits
    instead). memory_allocated, memory_reserved: the step's peak bytes in PyTorch's CUDA allocator; None on CPUs.
    memory_resident: current resident bytes of the process; None if there is no /proc.
    """

    seconds: float
    data_seconds: float
    wait_seconds: float | None
    memory_allocated: int | None
    memory_reserved: int | None
    memory_resident: int | None


class StepClock:
    """Timer of a training loop: iterate over `steps(...)` and call `lap` at the end of each step.

    It never synchronizes with the device. messages: the driver's monitor (`ContextParallel.messages`), or None for a
    single rank.
    """

    def __init__(self, device: torch.device, messages: MessageMonitor | None = None):
        self._device, self._messages = device, messages
        self._began = time.perf_counter()
        self._data = 0.0
        self._waited = messages.seconds if messages else 0.0

    def steps(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Yield the items of `steps`. The time until an item arrives counts as data time."""
        iterator = iter(steps)
        while True:
            began = time.perf_counter()
            try:
                step = next(iterator)
            except StopIteration:
                return
            self._data += time.perf_counter() - began
            yield step

    def skip(self) -> None:
        """Leave out the time since the last lap, such as that of an evaluation, which belongs to no step."""
        self.lap()

    def lap(self) -> StepCosts:
        """Return the costs of the step that ends now, and start timing the next one."""
        now, waited = time.perf_counter(), self._messages.seconds if self._messages else 0.0
        complete = self._messages is None or self._messages.complete
        allocated = reserved = None
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        costs = StepCosts(
            now - self._began, self._data, waited - self._waited if complete else None, allocated, reserved, _resident()
        )
        self._began, self._data, self._waited = now, 0.0, waited
        return costs


def _resident() -> int | None:
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
