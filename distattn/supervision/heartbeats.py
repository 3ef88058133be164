"""Heartbeats of the ranks on one machine: each rank writes what it is about to do to shared memory that a supervisor reads.

A rank that hangs cannot report it, but its last heartbeat can still be read. The memory, a board, has one slot of SLOT_BYTES for
each rank, which only that rank writes.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from zlib import crc32

from distattn.ir.errors import DistattnError, LostRankError, shows_lost_peer

SLOT_BYTES = 512
# the memory's name in /proc; the number is the version of the slots' layout
_NAME = "distattn-heartbeats-2"
# a rank is working, has done its part, refuses to continue, raised an exception, or no longer waits for the others to end
State = Literal["working", "ended", "refused", "raised", "left"]
_STATES: tuple[State, ...] = get_args(State)
# states of ranks that have done their part, and of ranks that gave a reason for their end
DONE, WITH_REASON = ("ended", "left"), ("refused", "raised")
# pid, attempt, nanoseconds, beats, step, first, seconds, key, exit code, waits, state, lost_peer, number of peers, bytes of the
# activity; a checksum precedes them, the peers and the activity follow
_HEAD = struct.Struct("<IIQQqqfIHBBBBB")
_SUM_BYTES = 4
# a rank may wait for more peers than a slot has room for
_MOST_PEERS = 60
_MOST_TEXT = min(255, SLOT_BYTES - _SUM_BYTES - _HEAD.size - 4 * _MOST_PEERS)
_TRIES = 20


class Heartbeat(NamedTuple):
    """The last heartbeat of a rank.

    at: time of the heartbeat in seconds of CLOCK_MONOTONIC. beats: the number of heartbeats so far. step: the training step.
    first: the first step of the process. Both are -1 before training. seconds: how long the activity may take without another
    heartbeat, or 0 to let the supervisor decide. waits: True if the rank waits for other ranks, so another rank is to blame if it
    makes no progress. activity: what the rank is doing or why it is exiting, as text that no program parses. peers: the ranks
    whose messages it waits for or, if it refuses to continue, the ranks that it has lost. key: a number that is equal for ranks
    that wait for the same event or raised the same error. exit_code: set if the rank refuses to continue. lost_peer: True if the
    rank ends because it lost another rank.
    """

    pid: int
    attempt: int
    at: float
    beats: int
    step: int
    seconds: float
    waits: bool
    activity: str
    first: int = -1
    state: State = "working"
    peers: tuple[int, ...] = ()
    key: int = 0
    exit_code: int = 0
    lost_peer: bool = False

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Heartbeat:
        """Build a heartbeat from its `_asdict`, which may have other fields if another release wrote it."""
        shared = {name: value for name, value in fields.items() if name in cls._fields}
        return cls(**shared)._replace(peers=tuple(shared.get("peers", ())))

    @property
    def has_done_its_part(self) -> bool:
        """True if the rank's work is done."""
        return self.state in DONE

    @property
    def words(self) -> str:
        """What the rank is doing, or how and why it ended, as human-readable text."""
        if self.state == "refused":
            return f"refused with exit code {self.exit_code}" + (f": {self.activity}" if self.activity else "")
        if self.state == "raised":
            return f"raised {self.activity}"
        return self.activity if self.state == "working" else self.state


# a function that writes a heartbeat, see `HeartbeatBoard.writer`
Write = Callable[..., None]


class Activity(NamedTuple):
    """What a process is about to do. The fields are those of `Heartbeat`, except that `key` is text."""

    text: str
    seconds: float = 0.0
    waits: bool = False
    peers: tuple[int, ...] = ()
    key: str = ""
    state: State = "working"
    exit_code: int = 0
    lost_peer: bool = False


