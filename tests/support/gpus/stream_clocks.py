"""Vector clocks of streams and host threads, to check that every tensor access comes after the accesses it depends on.

They follow Lamport 1978 and Mattern 1989, as race detectors do (FastTrack, Flanagan and Freund 2009). A clock says, for
each timeline, how many of its accesses are known to be done. Work on a stream comes after everything that its host
thread knew to be done when it queued the work, and after everything that the stream has waited for. A read must come
after all earlier writes of the same memory, a write after all earlier accesses. Freed memory returns to the stream that
allocated it. That stream must know that other streams' accesses are done, unless `record_stream` registered those
streams with the allocator.

Two threads that queue work on one stream, or wait for each other's events, must also be ordered. Otherwise their order
is left to chance. `imitated_cuda` tracks the operations that order host threads.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

# maps the number of a timeline to the count of its accesses known to be done
Clock = dict[int, int]


class Timeline:
    """A stream or a host thread, whose accesses happen in order."""

    def __init__(self, number: int, name: str, is_host: bool = False):
        self.number, self.name, self.is_host = number, name, is_host
        self.clock: Clock = {}

    def knows(self, other: Timeline, tick: int) -> bool:
        """Return whether this timeline knows that another timeline has reached a tick."""
        return self.clock.get(other.number, 0) >= tick

    def advance(self) -> int:
        """Count one more access. Return its tick."""
        tick = self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return tick


class _Access(NamedTuple):
    """An operator's access to bytes [begin, end) of a storage."""

    begin: int
    end: int
    by: Timeline
    tick: int
    writes: bool
    action: str
    # the host thread that queued the access, and its tick at that time
    host: Timeline
    host_tick: int

    def where(self) -> str:
        return self.host.name if self.by.is_host else f"{self.by.name} ({self.host.name})"


class _Storage:
    """A storage: the stream that allocated it, the streams registered by `record_stream`, and the accesses that still
    matter.
    """

    def __init__(self, stream: Timeline, shape: str):
        self.stream, self.shape = stream, shape
        self.recorded: set[int] = set()
        self.accesses: list[_Access] = []

    def add(self, access: _Access) -> None:
        # drop older accesses within this access's bytes that are ordered before it: whatever comes after this
        # access also comes after them. A read does not replace a write
        self.accesses = [
            old
            for old in self.accesses
            if old.begin < access.begin
            or access.end < old.end
            or not access.by.knows(old.by, old.tick)
            or (old.writes and not access.writes)
        ]
        self.accesses.append(access)


class StreamClocks:
    """The clocks of a process.

    violations: one sentence per violation. counts: the numbers of accesses checked, so that a test can assert that
    any were checked.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._numbers = 0
        self._per_thread = threading.local()
        self._storages: dict[int, _Storage] = {}
        self.streams: list[Timeline] = []
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()

    def new_stream(self, name: str) -> Timeline:
        """Create a stream, whose work runs in the order in which it is queued."""
        with self._lock:
            self._numbers += 1
            stream = Timeline(self._numbers, name)
            self.streams.append(stream)
            return stream

    def host(self) -> Timeline:
        """Return the timeline of this host thread."""
        if not hasattr(self._per_thread, "timeline"):
            with self._lock:
                self._numbers += 1
                # a thread that is just starting cannot be asked for its name yet
                self._per_thread.timeline = Timeline(self._numbers, "the main thread", is_host=True)
        timeline: Timeline = self._per_thread.timeline
        return timeline

    def snapshot(self, timeline: Timeline) -> Clock:
        """Return a clock that knows of everything on a timeline so far."""
        with self._lock:
            return dict(timeline.clock)

    def join(self, timeline: Timeline, clock: Clock) -> None:
        """Order a timeline's later work after everything that `clock` knows."""
        with self._lock:
            _join(timeline.clock, clock)

    def queue(self, stream: Timeline, action: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Note that this thread queues an operator on a stream.

        Host tensors are ignored unless they are tracked, that is, in pinned memory.
        """
        with self._lock:
            _join(stream.clock, self.host().clock)
            self._access(stream, action, reads, writes)

    def on_host(self, action: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Note that this thread runs an operator on host tensors."""
        with self._lock:
            self._access(self.host(), action, reads, writes)

    def allocated(self, tensor: Tensor, stream: Timeline) -> None:
        """Note that a tensor is allocated on a stream, unless its storage is already known."""
        storage = tensor.untyped_storage()
        with self._lock:
            if storage._cdata in self._storages:
                return
            self._storages[storage._cdata] = _Storage(stream, f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}")
        weakref.finalize(storage, self._freed, storage._cdata).atexit = False

    def knows(self, tensor: Tensor) -> bool:
        """Return whether accesses to a tensor are tracked. Host tensors are tracked only in pinned memory."""
        with self._lock:
            return tensor.untyped_storage()._cdata in self._storages

    def record(self, tensor: Tensor, stream: Timeline) -> None:
        """Register a stream that uses a tensor, like the allocator's `record_stream`."""
        with self._lock:
            storage = self._storages.get(tensor.untyped_storage()._cdata)
            if storage is not None:
                storage.recorded.add(stream.number)

    def _access(self, by: Timeline, action: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        tick, host = by.advance(), self.host()
        host_tick = tick if by is host else host.advance()
        for tensors, is_write in ((reads, False), (writes, True)):
            for tensor in tensors:
                if not tensor.numel():
                    continue
                storage = self._storages.get(tensor.untyped_storage()._cdata)
                if storage is None:
                    continue
                described = f"{action} {tuple(tensor.shape)}"
                access = _Access(*_extent(tensor), by, tick, is_write, described, host, host_tick)
                self._check(access, storage)
                storage.add(access)

    def _check(self, access: _Access, storage: _Storage) -> None:
        for old in storage.accesses:
            if old.end <= access.begin or access.end <= old.begin or not (old.writes or access.writes):
                continue
            if old.by is not access.by:
                self.counts["accesses after another stream's"] += 1
            does, did = ("writes" if access_.writes else "reads" for access_ in (access, old))
            accesses = f"{access.action} {does} on {access.where()} what {old.action} {did} on {old.where()}"
            if not access.by.knows(old.by, old.tick):
                self.violation(f"{accesses}, without waiting for it")
            elif old.by is access.by and not access.host.knows(old.host, old.host_tick):
                self.violation(f"{accesses}, and the threads have no order")

    def _freed(self, key: int) -> None:
        with self._lock:
            storage = self._storages.pop(key)
            if storage.stream.is_host:
                # the allocator of pinned memory tracks copies in flight itself
                return
            freer = Timeline(storage.stream.number, storage.stream.name)
            _join(freer.clock, storage.stream.clock)
            _join(freer.clock, self.host().clock)
            others = [old for old in storage.accesses if old.by is not storage.stream]
            self.counts["freed after another stream's use"] += bool(others)
            for old in others:
                if old.by.number not in storage.recorded and not freer.knows(old.by, old.tick):
                    self.violation(
                        f"memory {storage.shape} of {storage.stream.name} is freed while {old.action} may still use it on "
                        f"{old.where()}, without record_stream"
                    )

    def violation(self, text: str) -> None:
        """Record a violation, unless the same sentence is already recorded."""
        if text not in self.violations:
            self.violations.append(text)


def _join(clock: Clock, other: Clock) -> None:
    for number, tick in other.items():
        if tick > clock.get(number, 0):
            clock[number] = tick


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a view in its storage, and the end of its last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.storage_offset()
    return begin * tensor.element_size(), (begin + last + 1) * tensor.element_size()
