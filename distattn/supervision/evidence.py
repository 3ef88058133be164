"""Save evidence about ranks before they are killed: the stack of each thread, the last heartbeat and the flight recorder."""

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
from distattn.supervision.flight_recorder import save_flight_recorders
from distattn.supervision.heartbeats import Heartbeat

# not SIGUSR1, which batch systems send before a time limit
_TELL_STACKS = signal.SIGUSR2
# from linux/prctl.h
_PR_SET_PTRACER = 0x59616D61
# in seconds: the time limits for py-spy, and for a rank to begin and to finish its answer (counted from the request), and the
# minimum wait for answers once all other work is done
_PY_SPY_SECONDS, _BEGIN_SECONDS, _ANSWER_SECONDS, _LEAST_SECONDS = 10.0, 5.0, 10.0, 1.0
# the end of faulthandler's output: the outermost frame of the main thread, or "..." after a hundred frames
_OUTERMOST = (" in <module>", "...", "<no Python frame>")
# seconds without change after which an answer counts as complete, if it ends with _OUTERMOST and if it does not
_STILL_SECONDS, _STUCK_SECONDS = 0.05, 2.0
# frames under the first path are collectives, except torchrun's, which are under the second; number of frames to search
_COLLECTIVES, _TORCHRUN, _INNERMOST = "/torch/distributed/", "/torch/distributed/elastic/", 4


def answer_with_stacks(folder: Path, rank: int) -> None:
    """Make this process write its threads' stacks to stacks-RANK.txt in a folder when it receives SIGUSR2.

    The handler is written in C, so it works even if a lock or the GIL is held. It also writes the stacks on a fault such as a
    segmentation fault. If the file cannot be created, the stacks go to stderr.
    """
    file = _stacks_file(folder, rank)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        sys.stderr.write(
            f"distattn: {file} cannot be created: {error.strerror}; the stacks of rank {rank} are printed instead.\n"
        )
        descriptor = os.dup(2)
    faulthandler.enable(descriptor)
    faulthandler.register(_TELL_STACKS, file=descriptor, all_threads=True)


def allow_stack_reads(pid: int) -> None:
    """Let process `pid` and its children read this process's stacks, which Linux (Yama) may allow only to its ancestors."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)


def save_evidence(folder: Path, pids: Mapping[int, int], beats: Mapping[int, Heartbeat]) -> dict[int, str]:
    """Write the last heartbeat, the stacks and the flight recorder of each rank to a folder. Return the stacks by rank.

    pids: process ids by rank. The ranks write their stacks themselves. A stopped rank cannot, so py-spy reads its stacks if it is
    installed. Raises OSError if a file cannot be written.
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
    save_flight_recorders(folder, answering)
    files = {rank: _stacks_file(folder, rank) for rank in pids}
    _wait_for_answers(answering, {rank: (files[rank], before[rank]) for rank in answering}, asked)
    return {rank: _added_to(file, before[rank]) for rank, file in files.items()}


def is_in_collective(stacks: str) -> bool:
    """Return True if the main thread, the last in `stacks`, is in a PyTorch collective, such as one called by an engine."""
    _, _, main = stacks.rpartition("hread 0x")
    innermost = main.splitlines()[1 : 1 + _INNERMOST]
    return any(_COLLECTIVES in line and _TORCHRUN not in line for line in innermost)


def _fields(beat: Heartbeat) -> dict[str, object]:
    silent = time.monotonic() - beat.at
    return {
        "step": beat.step + 1,
        "activity": beat.words,
        "waits": beat.waits,
        "peers": beat.peers,
        "silent_seconds": round(silent, 2),
    }


def _stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}.txt"


def _wait_for_answers(pids: Mapping[int, int], files: Mapping[int, tuple[Path, int]], asked: float) -> None:
    """Wait until each rank has appended its stacks to its file, or time is up.

    pids: process ids by rank. files: (file, its size before the request) by rank. asked: the time of the request. Threads are
    written one by one, the main thread last; a busy machine may pause a rank in between, so a pause is not the end.
    """
    texts, changed, began = dict.fromkeys(pids, ""), dict.fromkeys(pids, asked), time.monotonic()
    left = set(pids)
    while left:
        time.sleep(0.01)
        now = time.monotonic()
        for rank in list(left):
            if (text := _added_to(*files[rank])) != texts[rank]:
                texts[rank], changed[rank] = text, now
            is_still = text and now - changed[rank] > (_STILL_SECONDS if _seems_whole(text) else _STUCK_SECONDS)
            if is_still or process_state(pids[rank]) in "XZ":
                left.remove(rank)
        seconds = _ANSWER_SECONDS if any(texts[rank] for rank in left) else _BEGIN_SECONDS
        if now > max(asked + seconds, began + _LEAST_SECONDS):
            break


def _seems_whole(stacks: str) -> bool:
    return stacks.endswith("\n") and stacks.rstrip("\n").endswith(_OUTERMOST)


def _added_to(file: Path, before: int) -> str:
    return file.read_bytes()[before:].decode(errors="replace") if file.exists() else ""


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _spy(pids: Mapping[Path, int]) -> None:
    """Append py-spy's output about processes to files. pids: process ids by file. Do nothing if py-spy is not installed."""
    if not pids or shutil.which("py-spy") is None:
        return
    ends, started = time.monotonic() + _PY_SPY_SECONDS, []
    for file, pid in pids.items():
        # use --nonblocking: a stopped process would not react to py-spy's own pause; if it fails, py-spy writes the reason
        with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as opened:
            command = ["py-spy", "dump", "--pid", str(pid), "--nonblocking"]
            started.append(subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT))
    for process in started:
        try:
            process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