class HeartbeatBoard:
    """Shared memory with one slot per rank. Each rank writes its slot, and one process reads them. Other users cannot open it."""

    def __init__(self, descriptor: int, writable: bool = True):
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        self._last_beats: dict[int, Heartbeat] = {}

    @classmethod
    def make(cls, ranks: int) -> HeartbeatBoard:
        """Create a board, or raise OSError. Its memory is freed when the last process that has it open ends."""
        descriptor = os.memfd_create(_NAME)
        os.ftruncate(descriptor, ranks * SLOT_BYTES)
        return cls(descriptor)

    @classmethod
    def open(cls, path: Path, writable: bool = False) -> HeartbeatBoard:
        """Open the board of another process by its `path`. Raise OSError if that fails or the process has closed the board."""
        # open with O_PATH first, which does not touch the file: the descriptor's number may by now belong to any other file
        descriptor = os.open(path, os.O_PATH)
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if not target.startswith(f"/memfd:{_NAME}"):
                raise FileNotFoundError(errno.ENOENT, f"no board of heartbeats, but {target}", str(path))
            opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR if writable else os.O_RDONLY)
        finally:
            os.close(descriptor)
        if not os.fstat(opened).st_size:
            # this is a new board, still being created, at the descriptor number of a closed board
            os.close(opened)
            raise FileNotFoundError(errno.ENOENT, "a board of heartbeats without slots", str(path))
        return cls(opened, writable)

    @property
    def slots(self) -> int:
        """The number of ranks on the board."""
        return len(self._memory) // SLOT_BYTES

    @property
    def path(self) -> Path:
        """The path by which other processes of this user can open the board while this process is alive."""
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def writer(self, slot: int, attempt: int) -> Write:
        """Return a function that writes a heartbeat to a slot. Its arguments are fields of `Heartbeat`, with `key` as text."""
        memory, start = self._memory, slot * SLOT_BYTES
        pack, clock, pid, beats, first = _HEAD.pack, time.monotonic_ns, os.getpid(), 0, -1

        def write(
            activity: str,
            step: int,
            seconds: float,
            waits: bool,
            peers: tuple[int, ...] = (),
            key: str = "",
            state: State = "working",
            exit_code: int = 0,
            lost_peer: bool = False,
        ) -> None:
            nonlocal beats, first
            beats += 1
            if first < 0:
                first = step
            text = activity.encode(errors="replace")[:_MOST_TEXT]
            peers = peers[:_MOST_PEERS]
            number, code = _STATES.index(state), exit_code & 0xFFFF
            content = pack(
                *(pid, attempt, clock(), beats, step, first, seconds, _key_number(key)),
                *(code, waits, number, lost_peer, len(peers), len(text)),
            )
            content += b"".join([peer.to_bytes(4, "little") for peer in peers]) + text
            # neither Python nor the CPU guarantees write order; the checksum detects torn writes
            content = crc32(content).to_bytes(_SUM_BYTES, "little") + content
            memory[start : start + len(content)] = content

        return write

    def read(self, slot: int) -> Heartbeat | None:
        """Return the last heartbeat of a rank, or None before its first heartbeat.

        While the rank is writing, return the previous heartbeat. Writing may take long if the rank is descheduled.
        """
        start = slot * SLOT_BYTES
        for _ in range(_TRIES):
            raw = self._memory[start : start + SLOT_BYTES]
            pid, attempt, at, beats, step, first, seconds, *fields = _HEAD.unpack_from(raw, _SUM_BYTES)
            key, exit_code, waits, state, lost_peer, peers, size = fields
            begin = _HEAD.size + 4 * peers
            content = raw[_SUM_BYTES : _SUM_BYTES + begin + size]
            if crc32(content) == int.from_bytes(raw[:_SUM_BYTES], "little"):
                text = content[begin:].decode(errors="replace")
                self._last_beats[slot] = Heartbeat(
                    *(pid, attempt, at / 1e9, beats, step, seconds, bool(waits), text, first, _STATES[state]),
                    *(struct.unpack_from(f"<{peers}I", content, _HEAD.size), key, exit_code, bool(lost_peer)),
                )
                break
        return self._last_beats.get(slot)

    def close(self) -> None:
        """Release the memory."""
        self._memory.close()
        os.close(self._descriptor)


@cache
def _key_number(key: str) -> int:
    """Return a number that identifies a key, 0 for an empty key."""
    return crc32(key.encode(errors="replace")) if key else 0


class _CurrentActivity:
    """The current activity of this process. write: the function that writes heartbeats, or None. A lock serializes threads."""

    def __init__(self) -> None:
        self.write: Write | None = None
        self.lock = threading.Lock()
        self.step = -1
        self.layer: int | None = None
        self.last = Activity("")
        # the activities of other threads, and the thread that the main thread waits for
        self.other_threads: dict[int, Activity] = {}
        self.awaited: int | None = None

    def set(self, activity: Activity) -> None:
        if self.write is not None:
            with self.lock:
                self.last = activity
                self._write_now()

    def repeat(self) -> None:
        if self.write is not None:
            # read `last` under the lock, because another thread may be setting a new activity
            with self.lock:
                self._write_now()

    def set_thread(self, thread: int, activity: Activity | None) -> None:
        with self.lock:
            before = self.other_threads.pop(thread, None)
            if activity is not None:
                self.other_threads[thread] = activity
            # a background thread's wait is reported only while the main thread waits for that thread
            if thread == self.awaited or not all(other.waits for other in (before, activity) if other is not None):
                self._write_now()

    def wait_for(self, thread: int | None) -> None:
        with self.lock:
            self.awaited = thread
            self._write_now()

    def _write_now(self) -> None:
        if self.write is not None:
            self._write(self.write)

    def _write(self, write: Write) -> None:
        activity = self.last
        if self.other_threads:
            awaited = self.other_threads.get(self.awaited or 0)
            if awaited is not None and awaited.waits:
                activity = awaited
            busy_threads = (other.text for other in self.other_threads.values() if not other.waits)
            activity = activity._replace(text="; meanwhile ".join(dict.fromkeys((activity.text, *busy_threads))))
        text, *fields = activity
        write(text, self.step, *fields)


