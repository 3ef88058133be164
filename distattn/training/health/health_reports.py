"""Regular reports of slow ranks and of GPUs with errors, mostly from numbers that the ranks measure anyway.

On CPUs, a rank's compute time is the step time minus the waits for other ranks and for data. On GPUs, the host does not
know how long its device waits for others, so once per report each rank's GPU computes the same matrix product, without
communication.
"""

from __future__ import annotations

import math
import socket
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.driver.context_parallel import ContextParallel
from distattn.driver.message_monitor import MessageMonitor
from distattn.parallel.runtime.communication.communicator import sendable_device
from distattn.training.health.device_counters import COUNTERS, DeviceCounters
from distattn.training.reporting.step_clock import StepClock, StepCosts

# a rank is slow if its time exceeds the median by at least this share of the median
SLOW_SHARE = 0.1
# the console shows a slow rank after this many consecutive reports have named it
_REPORTS_IN_A_ROW = 3
_HOST_BYTES = 64
# the values that each rank sends before its counters
_TIMES = ("seconds", "data_seconds", "wait_seconds", "probe_seconds", "device", "last_xid")
_UNKNOWN = math.nan
# rows and columns of the probe's square matrices, and number of products: 2.7 TFLOP in total
_PROBE_SIZE, _PROBE_PRODUCTS = 2048, 160


@dataclass(frozen=True)
class HealthReport:
    """A report on all ranks over the steps since the last report. Times: mean seconds per step, by rank; None if unknown.

    compute_seconds: step time without waits. probe_seconds: time of a fixed matrix product (see `probe_device`). slowest: the
    rank with the longest compute_seconds or, on GPUs, probe_seconds. over_median: its excess over the median, as a share of the
    median. slow: True if the excess is at least SLOW_SHARE. reports_in_a_row: number of consecutive reports, including this
    report, in which this rank is slow. errors: a sentence for each GPU counter that increased. counters: each rank's counters, in
    the order of `COUNTERS`. state_checks: state digests compared so far in this process. damaged: a sentence for each damaged
    state found since the last report. text: the complete report in sentences.
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
        """True if the user should know: a counter increased, or a rank has now been slow in several reports in a row."""
        return bool(self.errors) or (self.slow and self.reports_in_a_row == _REPORTS_IN_A_ROW)


class HealthReports:
    """Measures a training loop's steps on every rank of the default group. The constructor and `after_step` are collective calls.

    every: steps between reports; 0 for no reports. publish: called with each report, on all ranks. counters: counters of
    this rank's GPU, by default from NVML. Until `close`, this thread's waits for collectives of torch.distributed are
    counted.
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
        self._times = [0.0, 0.0, 0.0]
        self._steps, self._reports, self._in_a_row = 0, 0, 0
        self._named: Counter[int] = Counter()
        self._last: int | None = None
        self._counted: list[list[float]] | None = None
        self._hosts: tuple[str, ...] = ()
        # number of state digests compared, set by the training loop
        self.state_checks = 0
        self._damaged: tuple[str, ...] = ()
        if every:
            self._hosts = self._host_names()
            self._counted = self._gather([_UNKNOWN] * len(_TIMES) + self._counters.read())

    def clock(self) -> StepClock:
        """Return a step clock whose wait_seconds include all counted waits."""
        return StepClock(self._device, self._waits)

    def wait(self, work: Callable[[], Any]) -> Any:
        """Run `work`, count its time as waiting, and return its result.

        Use it for calls whose waits happen inside PyTorch, such as clipping DTensors.
        """
        return self._waits.timed(work)

    def after_step(self, step: int, costs: StepCosts) -> None:
        """Add the costs of a step (counted from 1). If a report is due, gather and publish all ranks' measurements."""
        if not self._every:
            return
        waited = _UNKNOWN if costs.wait_seconds is None else costs.wait_seconds
        self._times = [
            before + now for before, now in zip(self._times, (costs.seconds, costs.data_seconds, waited), strict=True)
        ]
        self._steps += 1
        if step % self._every == 0:
            self._report_now(step)

    def report_damage(self, step: int, text: str) -> None:
        """Report a damaged state immediately. A collective call. text: a sentence."""
        self._damaged += (text,)
        if self._every and self._steps:
            self._report_now(step)

    def _report_now(self, step: int) -> None:
        times = [seconds / self._steps for seconds in self._times]
        counters = self._counters.read()
        local = [*times, probe_device(self._device), float(self._counters.index), float(self._counters.last_xid)]
        rows = self._gather(local + counters)
        self._publish(self._report(step, rows))
        self._times, self._steps, self._damaged = [0.0, 0.0, 0.0], 0, ()

    def close(self) -> None:
        """Stop counting waits, and shut NVML down."""
        self._stop_counting()
        self._counters.close()

    def _gather(self, row: list[float]) -> list[list[float]]:
        """Return every rank's values, in rank order. All ranks must pass the same number of values."""
        local = torch.tensor(row, dtype=torch.float64)
        return [remote.tolist() for remote in self._all_gather(local)]

    def _host_names(self) -> tuple[str, ...]:
        name = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
        names = self._all_gather(torch.frombuffer(bytearray(name), dtype=torch.uint8))
        return tuple(host.numpy().tobytes().rstrip(b"\0").decode("utf-8", "replace") for host in names)

    def _all_gather(self, local: Tensor) -> list[Tensor]:
        group = dist.group.WORLD if dist.is_initialized() else None
        if group is None:
            return [local]
        local, label = local.to(sendable_device(group)), "a report of health"
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        self._cp.begin(label)
        limit = self._cp.wait_timeout
        work = dist.all_gather(gathered, local, async_op=True)
        assert work is not None
        self._cp.guarded(lambda: work.wait() if limit is None else work.wait(limit), label)
        return [remote.cpu() for remote in gathered]

    def _report(self, step: int, rows: list[list[float]]) -> HealthReport:
        by_time = {name: [_known(row[place]) for row in rows] for place, name in enumerate(_TIMES)}
        compute = [_known(max(seconds - data - waited, 0.0)) for seconds, data, waited, *_ in rows]
        times = compute if None not in compute else by_time["probe_seconds"]
        slowest, excess = slowest_rank(times)
        slow = excess is not None and excess >= SLOW_SHARE
        self._reports += 1
        self._in_a_row = (self._in_a_row if slowest == self._last else 0) + 1 if slow else 0
        self._last = slowest if slow else None
        if slow and slowest is not None:
            self._named[slowest] += 1
        errors = self._grown(rows)
        text = self._sentence(slowest, excess, times, times is compute) if slowest is not None else ""
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
            excess,
            slow,
            self._in_a_row,
            errors,
            tuple(tuple(_known(value) for value in row[len(_TIMES) :]) for row in rows),
            " ".join([text, *errors, *self._damaged]).strip() or "Neither compute times nor counters are known.",
            self.state_checks,
            self._damaged,
        )

    def _sentence(self, slowest: int, excess: float | None, times: Sequence[float | None], of_steps: bool) -> str:
        assert excess is not None
        median = statistics.median_low([seconds for seconds in times if seconds is not None])
        unit = "s a step" if of_steps else "s for the same matrix product"
        if not self._in_a_row:
            return f"No rank computes {SLOW_SHARE:.0%} longer than the median of {median:.3g} {unit}."
        history = f"named in {self._named[slowest]} of {self._reports} reports, the last {self._in_a_row} in a row"
        balanced = ""
        if self._cp.speeds is not None:
            balanced = "; attention is already balanced by the ranks' speeds, so this is the remaining difference"
        return (
            f"Rank {slowest} on {self._hosts[slowest]} computes {times[slowest]:.3g} {unit}, {excess:.0%} over the median of "
            f"{median:.3g} ({history}){balanced}."
        )

    def _grown(self, rows: list[list[float]]) -> tuple[str, ...]:
        """Return a sentence for each counter that increased since the last report."""
        sentences = []
        for rank, (before, now) in enumerate(zip(self._counted or rows, rows, strict=True)):
            for column, counter in enumerate(COUNTERS, len(_TIMES)):
                increase = now[column] - before[column]
                if increase > 0:
                    code = f" (the last: {now[5]:.0f})" if counter == COUNTERS[-1] else ""
                    device = f"rank {rank} on {self._hosts[rank]}, GPU {now[4]:.0f}"
                    sentences.append(f"{device}: {increase:,.0f} more {counter}{code}, {now[column]:,.0f} in all.")
        self._counted = rows
        return tuple(sentences)


