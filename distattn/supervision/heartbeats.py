"""Heartbeats of the ranks of one machine: what each does, told before it is done, in memory that a supervisor reads.

A rank that hangs cannot say so; what it told last can be read all the same. A board is a file in memory with one slot of
SLOT_BYTES for each rank, which that rank alone writes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SLOT_BYTES = 256
# sequence number (odd while the slot is written), pid, attempt, nanoseconds, beats, step, whether it waits, bytes of words
_HEAD = struct.Struct("<QIIQQqBB")
_WORD_BYTES = SLOT_BYTES - _HEAD.size
_TRIES = 20


class Heartbeat(NamedTuple):
    """What a rank told last. at: seconds of CLOCK_MONOTONIC. step: of training, -1 before the first.

    waits: for other ranks; what a rank that waits stands still for is elsewhere.
    """

    pid: int
    attempt: int
    at: float
    beats: int
    step: int
    waits: bool
    words: str


class HeartbeatBoard:
    """The slots of some ranks, in a file that only this user can read. Read by one process, written by each rank."""

    def __init__(self, path: Path, ranks: int | None = None):
        """Open a board, or make it where a number of ranks is given. Raises OSError."""
        flags = os.O_RDWR if ranks is None else os.O_RDWR | os.O_CREAT | os.O_EXCL
        descriptor = os.open(path, flags, 0o600)
        try:
            if ranks is not None:
                os.ftruncate(descriptor, ranks * SLOT_BYTES)
            self._memory = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self.path = path
        self._known: dict[int, Heartbeat] = {}

    def writer(self, slot: int, attempt: int) -> Callable[[str, int, bool], None]:
        """A function that tells what the rank of a slot does: words, step, whether it waits for others."""
        memory, start, text_at = self._memory, slot * SLOT_BYTES, slot * SLOT_BYTES + _HEAD.size
        pack, clock, pid, beats = _HEAD.pack_into, time.monotonic_ns, os.getpid(), 0

        def write(words: str, step: int, waits: bool) -> None:
            nonlocal beats
            beats += 1
            text = words.encode()[:_WORD_BYTES]
            pack(memory, start, 2 * beats - 1, pid, attempt, clock(), beats, step, waits, len(text))
            memory[text_at : text_at + len(text)] = text
            pack(memory, start, 2 * beats, pid, attempt, clock(), beats, step, waits, len(text))

        return write

    def read(self, slot: int) -> Heartbeat | None:
        """What a rank told last, None before its first word.

        While it writes, which may last where it has lost the processor, what it told before.
        """
        start = slot * SLOT_BYTES
        for _ in range(_TRIES):
            raw = self._memory[start : start + SLOT_BYTES]
            sequence, pid, attempt, at, beats, step, waits, size = _HEAD.unpack_from(raw)
            if sequence % 2 == 0 and raw == self._memory[start : start + SLOT_BYTES]:
                if sequence:
                    words = raw[_HEAD.size : _HEAD.size + size].decode(errors="replace")
                    self._known[slot] = Heartbeat(pid, attempt, at / 1e9, beats, step, bool(waits), words)
                break
        return self._known.get(slot)

    def clear(self) -> None:
        """Forget all ranks: an attempt begins."""
        self._memory[:] = bytes(len(self._memory))
        self._known = {}

    def close(self, *, remove: bool = False) -> None:
        """Let go of the memory. remove: the file, too."""
        self._memory.close()
        if remove:
            self.path.unlink(missing_ok=True)


class _Told:
    """What this process tells, and to whom; to nobody by default."""

    def __init__(self) -> None:
        self.write: Callable[[str, int, bool], None] | None = None
        self.step = -1
        self.words, self.waits = "", False


_TOLD = _Told()


def board_folder() -> Path:
    """Where boards lie: in memory where there is a file system for it, so that telling never waits for a disk."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))


def attach(path: Path, slot: int, attempt: int) -> None:
    """Have this process tell what it does on a board from now on. Raises OSError where there is none."""
    _TOLD.write = HeartbeatBoard(path).writer(slot, attempt)


def tell(words: str, *, step: int | None = None, waits: bool = False) -> None:
    """Say what this process does next. step: of training, from now on. waits: for other ranks. Costs about 1 us; never raises."""
    if step is not None:
        _TOLD.step = step
    if _TOLD.write is not None:
        _TOLD.words, _TOLD.waits = words, waits
        _TOLD.write(words, _TOLD.step, waits)


@contextlib.contextmanager
def telling(words: str, *, waits: bool = False) -> Iterator[None]:
    """Say what this process does in here; afterwards, that it goes on with what it did before."""
    before = _TOLD.words, _TOLD.waits
    tell(words, waits=waits)
    try:
        yield
    finally:
        tell(before[0], waits=before[1])


def is_attached() -> bool:
    """Whether somebody reads what this process tells: words that cost something to make are for nobody otherwise."""
    return _TOLD.write is not None