_CURRENT = _CurrentActivity()


def attach(path: Path, slot: int, attempt: int) -> None:
    """Make this process write its heartbeats to a board from now on. Raise OSError if there is no board."""
    _CURRENT.write = HeartbeatBoard.open(path, writable=True).writer(slot, attempt)


def set_activity(
    text: str, *, step: int | None = None, seconds: float = 0.0, waits: bool = False, key: str = ""
) -> None:
    """Report what this process is about to do. This takes about 1 us, and does nothing without a supervisor.

    step: the training step from now on. seconds: see `Heartbeat`. waits: True if the process waits for other ranks. key: a name
    of the activity that is the same on all ranks.
    """
    if step is not None:
        _CURRENT.step = step
    _CURRENT.set(Activity(text, seconds, waits, key=key))


def repeat_heartbeat() -> None:
    """Report that the last activity is making progress, for example that more of a file was written. Any thread may call it."""
    _CURRENT.repeat()


class activity:  # noqa: N801
    """Context manager that reports an activity of this process. On exit it reports the previous activity again.

    peers: the ranks whose messages it waits for. key: a name of the collective it waits for, the same on all ranks.
    """

    # not a generator, which would double the cost
    __slots__ = ("_before", "_now")

    def __init__(
        self, text: str, *, seconds: float = 0.0, waits: bool = False, peers: tuple[int, ...] = (), key: str = ""
    ):
        self._now = Activity(text, seconds, waits, peers, key)

    def __enter__(self) -> None:
        self._before = _CURRENT.last
        _CURRENT.set(self._now)

    def __exit__(self, *exception: object) -> None:
        _CURRENT.set(self._before)


@contextlib.contextmanager
def thread_activity(text: str, *, waits: bool = False, peers: tuple[int, ...] = (), key: str = "") -> Iterator[None]:
    """Report what the calling thread is doing. On the main thread this is `activity`; other threads' text is added to it.

    waits: True if the thread waits for other ranks. For a background thread this is reported only while the main thread waits for
    it (see `awaiting_thread`).
    """
    if _CURRENT.write is None:
        yield
        return
    if threading.current_thread() is threading.main_thread():
        with activity(text, waits=waits, peers=peers, key=key):
            yield
        return
    thread = threading.get_ident()
    before = _CURRENT.other_threads.get(thread)
    _CURRENT.set_thread(thread, Activity(text, 0.0, waits, peers, key))
    try:
        yield
    finally:
        _CURRENT.set_thread(thread, before)


@contextlib.contextmanager
def awaiting_thread(thread: int) -> Iterator[None]:
    """Report that the main thread waits for the thread with ident `thread`.

    While that thread waits for other ranks, the heartbeat says that this rank waits for them, so that this rank is not blamed.
    """
    before = _CURRENT.awaited
    _CURRENT.wait_for(thread)
    try:
        yield
    finally:
        _CURRENT.wait_for(before)


def set_layer(layer: int | None) -> None:
    """Set the model layer to which messages belong from now on, or None if it is unknown."""
    _CURRENT.layer = layer


def current_layer() -> int | None:
    """Return the layer set by `set_layer`."""
    return _CURRENT.layer


def layer_suffix() -> str:
    """Return a string such as " of layer 17" for the layer set by `set_layer`, or "" if it is unknown."""
    return "" if _CURRENT.layer is None else f" of layer {_CURRENT.layer}"


def set_end(code: int, error: BaseException | None = None) -> None:
    """Report how this process ends, with the first line of the exception. Do nothing if an error was already reported."""
    if _CURRENT.last.state in WITH_REASON:
        return
    line = "" if error is None else (str(error).strip().splitlines() or [""])[0]
    lost_peer = error is not None and shows_lost_peer(error)
    if error is not None and not isinstance(error, DistattnError):
        text = f"{type(error).__name__}: {line}"
        _CURRENT.set(Activity(text, key=text, state="raised", exit_code=code, lost_peer=lost_peer))
    elif code:
        peers = error.peers if isinstance(error, LostRankError) else ()
        _CURRENT.set(Activity(line, peers=peers, state="refused", exit_code=code, lost_peer=lost_peer))
    else:
        _CURRENT.set(Activity("", state="ended"))


def set_left() -> None:
    """Report that this process has done its part and no longer waits for the other ranks to end."""
    _CURRENT.set(Activity("", state="left"))


def is_attached() -> bool:
    """Return True if a supervisor reads the heartbeats. Callers use this to avoid building strings that would not be read."""
    return _CURRENT.write is not None
