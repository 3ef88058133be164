"""How fast ranks are, measured while they compute: attention is shared out by it, two steps later."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from distattn.kernels.devices import has_streams
from distattn.kernels.registry import Kernel

# speeds are whole multiples of this share of the mean: small changes shall not change plans
_RESOLUTION = 0.05
_SCALE = 1000
# nobody is taken for slower, or faster, than this
_SLOWEST, _FASTEST = 0.25, 4.0


class RankSpeeds:
    """Measured or replayed speeds of all ranks. `log` has those of every step, in whole thousandths of the mean, or None where
    none was known yet: given back as `adaptive`, a run is replayed.

    Measured is the time this rank's kernels take for what its plans say they cost; a rank without any says nothing and counts as
    the mean.
    """

    def __init__(self, adaptive: bool | Sequence[Sequence[int] | None], ranks: int):
        self.replayed = None if isinstance(adaptive, bool) else list(adaptive)
        self.ranks = ranks
        self.log: list[Sequence[int] | None] = []
        self._work = 0
        self._seconds = 0.0
        # those whose time is not counted yet, in the order in which they run
        self._passes: deque[_Pass] = deque()

    def options(self, measured: Sequence[float | None]) -> tuple[tuple[str, Any], ...]:
        """What a strategy shall know of this step, from what every rank has measured."""
        number = len(self.log)
        if self.replayed is None:
            self.log.append(quantised(measured))
        else:
            self.log.append(self.replayed[number] if number < len(self.replayed) else None)
        last = self.log[-1]
        return () if last is None else (("speeds", tuple(last)),)

    def measured(self) -> float | None:
        """Cost per second of what this rank's kernels did since the last call, as far as a GPU has got: nobody waits for it."""
        while self._passes and all(end.query() for _, end in self._passes[0].clocks[-1:]):
            done = self._passes.popleft()
            self._work += done.work
            self._seconds += done.seconds + sum(begin.elapsed_time(end) for begin, end in done.clocks) / 1e3
        work, seconds = self._work, self._seconds
        self._work, self._seconds = 0, 0.0
        return work / seconds if work and seconds else None

    def count_pass(self, work: int) -> None:
        """This rank begins one more pass, with tasks of this cost."""
        self._passes.append(_Pass(work))

    def timed(self, kernel: Kernel) -> Kernel:
        """The same kernel, its time counted."""
        return cast(Kernel, _Timed(kernel, self))

    def clock(self, device: torch.device) -> _Clock:
        """Counts the time until its `stop`; on a GPU that of its stream, without waiting for it."""
        return _Clock(self, device)


@dataclass
class _Pass:
    """A pass: what its tasks cost, the seconds of its kernels on CPUs, and on a GPU the events around them."""

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
    """A kernel that counts its time; everything else is the kernel's own."""

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
    """Speeds of all ranks in thousandths of their mean, whole steps; None if nobody knows any."""
    known = [speed for speed in measured if speed]
    if not known:
        return None
    mean = sum(known) / len(known)
    shares = [min(max((speed or mean) / mean, _SLOWEST), _FASTEST) for speed in measured]
    return [round(round(share / _RESOLUTION) * _RESOLUTION * _SCALE) for share in shares]
