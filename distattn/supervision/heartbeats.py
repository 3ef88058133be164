"""Heartbeats of the ranks of one machine: what each does, told before it is done, in memory that a supervisor reads.

A rank that hangs cannot say so; what it told last can be read all the same. A board is memory with one slot of SLOT_BYTES
for each rank, which that rank alone writes.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from distattn.ir.errors import DistattnError

SLOT_BYTES = 256
# of the memory, as /proc shows it
_NAME = "distattn-heartbeats"
# what a rank tells last: it has done its part, refuses to go on, or something was raised; the reason follows
ENDED, REFUSED, RAISED = "ended", "refused with exit code ", "raised "
# and of one that has ended, once it need not wait for the others' ends any more
LEFT = "left"
# pid, attempt, nanoseconds, beats, step, first, seconds, waits, bytes of words; before it a checksum of all that follows
_HEAD = struct.Struct("<IIQQqqfBB")
_SUM_BYTES = 4
_WORD_BYTES = SLOT_BYTES - _SUM_BYTES - _HEAD.size
_TRIES = 20


class Heartbeat(NamedTuple):
    """What a rank told last. at: seconds of CLOCK_MONOTONIC. step: of training; first: the one its process began with; -1 before.

    seconds: that this may take without another word; 0 where the supervisor decides. waits: for other ranks; what a rank that
    waits stands still for is elsewhere.
    """

    pid: int
    attempt: int
    at: float
    beats: int
    step: int
    seconds: float
    waits: bool
    words: str
    first: int = -1


class HeartbeatBoard:
    """The slots of some ranks. Read by one process, written by each rank; nobody but this user can open it."""

    def __init__(self, descriptor: int, writable: bool = True):
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        self._known: dict[int, Heartbeat] = {}

    @classmethod
    def make(cls, ranks: int) -> HeartbeatBoard:
        """A board in memory that goes with the last process that has it. Raises OSError."""
        descriptor = os.memfd_create(_NAME)
        os.ftruncate(descriptor, ranks * SLOT_BYTES)
        return cls(descriptor)

    @classmethod
    def open(cls, path: Path, writable: bool = False) -> HeartbeatBoard:
        """The board of another process, by its `path`. Raises OSError, also where that process has put it away."""
        # not even read: the number may be that of any other file of the process by now
        descriptor = os.open(path, os.O_PATH)
        try:
            what = os.readlink(f"/proc/self/fd/{descriptor}")
            if not what.startswith(f"/memfd:{_NAME}"):
                raise FileNotFoundError(errno.ENOENT, f"no board of heartbeats, but {what}", str(path))
            opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR if writable else os.O_RDONLY)
        finally:
            os.close(descriptor)
        if not os.fstat(opened).st_size:
            # another one that is being made, under the number of one that was put away
            os.close(opened)
            raise FileNotFoundError(errno.ENOENT, "a board of heartbeats without slots", str(path))
        return cls(opened, writable)

    @property
    def slots(self) -> int:
        """Of how many ranks."""
        return len(self._memory) // SLOT_BYTES

    @property
    def path(self) -> Path:
        """Under which this user's other processes can open it while this process lives."""
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def writer(self, slot: int, attempt: int) -> Callable[[str, int, float, bool], None]:
        """A function that tells what the rank of a slot does: words, step, seconds, whether it waits for others."""
        memory, start = self._memory, slot * SLOT_BYTES
        pack, clock, pid, beats, first = _HEAD.pack, time.monotonic_ns, os.getpid(), 0, -1

        def write(words: str, step: int, seconds: float, waits: bool) -> None:
            nonlocal beats, first
            beats += 1
            if first < 0:
                first = step
            text = words.encode(errors="replace")[:_WORD_BYTES]
            content = pack(pid, attempt, clock(), beats, step, first, seconds, waits, len(text)) + text
            # no order of writes would do: the interpreter's and the processor's are their own
            content = crc32(content).to_bytes(_SUM_BYTES, "little") + content
            memory[start : start + len(content)] = content

        return write

    def read(self, slot: int) -> Heartbeat | None:
        """What a rank told last, None before its first word.

        While it writes, which may last where it has lost the processor, what it told before.
        """
        start = slot * SLOT_BYTES
        for _ in range(_TRIES):
            raw = self._memory[start : start + SLOT_BYTES]
            pid, attempt, at, beats, step, first, seconds, waits, size = _HEAD.unpack_from(raw, _SUM_BYTES)
            content = raw[_SUM_BYTES : _SUM_BYTES + _HEAD.size + size]
            if crc32(content) == int.from_bytes(raw[:_SUM_BYTES], "little"):
                words = content[_HEAD.size :].decode(errors="replace")
                self._known[slot] = Heartbeat(pid, attempt, at / 1e9, beats, step, seconds, bool(waits), words, first)
                break
        return self._known.get(slot)

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()
        os.close(self._descriptor)


