"""What a step has taken on this rank: seconds, of which data and waiting for other ranks, and memory."""

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
    """Of one step on this rank. seconds: wall time from the step before; data_seconds: of these, until its batches were there.

    wait_seconds: of these, on the host for messages and means of other ranks; None where a device waits instead.
    memory_allocated, memory_reserved: bytes of PyTorch's CUDA allocator at the step's highest; None on CPUs. memory_resident:
    bytes of the process in physical memory now; None where Linux's /proc is missing.
    """

    seconds: float
    data_seconds: float
    wait_seconds: float | None
    memory_allocated: int | None
    memory_reserved: int | None
    memory_resident: int | None


class StepClock:
    """Times the steps of a loop: iterate over `steps(...)`, and call `lap` at the end of each. Nothing waits for the device.

    messages: those of the driver (`ContextParallel.messages`), None for one rank.
    """

    def __init__(self, device: torch.device, messages: MessageMonitor | None = None):
        self._device, self._messages = device, messages
        self._began = time.perf_counter()
        self._data = 0.0
        self._waited = messages.seconds if messages else 0.0

    def steps(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same steps; the time until each is there is data time."""
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
        """What was done since the last lap, such as an evaluation, belongs to no step."""
        self.lap()

    def lap(self) -> StepCosts:
        """What the step that ends now has taken; the next one begins."""
        now, waited = time.perf_counter(), self._messages.seconds if self._messages else 0.0
        known = self._messages is None or self._messages.complete
        allocated = reserved = None
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        costs = StepCosts(
            now - self._began, self._data, waited - self._waited if known else None, allocated, reserved, _resident()
        )
        self._began, self._data, self._waited = now, 0.0, waited
        return costs


def _resident() -> int | None:
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
