"""Vector clocks of streams and host threads: every access to a tensor must come after the accesses that it depends on.

Lamport 1978 and Mattern 1989, as race detectors use them (FastTrack, Flanagan and Freund 2009). A clock says of each timeline how
much of it is known to be done. Work on a stream comes after what its thread's host had seen done when it was queued, and after
all that the stream has waited for. A read must come after all earlier writes of the same memory, a write after all earlier
accesses. Memory that is freed goes back to the stream that allocated it: what other streams do with it must be done by then, as
far as that stream can know, unless the allocator was told of them (`record_stream`).

Two threads that queue on one stream, or wait for each other's events, must have an order, too: that of their calls is chance.
What orders threads of the host is followed in `imitated_cuda`.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

# of each timeline, by number: how many of its accesses are known to be done
Clock = dict[int, int]


class Timeline:
    """A stream or a host thread: what happens on it is in order."""

    def __init__(self, number: int, name: str, is_host: bool = False):
        self.number, self.name, self.is_host = number, name, is_host
        self.clock: Clock = {}

    def knows(self, other: Timeline, tick: int) -> bool:
        """Whether another timeline has come so far, as far as this one can know."""
        return self.clock.get(other.number, 0) >= tick

    def advance(self) -> int:
        """The number of one more access."""
        tick = self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return tick


class _Access(NamedTuple):
    """An operator's access to elements [begin, end) of a storage, in bytes."""

    begin: int
    end: int
    by: Timeline
    tick: int
    writes: bool
    what: str
    # who queued it, and when
    host: Timeline
    host_tick: int

    def where(self) -> str:
        return self.host.name if self.by.is_host else f"{self.by.name} ({self.host.name})"


class _Storage:
    """What is known of a storage: where it was allocated, streams that the allocator was told of, accesses that still matter."""

    def __init__(self, stream: Timeline, shape: str):
        self.stream, self.shape = stream, shape
        self.recorded: set[int] = set()
        self.accesses: list[_Access] = []

    def add(self, access: _Access) -> None:
        # whoever comes after this access comes after those that it comes after; a read does not stand for a write
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
    """The clocks of a process. violations: what was found, in words; counts: what was looked at, so that tests can tell."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._numbers = 0
        self._per_thread = threading.local()
        self._storages: dict[int, _Storage] = {}
        self.streams: list[Timeline] = []
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()

    def new_stream(self, name: str) -> Timeline:
        """A stream; what is queued on it later comes after what is queued on it now."""
        with self._lock:
            self._numbers += 1
            stream = Timeline(self._numbers, name)
            self.streams.append(stream)
            return stream

    def host(self) -> Timeline:
        """The timeline of this thread of the host."""
        if not hasattr(self._per_thread, "timeline"):
            with self._lock:
                self._numbers += 1
                # a thread that is just starting cannot be asked for its name yet
                self._per_thread.timeline = Timeline(self._numbers, "the main thread", is_host=True)
        found: Timeline = self._per_thread.timeline
        return found

    def snapshot(self, timeline: Timeline) -> Clock:
        """What is done once all that is on a timeline now is done."""
        with self._lock:
            return dict(timeline.clock)

    def join(self, timeline: Timeline, clock: Clock) -> None:
        """What is on a timeline later comes after all that a clock knows of."""
        with self._lock:
            _join(timeline.clock, clock)

    def queue(self, stream: Timeline, what: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """An operator is queued on a stream by this thread. Of host tensors only the tracked ones count: pinned memory."""
        with self._lock:
            _join(stream.clock, self.host().clock)
            self._access(stream, what, reads, writes)

    def on_host(self, what: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """An operator on host tensors is done now, by this thread."""
        with self._lock:
            self._access(self.host(), what, reads, writes)

    def allocated(self, tensor: Tensor, stream: Timeline) -> None:
        """A tensor is allocated on a stream, unless its storage is known."""
        storage = tensor.untyped_storage()
        with self._lock:
            if storage._cdata in self._storages:
                return
            self._storages[storage._cdata] = _Storage(stream, f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}")
        weakref.finalize(storage, self._freed, storage._cdata).atexit = False

    def knows(self, tensor: Tensor) -> bool:
        """Whether accesses to a tensor are watched: of host tensors those to pinned memory."""
        with self._lock:
            return tensor.untyped_storage()._cdata in self._storages

    def record(self, tensor: Tensor, stream: Timeline) -> None:
        """The allocator is told that a stream uses a tensor."""
        with self._lock:
            found = self._storages.get(tensor.untyped_storage()._cdata)
            if found is not None:
                found.recorded.add(stream.number)

    def _access(self, by: Timeline, what: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        tick, host = by.advance(), self.host()
        host_tick = tick if by is host else host.advance()
        for tensors, is_write in ((reads, False), (writes, True)):
            for tensor in tensors:
                if not tensor.numel():
                    continue
                storage = self._storages.get(tensor.untyped_storage()._cdata)
                if storage is None:
                    continue
                described = f"{what} {tuple(tensor.shape)}"
                access = _Access(*_extent(tensor), by, tick, is_write, described, host, host_tick)
                self._check(access, storage)
                storage.add(access)

    def _check(self, access: _Access, storage: _Storage) -> None:
        for old in storage.accesses:
            if old.end <= access.begin or access.end <= old.begin or not (old.writes or access.writes):
                continue
            if old.by is not access.by:
                self.counts["accesses after another stream's"] += 1
            does, did = ("writes" if one.writes else "reads" for one in (access, old))
            both = f"{access.what} {does} on {access.where()} what {old.what} {did} on {old.where()}"
            if not access.by.knows(old.by, old.tick):
                self.violation(f"{both}, without waiting for it")
            elif old.by is access.by and not access.host.knows(old.host, old.host_tick):
                self.violation(f"{both}, and the threads have no order")

    def _freed(self, key: int) -> None:
        with self._lock:
            storage = self._storages.pop(key)
            if storage.stream.is_host:
                # the allocator of pinned memory looks after copies under way by itself
                return
            known = Timeline(storage.stream.number, storage.stream.name)
            _join(known.clock, storage.stream.clock)
            _join(known.clock, self.host().clock)
            others = [old for old in storage.accesses if old.by is not storage.stream]
            self.counts["freed after another stream's use"] += bool(others)
            for old in others:
                if old.by.number not in storage.recorded and not known.knows(old.by, old.tick):
                    self.violation(
                        f"memory {storage.shape} of {storage.stream.name} is freed while {old.what} may still use it on "
                        f"{old.where()}, without record_stream"
                    )

    def violation(self, text: str) -> None:
        """Note what was found, once."""
        if text not in self.violations:
            self.violations.append(text)


def _join(clock: Clock, other: Clock) -> None:
    for number, tick in other.items():
        if tick > clock.get(number, 0):
            clock[number] = tick


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Bytes of the storage between a view's first and last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.storage_offset()
    return begin * tensor.element_size(), (begin + last + 1) * tensor.element_size()
