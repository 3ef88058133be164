"""Which rank is slow, and whose GPU counts errors: told every so many steps, of numbers that ranks have anyway.

On CPUs a rank's own compute time is what is left of a step without waiting for other ranks and for data. On GPUs the host does
not know how long its device waits for others, so each rank's GPU computes the same matrix product once a report, by itself.
"""

from __future__ import annotations

import math
import socket
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.driver.context_parallel import ContextParallel
from distattn.driver.message_monitor import MessageMonitor
from distattn.parallel.runtime.communicator import sendable_device
from distattn.training.collective_waits import count_waits
from distattn.training.device_counters import COUNTERS, DeviceCounters
from distattn.training.device_probe import DeviceProbe
from distattn.training.step_clock import StepClock, StepCosts

# a rank is named that takes so much longer than the median
SLOW_SHARE = 0.1
# and told of on the console once it has been named in so many reports one after the other
_REPORTS_IN_A_ROW = 3
_HOST_BYTES = 64
# what each rank tells before its counters
_TIMES = ("seconds", "data_seconds", "wait_seconds", "probe_seconds", "device", "last_xid")
_UNKNOWN = math.nan


@dataclass(frozen=True)
class HealthReport:
    """Of all ranks, over the steps since the last report. Times are seconds, means of a step, by rank; None where not known.

    compute_seconds: of a step without waits and data. probe_seconds: of the fixed matrix product of `DeviceProbe`. slowest: the
    rank that takes longest, by compute_seconds or, on GPUs, by probe_seconds; over_median: by which share of the median it
    takes longer. slow: whether that is enough to name it; reports_in_a_row: in which it was named, this one among them. errors:
    a sentence for each counter of a GPU that has grown. counters: of each rank's GPU by `COUNTERS`. state_checks: comparisons of
    state digests so far, in this process; damaged: a sentence for each that found a difference since the last report. text: all
    in a sentence.
    """

    step: int
    steps: int
    hosts: tuple[str, ...]
    seconds: tuple[float | None, ...]
    data_seconds: tuple[float | None, ...]
    wait_seconds: tuple[float | None, ...]
    compute_seconds: tuple[float | None, ...]
    probe_seconds: tuple[float | None, ...]
    slowest: int | None
    over_median: float | None
    slow: bool
    reports_in_a_row: int
    errors: tuple[str, ...]
    counters: tuple[tuple[float | None, ...], ...]
    text: str
    state_checks: int = 0
    damaged: tuple[str, ...] = ()

    @property
    def is_news(self) -> bool:
        """Whether a person should look: a counter has grown, or a rank has been slow for a while."""
        return bool(self.errors) or (self.slow and self.reports_in_a_row == _REPORTS_IN_A_ROW)