def probe_device(device: torch.device) -> float:
    """Return the seconds that a series of matrix products takes on a GPU, or NaN on a CPU or if memory is short.

    The products are timed by the device's clock, are the same on all ranks, need no communication, and use 25 MB of device
    memory. Waits until the device has finished all earlier work.
    """
    if device.type != "cuda":
        return math.nan
    # use random data, since zeros would draw less power than real data, and a separate generator, which leaves training's
    # random state unchanged
    random = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        a, b = (torch.randn(_PROBE_SIZE, _PROBE_SIZE, generator=random, **options) for _ in range(2))
        out = torch.empty_like(a)
        # warm up: the first product selects and loads a kernel
        torch.mm(a, b, out=out)
        begin.record()
        for _ in range(_PROBE_PRODUCTS):
            torch.mm(a, b, out=out)
        end.record()
        end.synchronize()
    except torch.OutOfMemoryError:
        # a missing measurement must not end a run
        return math.nan
    return begin.elapsed_time(end) / 1e3


def count_waits(waits: MessageMonitor) -> Callable[[], None]:
    """Add the time that this thread spends in torch.distributed's `Work.wait` to a monitor. Returns a function that undoes this.

    PyTorch has no hook for this, so `Work.wait` is replaced until that function is called. With gloo the host waits
    there; with NCCL only the device's stream does. Waits inside C++ code, such as those of functional collectives, are
    not counted.
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


def slowest_rank(times: Sequence[float | None]) -> tuple[int | None, float | None]:
    """Return the slowest rank and its excess as a share of the median; (None, None) if any rank's time is unknown.

    With an even number of ranks, the median is the lower of the two middle values, so it is always the time of a rank.
    """
    known_times = [seconds for seconds in times if seconds is not None]
    if len(known_times) < len(times) or not known_times:
        return None, None
    slowest, median = max(range(len(known_times)), key=known_times.__getitem__), statistics.median_low(known_times)
    return slowest, known_times[slowest] / median - 1 if median else 0.0


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number
