"""A heartbeat is read completely or not at all, in any interleaving of writer and reader."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from waiting import LIMIT_SECONDS

from distattn.supervision import heartbeats
from distattn.supervision.heartbeats import HeartbeatBoard


@pytest.fixture
def board():
    board_ = HeartbeatBoard.make(2)
    yield board_
    with contextlib.suppress(ValueError):
        board_.close()


def test_a_half_written_heartbeat_reads_as_the_previous_one(board):
    write = board.writer(1, 3)
    assert board.read(0) is None and board.read(1) is None
    slots = [board._memory[:]]
    for step, activity in enumerate(("reading", "key/value move 3 of layer 17 from rank 5", "")):
        write(activity, step, 2.5, step == 1)
        slots.append(board._memory[:])
    told = [None]
    for before, after in zip(slots, slots[1:], strict=False):
        # a CPU may make the new bytes visible from either end first
        mixed = {after[:done] + before[done:] for done in range(len(after) + 1)}
        mixed |= {before[:done] + after[done:] for done in range(len(after) + 1)}
        for content in mixed - {after}:
            board._memory[:] = content
            assert board.read(1) == told[-1]
        board._memory[:] = after
        told.append(board.read(1))
    assert [(beat.pid, beat.attempt, beat.step, beat.seconds, beat.waits, beat.activity) for beat in told[1:]] == [
        (os.getpid(), 3, 0, 2.5, False, "reading"),
        (os.getpid(), 3, 1, 2.5, True, "key/value move 3 of layer 17 from rank 5"),
        (os.getpid(), 3, 2, 2.5, False, ""),
    ]
    assert board.read(0) is None


def test_a_rank_that_writes_heartbeats_without_pause_is_read_correctly(board):
    writer = os.fork()
    if writer == 0:
        write, step = board.writer(1, 3), 0
        while True:
            step += 1
            write("x" * (step % 60), step, 0.0, bool(step % 2))
    try:
        read, looks, ends = set(), 0, time.monotonic() + LIMIT_SECONDS
        # the writer may have to wait for a core
        while looks < 200_000 or len(read) < 2:
            looks += 1
            assert time.monotonic() < ends
            if (beat := board.read(1)) is not None:
                read.add(beat.step)
                assert (beat.pid, beat.attempt, beat.beats) == (writer, 3, beat.step)
                assert beat.activity == "x" * (beat.step % 60) and beat.waits == bool(beat.step % 2)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


def test_a_thread_that_continues_does_not_revert_newer_heartbeats(board, monkeypatch):
    monkeypatch.setattr(heartbeats, "_CURRENT", heartbeats._CurrentActivity())
    write = board.writer(0, 1)
    beats, told = threading.Thread(target=heartbeats.repeat_heartbeat), threading.Event()

    def slow(activity, step, *fields):
        if not told.is_set():
            told.set()
            beats.start()
            # give the thread time to start waiting for its turn
            time.sleep(0.2)
        write(activity, step, *fields)

    heartbeats._CURRENT.write = slow
    heartbeats.set_activity("keys from rank 1", waits=True)
    beats.join()
    beat = board.read(0)
    assert (beat.activity, beat.waits, beat.beats) == ("keys from rank 1", True, 2)


def test_an_unfinished_board_does_not_count():
    descriptor = os.memfd_create(heartbeats._NAME)
    try:
        with pytest.raises(FileNotFoundError, match="without slots"):
            HeartbeatBoard.open(Path(f"/proc/{os.getpid()}/fd/{descriptor}"))
    finally:
        os.close(descriptor)
