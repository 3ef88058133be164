"""What is kept of ranks before they are killed: where each thread stands, what each told last, and its flight recorder."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from distattn.supervision.culprits import process_state
from distattn.supervision.flight_recorder import keep_flight_recorders
from distattn.supervision.heartbeats import Heartbeat

# USR1 is what batch systems send before a time limit
_TELL_STACKS = signal.SIGUSR2
# from linux/prctl.h
_PR_SET_PTRACER = 0x59616D61
# for py-spy; for a rank to begin its own answer, and to end it, since it was asked; and at least after all else
_PY_SPY_SECONDS, _BEGIN_SECONDS, _ANSWER_SECONDS, _LEAST_SECONDS = 10.0, 5.0, 10.0, 1.0
# how faulthandler ends the stack of a main thread, and all stacks: at its outermost frame, or after a hundred
_OUTERMOST = (" in <module>", "...", "<no Python frame>")
# that an answer stays as it is before it counts as whole: one that ends so, and any
_STILL_SECONDS, _STUCK_SECONDS = 0.05, 2.0
# in how many innermost frames, of which torchrun's own do not count
_COLLECTIVES, _TORCHRUN, _INNERMOST = "/torch/distributed/", "/torch/distributed/elastic/", 4


def answer_with_stacks(folder: Path, rank: int) -> None:
    """Have this process write where its threads stand into stacks-RANK.txt of a folder, when it is asked to.

    From C, so that neither a lock nor a call that keeps the interpreter to itself is in the way. What ends it by a signal of its
    own, such as a segmentation fault, is written there, too. Where the file cannot be made, this process's error stream has them.
    """
    file = _stacks_file(folder, rank)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        sys.stderr.write(
            f"distattn: {file}: cannot be made: {error.strerror}; stacks of rank {rank} are printed instead.\n"
        )
        descriptor = os.dup(2)
    faulthandler.enable(descriptor)
    faulthandler.register(_TELL_STACKS, file=descriptor, all_threads=True)


def be_read_by(pid: int) -> None:
    """Let a process, and those that it starts, read this one's stacks where Yama keeps that from all but parents."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)


def keep_evidence(folder: Path, pids: Mapping[int, int], beats: Mapping[int, Heartbeat]) -> dict[int, str]:
    """Write what each rank told last, the stacks of its threads and its flight recorder into a folder; returns the stacks.

    pids: by rank. The ranks write their stacks themselves; those of a stopped one, which answers nothing, are read by py-spy
    where that is installed. Raises OSError.
    """
    lines = [
        json.dumps({"rank": rank, "state": process_state(pid)} | _fields(beats[rank])) for rank, pid in pids.items()
    ]
    (folder / "heartbeats.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    before = {rank: _size(_stacks_file(folder, rank)) for rank in pids}
    stopped = {rank for rank, pid in pids.items() if process_state(pid) in "Tt"}
    answering = {rank: pid for rank, pid in pids.items() if rank not in stopped}
    for pid in answering.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, _TELL_STACKS)
    asked = time.monotonic()
    _spy({_stacks_file(folder, rank): pids[rank] for rank in stopped})
    keep_flight_recorders(folder, answering)
    files = {rank: _stacks_file(folder, rank) for rank in pids}
    _wait_for_answers(answering, {rank: (files[rank], before[rank]) for rank in answering}, asked)
    return {rank: _added_to(file, before[rank]) for rank, file in files.items()}


def is_in_collective(stacks: str) -> bool:
    """Whether the main thread, the last one, stands in a collective of PyTorch, one of an engine for example."""
    _, _, main = stacks.rpartition("hread 0x")
    innermost = main.splitlines()[1 : 1 + _INNERMOST]
    return any(_COLLECTIVES in line and _TORCHRUN not in line for line in innermost)


def _fields(beat: Heartbeat) -> dict[str, object]:
    silent = time.monotonic() - beat.at
    return {"step": beat.step + 1, "words": beat.words, "waits": beat.waits, "silent_seconds": round(silent, 2)}


def _stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}.txt"


def _wait_for_answers(pids: Mapping[int, int], files: Mapping[int, tuple[Path, int]], asked: float) -> None:
    """Until each rank has written its stacks into its file, beyond so many bytes, or the time is over.

    Threads are written one after another, the main one last, and a busy machine may interrupt a rank in the middle of it.
    """
    found, changed, began = dict.fromkeys(pids, ""), dict.fromkeys(pids, asked), time.monotonic()
    left = set(pids)
    while left:
        time.sleep(0.01)
        now = time.monotonic()
        for rank in list(left):
            if (text := _added_to(*files[rank])) != found[rank]:
                found[rank], changed[rank] = text, now
            is_still = text and now - changed[rank] > (_STILL_SECONDS if _seems_whole(text) else _STUCK_SECONDS)
            if is_still or process_state(pids[rank]) in "XZ":
                left.remove(rank)
        seconds = _ANSWER_SECONDS if any(found[rank] for rank in left) else _BEGIN_SECONDS
        if now > max(asked + seconds, began + _LEAST_SECONDS):
            break


def _seems_whole(stacks: str) -> bool:
    return stacks.endswith("\n") and stacks.rstrip("\n").endswith(_OUTERMOST)


def _added_to(file: Path, before: int) -> str:
    return file.read_bytes()[before:].decode(errors="replace") if file.exists() else ""


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _spy(pids: Mapping[Path, int]) -> None:
    """Add what py-spy reads of processes to files, by their files; nothing where it is not installed."""
    if not pids or shutil.which("py-spy") is None:
        return
    ends, started = time.monotonic() + _PY_SPY_SECONDS, []
    for file, pid in pids.items():
        # a stopped process does not answer the stop that py-spy sends; what it cannot read it says
        with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as opened:
            command = ["py-spy", "dump", "--pid", str(pid), "--nonblocking"]
            started.append(subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT))
    for process in started:
        try:
            process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
