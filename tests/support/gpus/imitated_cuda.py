"""Imitates CUDA's streams and events without a GPU: the device is "meta", nothing is computed, and clocks check the
order.

`imitated_cuda` replaces the functions of torch.cuda that distattn calls. It watches every operator in every thread
started while it is active, and records Triton's launches instead of compiling them. Communicators queue messages as
NCCL does: behind the work on the current stream, and on their own stream, which the current stream waits for at `wait`.

There are two devices. All tensors are on device TENSORS_ON, none on device 0. Each thread has its own current device,
initially device 0. Launching a kernel on the device without tensors, or asking for its current stream, is a violation.
PyTorch's own operators and NCCL's calls switch to their tensors' device by themselves.

A number read from the device is 1, and a tensor copied from it is all zeros. The host waits for both, and for copies to
the device unless they are non_blocking.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

# dispatch modes import torch._dynamo at the first operator, so import it once before ranks are forked
import torch._dynamo
from stream_clocks import Clock, StreamClocks, Timeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distattn.kernels import devices
from distattn.kernels.registry import KERNELS
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.triton import attention as triton_attention

# these names make this module a kernel, registered as KERNEL: Triton's kernel with recorded launches
from distattn.kernels.triton.attention import ACCUMULATES, DIFFERENTIABLE_LSE, backward, forward, prepare
from distattn.kernels.triton.launch import TritonLaunch
from distattn.memory import pinned_memory
from distattn.ops.planned_op import IMPLEMENTATIONS
from distattn.parallel.runtime.communication import communicator

__all__ = ["ACCUMULATES", "DEVICE", "DIFFERENTIABLE_LSE", "KERNEL", "StreamNccl", "backward", "forward", "prepare"]

DEVICE = torch.device("meta")
# the index of the device that holds all tensors
TENSORS_ON = 1
KERNEL = "recorded"
# the arguments that each Triton kernel writes; it only reads the others
_WRITTEN = {
    "forward_kernel": ("o_", "lse_"),
    "row_numbers_kernel": ("numbers_",),
    "dkdv_kernel": ("dk_", "dv_", "parts_"),
    "dq_kernel": ("dq_",),
    "sum_parts_kernel": ("dk_", "dv_"),
}
_ALLOCATE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
# run the code of these operators, because for meta tensors PyTorch would only compute shapes
_PASSES = ("distattn::forward", "distattn::backward")


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return None, because a kernel whose launches are only recorded supports every call."""
    return None