class _Told:
    """What this process told last, and who writes it down: nobody by default. Threads take turns."""

    def __init__(self) -> None:
        self.write: Callable[[str, int, float, bool], None] | None = None
        self.lock = threading.Lock()
        self.step = -1
        self.layer: int | None = None
        self.last: tuple[str, float, bool] = "", 0.0, False
        # what other threads do meanwhile, and whether they wait for other ranks; and the one that the main thread waits for
        self.beside: dict[int, tuple[str, bool]] = {}
        self.awaited: int | None = None

    def tell(self, words: str, seconds: float, waits: bool) -> None:
        if self.write is not None:
            with self.lock:
                self.last = words, seconds, waits
                self._write_now()

    def repeat(self) -> None:
        if self.write is not None:
            # what is repeated is looked up in here: another thread may tell something new meanwhile
            with self.lock:
                self._write_now()

    def tell_beside(self, thread: int, does: tuple[str, bool] | None) -> None:
        with self.lock:
            before = self.beside.pop(thread, None)
            if does is not None:
                self.beside[thread] = does
            # of a thread that waits nobody hears but whoever waits for it
            if thread == self.awaited or not all(waits for _, waits in filter(None, (before, does))):
                self._write_now()

    def wait_for(self, thread: int | None) -> None:
        with self.lock:
            self.awaited = thread
            self._write_now()

    def _write_now(self) -> None:
        if self.write is not None:
            self._write(self.write)

    def _write(self, write: Callable[[str, int, float, bool], None]) -> None:
        words, seconds, waits = self.last
        if self.beside:
            awaited, waits_too = self.beside.get(self.awaited or 0, ("", False))
            if waits_too:
                words, seconds, waits = awaited, 0.0, True
            beside = (what for what, waiting in self.beside.values() if not waiting)
            words = "; meanwhile ".join(dict.fromkeys((words, *beside)))
        write(words, self.step, seconds, waits)


_TOLD = _Told()


def attach(path: Path, slot: int, attempt: int) -> None:
    """Have this process tell what it does on a board from now on. Raises OSError where there is none."""
    _TOLD.write = HeartbeatBoard.open(path, writable=True).writer(slot, attempt)


def tell(words: str, *, step: int | None = None, seconds: float = 0.0, waits: bool = False) -> None:
    """Say what this process does next; for nobody, and nearly for nothing, where it has no supervisor. Costs about 1 us.

    step: of training, from now on. seconds: see `Heartbeat`. waits: for other ranks.
    """
    if step is not None:
        _TOLD.step = step
    _TOLD.tell(words, seconds, waits)


def beat() -> None:
    """Say that this process goes on with what it told last: more of a file is written, for example. From any thread."""
    _TOLD.repeat()


class telling:  # noqa: N801
    """Say what this process does in here; afterwards, that it goes on with what it did before."""

    # a class, since a generator would cost as much again
    __slots__ = ("_before", "_now")

    def __init__(self, words: str, *, seconds: float = 0.0, waits: bool = False):
        self._now = words, seconds, waits

    def __enter__(self) -> None:
        self._before = _TOLD.last
        _TOLD.tell(*self._now)

    def __exit__(self, *exception: object) -> None:
        _TOLD.tell(*self._before)


@contextlib.contextmanager
def doing(words: str, *, waits: bool = False) -> Iterator[None]:
    """Say what the thread that is in here does: as `telling` on the main thread, of others beside what that one does.

    waits: for other ranks; of another thread it is told where the main thread waits for that one (see `awaiting`).
    """
    if _TOLD.write is None:
        yield
        return
    if threading.current_thread() is threading.main_thread():
        with telling(words, waits=waits):
            yield
        return
    thread = threading.get_ident()
    before = _TOLD.beside.get(thread)
    _TOLD.tell_beside(thread, (words, waits))
    try:
        yield
    finally:
        _TOLD.tell_beside(thread, before)


@contextlib.contextmanager
def awaiting(thread: int) -> Iterator[None]:
    """Say that the main thread waits for another one, by its ident, in here: where that waits for other ranks, so does this one.

    So a rank that hangs elsewhere is found by what it has told, and this one is not to blame.
    """
    before = _TOLD.awaited
    _TOLD.wait_for(thread)
    try:
        yield
    finally:
        _TOLD.wait_for(before)


def tell_layer(layer: int | None) -> None:
    """Say which layer of the model messages are for, from now on; None: it is not known."""
    _TOLD.layer = layer


def layer_in_words() -> str:
    """ " of layer 17" of what `tell_layer` was given, or nothing."""
    return "" if _TOLD.layer is None else f" of layer {_TOLD.layer}"


def tell_end(code: int, error: BaseException | None = None) -> None:
    """Say how this process ends, with the first line of what was raised; what it has said of its end already stays."""
    if _TOLD.last[0].startswith((REFUSED, RAISED)):
        return
    line = (str(error).strip().splitlines() or [""])[0]
    if error is not None and not isinstance(error, DistattnError):
        tell(f"{RAISED}{type(error).__name__}: {line}")
    else:
        tell(f"{REFUSED}{code}" + (f": {line}" if line and error is not None else "") if code else ENDED)


def is_attached() -> bool:
    """Whether somebody reads what this process tells: words that cost something to make are for nobody otherwise."""
    return _TOLD.write is not None
