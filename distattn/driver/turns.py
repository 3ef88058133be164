"""Micro-batches that take turns on a rank: each has a thread for its forward pass, and one thread runs at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from distattn.kernels.devices import has_streams
from distattn.ops.current_micro_batch import INTERLEAVED, InterleavedBatch
from distattn.parallel.runtime.communication.transport import Packet, PendingMessages, Transport
from distattn.parallel.runtime.execution.execute import PausableRun
from distattn.supervision.heartbeats import awaiting_thread

Result = TypeVar("Result")


class Span(NamedTuple):
    """The start and end, in seconds, of a micro-batch's activity: "runs", or "moves" while its messages travel."""

    micro_batch: int
    activity: str
    begin: float
    end: float


class Turns:
    """The order in which micro-batches run on this rank, and a record of it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def run(self, runs: Sequence[PausableRun[Result]]) -> list[Result]:
        """Run one generator per micro-batch to completion; at each pause, the next one continues. Return their results."""
        results: dict[int, Result] = {}
        waiting = deque(enumerate(runs))
        while waiting:
            number, run = waiting.popleft()
            begin = time.perf_counter()
            try:
                next(run)
                waiting.append((number, run))
            except StopIteration as stop:
                results[number] = stop.value
            self.spans.append(Span(number, "runs", begin, time.perf_counter()))
        return [results[number] for number in range(len(runs))]

    def traced(self, transport: Transport, micro_batch: int) -> Transport:
        """Return a transport whose messages are recorded."""
        return _TracedTransport(transport, micro_batch, self.spans)


class Arrived(NamedTuple):
    """The event that a thread is about to call a module that all micro-batches call together."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Returned(NamedTuple):
    """The event that a thread has finished running a module or its forward pass. value: the result."""

    value: Any


class MicroBatchThread:
    """A thread that runs only while another thread waits for it in `resume`.

    work: the forward pass. batch: the micro-batch whose operators run on this thread. The thread has its own random state,
    because random numbers drawn by other micro-batches in between would change what a checkpointed layer draws when it is
    recomputed.
    """

    def __init__(self, work: Callable[[], Any], batch: InterleavedBatch, modes: ThreadModes, random: RandomState):
        self._work, self._batch, self._modes, self._random = work, batch, modes, random
        self._resumed, self._suspended = threading.Semaphore(0), threading.Semaphore(0)
        self._value: Any = None
        self._event: Arrived | Returned | None = None
        self._error: BaseException | None = None
        self._cancelled = self._runs = False
        self._thread = threading.Thread(target=self._main, daemon=True, name="distattn-micro-batch")
        self._thread.start()

    def resume(self, value: Any = None) -> PausableRun[Arrived | Returned]:
        """Resume the thread with a value; pause while messages travel. Return its next event, or raise its error."""
        while True:
            self._value, self._runs = value, True
            self._random.set()
            with awaiting_thread(self._thread.ident or 0):
                self._resumed.release()
                self._suspended.acquire()
            self._runs, self._random = False, self._random.now()
            if self._error is not None:
                raise self._error
            if self._event is not None:
                return self._event
            yield

    def suspend(self, event: Arrived | Returned | None) -> Any:
        """Pause this thread, and continue the one that waits in `resume`. Return the value passed to the next `resume`.

        event: None while messages travel.
        """
        if self._cancelled:
            # a `finally` in the model may call this again while the cancelled thread unwinds
            raise _Cancelled
        self._event = event
        self._suspended.release()
        self._resumed.acquire()
        if self._cancelled:
            raise _Cancelled
        return self._value

    def run(self, paused: PausableRun[Result]) -> Result:
        """Run a generator to completion on this thread, suspending at each of its pauses."""
        while True:
            try:
                next(paused)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            self.suspend(None)

    def cancel(self) -> None:
        """Stop the thread. If it is still running, because an interrupt ended the wait for it, it stops at its next pause."""
        self._cancelled = True
        self._resumed.release()
        if not self._runs:
            self._thread.join()
            # reference cycles would keep the loss and its graph alive until the next garbage collection
            del self._batch, self._work
            self._event = self._value = None

    def _main(self) -> None:
        self._resumed.acquire()
        try:
            if self._cancelled:
                return
            INTERLEAVED.batch = self._batch
            with self._modes.entered():
                self._event = Returned(self._work())
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        self._suspended.release()


class _Cancelled(BaseException):
    """The exception that unwinds a cancelled thread."""


class ThreadModes(NamedTuple):
    """The per-thread modes: a device's current stream, gradient mode and autocast."""

    stream: Any
    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def current(cls, device: torch.device | None) -> ThreadModes:
        """Return the modes of the calling thread. device: the device of the stream; None if it has no streams."""
        kinds = ("cpu", "cuda")
        autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        stream = None if device is None else torch.cuda.current_stream(device)
        return cls(stream, torch.is_grad_enabled(), autocast)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Set these modes on the calling thread while the context is open."""
        with ExitStack() as stack:
            stack.enter_context(torch.cuda.stream(self.stream))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


class RandomState(NamedTuple):
    """The states of PyTorch's random number generators on the host and on a CUDA device (None for other devices)."""

    device: torch.device | None
    host_state: torch.Tensor
    device_state: torch.Tensor | None

    @classmethod
    def current(cls, device: torch.device | None) -> RandomState:
        """Return the current states. device: the device on which layers compute."""
        device = device if device is not None and device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), None if device is None else torch.cuda.get_rng_state(device))

    @classmethod
    def drawn(cls, device: torch.device | None, count: int) -> list[RandomState]:
        """Return new states for `count` micro-batches, seeded by numbers drawn on the host. device: see `current`."""
        device = device if device is not None and device.type == "cuda" else None
        states = []
        for seed in torch.randint(1 << 62, (count,), device="cpu").tolist():
            on_device = None if device is None else torch.Generator(device).manual_seed(seed).get_state()
            states.append(cls(device, torch.Generator().manual_seed(seed).get_state(), on_device))
        return states

    def now(self) -> RandomState:
        """Return the current states of the same generators."""
        return self.current(self.device)

    def set(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.host_state)
        if self.device_state is not None:
            torch.cuda.set_rng_state(self.device_state, self.device)  # type: ignore[arg-type]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Use these states while the context is open; restore the previous ones afterwards."""
        present = self.now()
        self.set()
        try:
            yield
        finally:
            present.set()


def device_of(layers: Sequence[nn.Module]) -> torch.device | None:
    """Return the device on which layers compute if it has streams, otherwise None."""
    devices = (x.device for layer in layers for x in layer.parameters())
    # if parameters are kept on the host (FSDP2's offload), they do not show where their layers compute
    device = next((device for device in devices if has_streams(device)), None)
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


class _TracedTransport:
    """A transport that records when its messages are sent and when they are known to have arrived."""

    def __init__(self, transport: Transport, micro_batch: int, spans: list[Span]):
        self.transport, self.micro_batch, self.spans = transport, micro_batch, spans

    def exchange(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> PendingMessages:
        begin = time.perf_counter()
        messages = self.transport.exchange(sends, receives, collective, where)
        return _TracedMessages(messages, self, begin) if sends or receives else messages


class _TracedMessages(NamedTuple):
    messages: PendingMessages
    traced: _TracedTransport
    begin: float

    def wait(self) -> None:
        """Wait for the messages, and record their span."""
        self.messages.wait()
        self.traced.spans.append(Span(self.traced.micro_batch, "moves", self.begin, time.perf_counter()))