@contextmanager
def imitated_cuda(current: int = TENSORS_ON) -> Iterator[Cuda]:
    """Make "meta" a device with streams. Watch this thread and the threads it starts.

    current: the index of this thread's current device, which a program sets at its start.
    """
    cuda = Cuda(current)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_KINDS", {"cuda", DEVICE.type})
        stands_for = {
            "Stream": partial(Stream, cuda),
            "Event": partial(Event, cuda),
            "current_stream": cuda.current_stream,
            "default_stream": lambda device=None: cuda.default,
            "stream": cuda.stream,
            "device": cuda.device,
            "set_device": cuda.set_device,
            "current_device": lambda: cuda.current,
            "is_available": lambda: True,
        }
        for name, stand_in in stands_for.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(pinned_memory, "pinned_bytes", lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
        patch.setattr(Tensor, "record_stream", lambda x, stream: cuda.clocks.record(x, stream.timeline))
        is_enabled = torch.is_autocast_enabled
        patch.setattr(torch, "is_autocast_enabled", lambda kind: is_enabled("cuda" if kind == DEVICE.type else kind))
        kind_of = communicator.backend_name
        patch.setattr(
            communicator, "backend_name", lambda group, device: "nccl" if device == DEVICE else kind_of(group, device)
        )
        patch.setitem(communicator._SENDS_FROM, DEVICE.type, "nccl")
        patch.setitem(communicator._OPEN, "nccl", lambda *arguments: StreamNccl(cuda))
        patch.setitem(KERNELS, KERNEL, __name__)
        patch.setattr(triton_attention, "run_launch", partial(_record_launch, cuda))
        _follow_hosts(patch, cuda)
        with _Watch(cuda):
            yield cuda


class Cuda:
    """The default stream of the device that holds the tensors, and each thread's current device and stream.

    devices_set: how often threads have set their current device.
    """

    def __init__(self, current: int = TENSORS_ON) -> None:
        self.clocks = StreamClocks()
        self.default = Stream(self, name="the default stream")
        self._per_thread = threading.local()
        self._per_thread.device = current
        self.devices_set = 0

    @property
    def current(self) -> int:
        """The index of this thread's current device."""
        return getattr(self._per_thread, "device", 0)

    def set_device(self, device: Any) -> None:
        self.devices_set += 1
        number = torch.device(device).index
        # "meta" devices have no index
        self._per_thread.device = TENSORS_ON if number is None else number

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """Make a different device current for this thread."""
        before = self.current
        self.set_device(device)
        try:
            yield
        finally:
            self._per_thread.device = before

    def check_device(self, action: str) -> None:
        """Record a violation if this thread's current device is not the device that holds the tensors."""
        if self.current != TENSORS_ON:
            self.clocks.violation(f"{action} on device {self.current}, where no tensor is ({self.clocks.host().name})")

    def current_stream(self, device: Any = None) -> Stream:
        """Return this thread's current stream, which is the default stream in a new thread. device: by default the
        current device.
        """
        if device is None:
            self.check_device("the current stream is asked for")
        return getattr(self._per_thread, "current", self.default)

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        """Make a stream and its device current in this thread inside the `with` block. Do nothing if `stream` is None."""
        before, device_before = self.current_stream(DEVICE), self.current
        if stream is not None:
            self._per_thread.current, self._per_thread.device = stream, TENSORS_ON
        try:
            yield
        finally:
            self._per_thread.current, self._per_thread.device = before, device_before

    def wait_on_host(self, clock: Clock) -> None:
        """Make this host thread wait for all work that `clock` has seen."""
        self.clocks.join(self.clocks.host(), clock)


class Stream:
    """A stand-in for torch.cuda.Stream."""

    def __init__(self, cuda: Cuda, name: str = "a side stream"):
        self.cuda, self.timeline = cuda, cuda.clocks.new_stream(name)

    def record_event(self) -> Event:
        event = Event(self.cuda)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Make the stream wait for an event. As in CUDA, waiting for an event that was never recorded does nothing."""
        waiting = self.cuda.clocks.host()
        if not waiting.knows(event.host, event.tick):
            self.cuda.clocks.violation(
                f"{waiting.name} waits for an event that {event.host.name} may not have recorded yet"
            )
        self.cuda.clocks.join(self.timeline, event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """A stand-in for torch.cuda.Event. Every query reports that the work is done."""

    def __init__(self, cuda: Cuda, enable_timing: bool = False):
        self.cuda = cuda
        self.clock: Clock = {}
        # the host thread that recorded the event, and the thread's tick at that time
        self.host, self.tick = cuda.clocks.host(), 0

    def record(self, stream: Stream | None = None) -> None:
        self.host = self.cuda.clocks.host()
        self.tick = self.host.advance()
        self.clock = self.cuda.clocks.snapshot((stream or self.cuda.current_stream()).timeline)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.cuda.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self.cuda.wait_on_host(self.clock)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class _Watch(TorchDispatchMode):
    """A dispatch mode that reports every operator of its thread to the clocks."""

    def __init__(self, cuda: Cuda):
        super().__init__()
        self.cuda, self.clocks = cuda, cuda.clocks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        kwargs = dict(kwargs or {})
        if func.name() in _PASSES:
            with _Watch(self.cuda):
                return IMPLEMENTATIONS[func.name()](*args, **kwargs)
        # drop pin_memory, since this machine cannot pin memory
        pins = bool(kwargs.pop("pin_memory", False))
        name = func.overloadpacket.__name__
        tensors, written = _tensors((args, kwargs)), _written(func, args, kwargs)
        to_host = any(x.device == DEVICE for x in tensors) and self._comes_to_host(name, written, kwargs)
        if to_host:
            out = self._of_device(name, tensors[-1], args, kwargs)
        else:
            out = func(*args, **kwargs)
        storages = {x.untyped_storage()._cdata for x in tensors}
        new = [x for x in _tensors(out) if x.untyped_storage()._cdata not in storages]
        stream = self.cuda.current_stream(DEVICE).timeline
        is_queued = any(x.device == DEVICE for x in (*tensors, *new))
        for x in (*tensors, *new):
            if x.device == DEVICE or (pins and x in new):
                self.clocks.allocated(x, stream if x.device == DEVICE else self.clocks.host())
        if name in _ALLOCATE or not (new or written or to_host):
            # views access no data
            return out
        reads = [x for x in tensors if all(x is not other for other in written)]
        if not is_queued:
            self.clocks.on_host(name, reads, [*written, *new])
            return out
        self.clocks.queue(stream, name, reads, [*written, *new])
        from_host = name in ("_to_copy", "copy_") and any(x.device != DEVICE for x in tensors)
        blocks = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        # the host does not wait for a non-blocking copy from the device into pinned memory. It waits for all other
        # copies to the host
        leaves = name == "copy_" and to_host and not blocks and self.clocks.knows(written[0])
        if (to_host and not leaves) or (from_host and blocks):
            self.cuda.wait_on_host(self.clocks.snapshot(stream))
        return out

    @staticmethod
    def _comes_to_host(name: str, written: Sequence[Tensor], kwargs: dict[str, Any]) -> bool:
        if name == "copy_":
            return written[0].device != DEVICE
        return name in ("_local_scalar_dense", "equal") or torch.device(kwargs.get("device") or DEVICE) != DEVICE

    @staticmethod
    def _of_device(name: str, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "copy_":
            return args[0]
        if name == "equal":
            return True
        if name == "_local_scalar_dense":
            return torch.ones((), dtype=x.dtype).item()
        assert name == "_to_copy", f"{name} makes host tensors of tensors on the device"
        return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator writes according to its schema."""
    changed = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += _tensors(args[number] if number < len(args) else kwargs.get(argument.name))
    return changed


def _record_launch(cuda: Cuda, launch: TritonLaunch) -> None:
    if not launch.grid[0]:
        return
    name = launch.kernel.fn.__name__
    cuda.check_device(f"{name} is launched")
    # a tensor descriptor holds its tensor in `base`
    tensors = {argument: getattr(x, "base", x) for argument, x in launch.arguments.items()}
    tensors = {argument: x for argument, x in tensors.items() if isinstance(x, Tensor)}
    written = [tensors[argument] for argument in _WRITTEN[name]]
    reads = [x for argument, x in tensors.items() if argument not in _WRITTEN[name]]
    cuda.clocks.queue(cuda.current_stream(DEVICE).timeline, name, reads, written)


class StreamNccl:
    """One rank's side of a communicator, with the methods of ProcessGroupNCCL that distattn calls. Nothing is sent."""

    supports_coalescing = True

    def __init__(self, cuda: Cuda):
        self._cuda = cuda
        self._timeline = cuda.clocks.new_stream("a communicator's stream")
        # a timeline for each message of a call, because the messages of one call travel concurrently
        self._lanes: list[Timeline] = []
        self._used: list[Tensor] = []

    def allreduce(self, tensors: list[Tensor]) -> _Work:
        self._start_coalescing()
        self._add("all_reduce", tensors, tensors)
        return self._end_coalescing()

    def _start_coalescing(self) -> None:
        self._used = []

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        self._add(f"send to rank {peer}", tensors, [])

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        self._add(f"receive from rank {peer}", [], tensors)

    def _add(self, label: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        clocks = self._cuda.clocks
        assert all(x.device == DEVICE and x.is_contiguous() for x in (*reads, *writes))
        number = len(self._used)
        if number == len(self._lanes):
            self._lanes.append(clocks.new_stream(f"message {number} of a communicator's stream"))
        lane = self._lanes[number]
        self._used += writes or reads
        clocks.join(lane, clocks.snapshot(self._timeline))
        clocks.join(lane, clocks.snapshot(self._cuda.current_stream(DEVICE).timeline))
        clocks.queue(lane, label, reads, writes)

    def _end_coalescing(self) -> _Work:
        clocks = self._cuda.clocks
        for lane in self._lanes[: len(self._used)]:
            clocks.join(self._timeline, clocks.snapshot(lane))
        used, self._used = self._used, []
        return _Work(self._cuda, clocks.snapshot(self._timeline), used)

    def shutdown(self) -> None:
        """Return immediately, because in these tests all messages have been waited for."""

    def abort(self) -> None:
        """Return immediately, because no message is in flight."""


class _Work:
    """The work object that a communicator's call returns. Like NCCL's, it keeps its tensors until `wait`."""

    def __init__(self, cuda: Cuda, clock: Clock, tensors: list[Tensor]):
        self.cuda, self.clock, self._tensors = cuda, clock, tensors

    def wait(self) -> None:
        self.cuda.clocks.join(self.cuda.current_stream(DEVICE).timeline, self.clock)
        self._tensors = []

    def is_completed(self) -> bool:
        return True


def _follow_hosts(patch: pytest.MonkeyPatch, cuda: Cuda) -> None:
    """Pass clocks between host threads whenever a thread starts, ends or notifies another."""
    clocks = cuda.clocks

    def start(thread: threading.Thread, original: Callable[..., None] = threading.Thread.start) -> None:
        clock, run = clocks.snapshot(clocks.host()), thread.run

        def watched() -> None:
            clocks.host().name = f"thread {thread.name}"
            cuda.wait_on_host(clock)
            with _Watch(cuda):
                run()
            thread.known = clocks.snapshot(clocks.host())

        thread.run = watched
        original(thread)

    def join(thread: threading.Thread, timeout: float | None = None, original: Any = threading.Thread.join) -> None:
        original(thread, timeout)
        cuda.wait_on_host(getattr(thread, "known", {}))

    # futures, events and queues all contain a condition
    def told(condition: Any) -> None:
        cuda.wait_on_host(getattr(condition, "known", {}))

    def tell(condition: Any) -> None:
        condition.known = clocks.snapshot(clocks.host())

    def enter(condition: Any, original: Any = threading.Condition.__enter__) -> Any:
        out = original(condition)
        told(condition)
        return out

    def leave(condition: Any, *error: Any, original: Any = threading.Condition.__exit__) -> Any:
        tell(condition)
        return original(condition, *error)

    def wait(condition: Any, timeout: float | None = None, original: Any = threading.Condition.wait) -> bool:
        tell(condition)
        out = original(condition, timeout)
        told(condition)
        return out

    class SimpleQueue(queue.SimpleQueue):
        def put(self, item: Any, *rest: Any, **how: Any) -> None:
            super().put((clocks.snapshot(clocks.host()), item), *rest, **how)

        def get(self, *rest: Any, **how: Any) -> Any:
            clock, item = super().get(*rest, **how)
            cuda.wait_on_host(clock)
            return item

    patch.setattr(threading.Thread, "start", start)
    patch.setattr(threading.Thread, "join", join)
    for name, stand_in in (("__enter__", enter), ("__exit__", leave), ("wait", wait)):
        patch.setattr(threading.Condition, name, stand_in)
    patch.setattr(queue, "SimpleQueue", SimpleQueue)
