"""What a step has taken on this rank: seconds, of which data and waiting for other ranks, and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from distattn.driver.wait_clock import WaitClock

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

    waits: the driver's clock (`ContextParallel.waits`), None for one rank.
    """

    def __init__(self, device: torch.device, waits: WaitClock | None = None):
        self._device, self._waits = device, waits
        self._began = time.perf_counter()
        self._data = 0.0
        self._waited = waits.seconds if waits else 0.0

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

    def lap(self) -> StepCosts:
        """What the step that ends now has taken; the next one begins."""
        now, waited = time.perf_counter(), self._waits.seconds if self._waits else 0.0
        known = self._waits is None or self._waits.complete
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