class HealthReports:
    """Measures the steps of a loop on every rank of the default group. Making it, and `after_step`, are collective calls.

    every: steps between two reports, 0 for none. publish: is called with each report, on all ranks. counters: of this rank's GPU,
    by default those of NVML. While it is open, waits of this thread for all collectives of torch.distributed are counted.
    """

    def __init__(
        self,
        cp: ContextParallel,
        device: torch.device,
        every: int,
        publish: Callable[[HealthReport], None],
        counters: DeviceCounters | None = None,
    ):
        self._cp, self._device, self._every, self._publish = cp, device, every, publish
        self._waits = cp.messages or MessageMonitor()
        self._waits.complete = self._waits.complete and device.type == "cpu"
        self._stop_counting = count_waits(self._waits)
        self._counters = counters or DeviceCounters.of_device(device)
        self._probe = DeviceProbe(device)
        self._times = [0.0, 0.0, 0.0]
        self._steps, self._reports, self._in_a_row = 0, 0, 0
        self._named: Counter[int] = Counter()
        self._last: int | None = None
        self._counted: list[list[float]] | None = None
        self._hosts: tuple[str, ...] = ()
        # counts of the state digest
        self.state_checks = 0
        self._damaged: tuple[str, ...] = ()
        if every:
            self._hosts = self._host_names()
            self._counted = self._gather([_UNKNOWN] * len(_TIMES) + self._counters.read())

    def clock(self) -> StepClock:
        """A clock of steps whose waits are all that are counted."""
        return StepClock(self._device, self._waits)

    def wait(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; its time counts as waiting. For calls whose waits PyTorch hides, such as clipping of DTensors."""
        return self._waits.timed(work)

    def after_step(self, step: int, costs: StepCosts) -> None:
        """Count a step, the step-th of the run; every so many, tell what the ranks have measured."""
        if not self._every:
            return
        waited = _UNKNOWN if costs.wait_seconds is None else costs.wait_seconds
        self._times = [
            before + now for before, now in zip(self._times, (costs.seconds, costs.data_seconds, waited), strict=True)
        ]
        self._steps += 1
        if step % self._every == 0:
            self._tell(step)

    def tell_damage(self, step: int, text: str) -> None:
        """Report at once that the state was found damaged; a collective call. text: a sentence."""
        self._damaged += (text,)
        if self._every and self._steps:
            self._tell(step)

    def _tell(self, step: int) -> None:
        times = [seconds / self._steps for seconds in self._times]
        counted = self._counters.read()
        own = [*times, self._probe.seconds(), float(self._counters.index), float(self._counters.last_xid)]
        rows = self._gather(own + counted)
        self._publish(self._report(step, rows))
        self._times, self._steps, self._damaged = [0.0, 0.0, 0.0], 0, ()

    def close(self) -> None:
        """Count waits no more, and let NVML go."""
        self._stop_counting()
        self._counters.close()

    def _gather(self, row: list[float]) -> list[list[float]]:
        """Every rank's numbers, by rank, as many each."""
        own = torch.tensor(row, dtype=torch.float64)
        return [one.tolist() for one in self._all_gather(own)]

    def _host_names(self) -> tuple[str, ...]:
        name = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
        found = self._all_gather(torch.frombuffer(bytearray(name), dtype=torch.uint8))
        return tuple(one.numpy().tobytes().rstrip(b"\0").decode("utf-8", "replace") for one in found)

    def _all_gather(self, own: Tensor) -> list[Tensor]:
        group = dist.group.WORLD if dist.is_initialized() else None
        if group is None:
            return [own]
        own, what = own.to(sendable_device(group)), "a report of health"
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        self._cp.begin(what)
        limit = self._cp.wait_timeout
        work = dist.all_gather(everyone, own, async_op=True)
        assert work is not None
        self._cp.guarded(lambda: work.wait() if limit is None else work.wait(limit), what)
        return [one.cpu() for one in everyone]

    def _report(self, step: int, rows: list[list[float]]) -> HealthReport:
        by_time = {name: [_known(row[place]) for row in rows] for place, name in enumerate(_TIMES)}
        compute = [_known(max(seconds - data - waited, 0.0)) for seconds, data, waited, *_ in rows]
        measure = compute if None not in compute else by_time["probe_seconds"]
        slowest, over = slowest_rank(measure)
        slow = over is not None and over >= SLOW_SHARE
        self._reports += 1
        self._in_a_row = (self._in_a_row if slowest == self._last else 0) + 1 if slow else 0
        self._last = slowest if slow else None
        if slow and slowest is not None:
            self._named[slowest] += 1
        errors = self._grown(rows)
        text = self._sentence(slowest, over, measure, measure is compute) if slowest is not None else ""
        return HealthReport(
            step,
            self._steps,
            self._hosts,
            tuple(by_time["seconds"]),
            tuple(by_time["data_seconds"]),
            tuple(by_time["wait_seconds"]),
            tuple(compute),
            tuple(by_time["probe_seconds"]),
            slowest,
            over,
            slow,
            self._in_a_row,
            errors,
            tuple(tuple(_known(value) for value in row[len(_TIMES) :]) for row in rows),
            " ".join([text, *errors, *self._damaged]).strip() or "Neither compute times nor counters are known.",
            self.state_checks,
            self._damaged,
        )

    def _sentence(self, slowest: int, over: float | None, measure: Sequence[float | None], of_steps: bool) -> str:
        assert over is not None
        median = statistics.median_low([one for one in measure if one is not None])
        unit = "s a step" if of_steps else "s for the same matrix product"
        if not self._in_a_row:
            return f"No rank computes {SLOW_SHARE:.0%} longer than the median of {median:.3g} {unit}."
        always = f"named in {self._named[slowest]} of {self._reports} reports, the last {self._in_a_row} in a row"
        shared = ""
        if self._cp.speeds is not None:
            shared = "; attention is shared out by the ranks' speeds already, so this is what is left"
        return (
            f"Rank {slowest} on {self._hosts[slowest]} computes {measure[slowest]:.3g} {unit}, {over:.0%} over the median of "
            f"{median:.3g} ({always}){shared}."
        )

    def _grown(self, rows: list[list[float]]) -> tuple[str, ...]:
        """Sentences of the counters that have grown since the last report."""
        found = []
        for rank, (before, now) in enumerate(zip(self._counted or rows, rows, strict=True)):
            for place, counter in enumerate(COUNTERS, len(_TIMES)):
                more = now[place] - before[place]
                if more > 0:
                    which = f" (the last: {now[5]:.0f})" if counter == COUNTERS[-1] else ""
                    device = f"rank {rank} on {self._hosts[rank]}, GPU {now[4]:.0f}"
                    found.append(f"{device}: {more:,.0f} more {counter}{which}, {now[place]:,.0f} in all.")
        self._counted = rows
        return tuple(found)


def slowest_rank(measure: Sequence[float | None]) -> tuple[int | None, float | None]:
    """The rank that takes longest, and by which share of the median; None where a rank's time is not known.

    The median is one that a rank has, the lower one of two.
    """
    known = [one for one in measure if one is not None]
    if len(known) < len(measure) or not known:
        return None, None
    slowest, median = max(range(len(known)), key=known.__getitem__), statistics.median_low(known)
    return slowest, known[slowest] / median - 1 if median else 0.0


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
