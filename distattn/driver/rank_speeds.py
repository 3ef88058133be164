"""Speeds of ranks, measured while they compute. They determine how attention is distributed two steps later."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from distattn.kernels.devices import has_streams
from distattn.kernels.registry import Kernel

# speeds are rounded to multiples of this fraction of the mean, so that small changes do not change plans
_RESOLUTION = 0.05
_SCALE = 1000
# limits of a rank's speed relative to the mean
_SLOWEST, _FASTEST = 0.25, 4.0


class RankSpeeds:
    """Measured or replayed speeds of all ranks.

    `log` holds each step's speeds in thousandths of the mean, or None for a step before any speed was known. Passed as
    `adaptive`, the log replays a run. A rank's speed is the planned cost of its tasks divided by the time of its kernels. A rank
    without tasks reports None and counts as average.
    """

    def __init__(self, adaptive: bool | Sequence[Sequence[int] | None], ranks: int):
        self.replayed = None if isinstance(adaptive, bool) else list(adaptive)
        self.ranks = ranks
        self.log: list[Sequence[int] | None] = []
        self._work = 0
        self._seconds = 0.0
        # passes whose time has not been counted yet, in execution order
        self._passes: deque[_Pass] = deque()

    def options(self, measured: Sequence[float | None]) -> tuple[tuple[str, Any], ...]:
        """Return the strategy's options for this step. measured: the speed that each rank reported; None for no speed."""
        number = len(self.log)
        if self.replayed is None:
            self.log.append(quantised(measured))
        else:
            self.log.append(self.replayed[number] if number < len(self.replayed) else None)
        last = self.log[-1]
        return () if last is None else (("speeds", tuple(last)),)

    def measured(self) -> float | None:
        """Return the cost per second of this rank's kernels since the last call. On a GPU only finished passes count."""
        while self._passes and all(end.query() for _, end in self._passes[0].clocks[-1:]):
            done = self._passes.popleft()
            self._work += done.work
            self._seconds += done.seconds + sum(begin.elapsed_time(end) for begin, end in done.clocks) / 1e3
        work, seconds = self._work, self._seconds
        self._work, self._seconds = 0, 0.0
        return work / seconds if work and seconds else None

    def count_pass(self, work: int) -> None:
        """Count one more pass on this rank. work: the cost of its tasks."""
        self._passes.append(_Pass(work))

    def timed(self, kernel: Kernel) -> Kernel:
        """Wrap a kernel so that its time is measured."""
        return cast(Kernel, _Timed(kernel, self))

    def clock(self, device: torch.device) -> _Clock:
        """Return a clock that measures the time until its `stop` is called.

        On a GPU, it measures the stream's time, without blocking the host.
        """
        return _Clock(self, device)


@dataclass
class _Pass:
    """A pass: the cost of its tasks, its kernels' seconds on a CPU, and the events around its kernels on a GPU."""

    work: int
    seconds: float = 0.0
    clocks: list[tuple[Any, Any]] = field(default_factory=list)


class _Clock:
    def __init__(self, speeds: RankSpeeds, device: torch.device):
        self.running, self.event = speeds._passes[-1], None
        if has_streams(device):
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        self.began = time.perf_counter()

    def stop(self) -> None:
        if self.event is None:
            self.running.seconds += time.perf_counter() - self.began
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self.running.clocks.append((self.event, end))


class _Timed:
    """A kernel that measures its own time; all other attributes are those of the wrapped kernel."""

    def __init__(self, kernel: Kernel, speeds: RankSpeeds):
        self._kernel, self._speeds = kernel, speeds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def forward(self, q: Any, *rest: Any, **into: Any) -> Any:
        clock = self._speeds.clock(q.device)
        out = self._kernel.forward(q, *rest, **into)
        clock.stop()
        return out

    def backward(self, do: Any, *rest: Any, **into: Any) -> Any:
        clock = self._speeds.clock(do.device)
        out = self._kernel.backward(do, *rest, **into)
        clock.stop()
        return out


def quantised(measured: Sequence[float | None]) -> list[int] | None:
    """Return the speeds of all ranks in thousandths of their mean, rounded to _RESOLUTION; None without measurements."""
    speeds = [speed for speed in measured if speed]
    if not speeds:
        return None
    mean = sum(speeds) / len(speeds)
    shares = [min(max((speed or mean) / mean, _SLOWEST), _FASTEST) for speed in measured]
    return [round(round(share / _RESOLUTION) * _RESOLUTION * _SCALE) for share in shares]
