"""What is kept of ranks before they are killed: where each thread stands, and what each told last."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from distattn.supervision.culprits import process_state
from distattn.supervision.heartbeats import Heartbeat

# USR1 is what batch systems send before a time limit
_TELL_STACKS = signal.SIGUSR2
# for py-spy, and for a rank's own answer
_PY_SPY_SECONDS, _ANSWER_SECONDS = 10.0, 2.0


def answer_with_stacks(folder: Path, rank: int) -> None:
    """Have this process write where its threads stand into stacks-RANK.txt of a folder, when it is asked to.

    From C, so that neither a lock nor a call that keeps the interpreter to itself is in the way. What ends it by a signal of its
    own, such as a segmentation fault, is written there, too.
    """
    descriptor = os.open(_stacks_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.enable(descriptor)
    faulthandler.register(_TELL_STACKS, file=descriptor, all_threads=True)


def keep_evidence(
    folder: Path, pids: Mapping[int, int], beats: Mapping[int, Heartbeat | None], late: Sequence[int]
) -> None:
    """Write what each rank told last, and the stacks of those that are late, into a folder. Raises OSError.

    pids: by rank. Stacks are read by py-spy where it is installed, else the rank writes them, which a stopped one cannot do.
    """
    lines = [
        json.dumps({"rank": rank, "state": process_state(pids[rank])} | _fields(beats[rank])) for rank in sorted(pids)
    ]
    (folder / "heartbeats.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    for rank in late:
        if not _spied(pids[rank], _stacks_file(folder, rank)):
            _asked(pids[rank], _stacks_file(folder, rank))


def _fields(beat: Heartbeat | None) -> dict[str, object]:
    if beat is None:
        return {"words": None}
    silent = time.monotonic() - beat.at
    return {"step": beat.step + 1, "words": beat.words, "waits": beat.waits, "silent_seconds": round(silent, 2)}


def _stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}.txt"


def _spied(pid: int, file: Path) -> bool:
    if shutil.which("py-spy") is None:
        return False
    # a stopped process does not answer the stop that py-spy sends
    command = ["py-spy", "dump", "--pid", str(pid), *(["--nonblocking"] if process_state(pid) in "Tt" else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode == 0:
        with open(file, "a", encoding="utf-8") as opened:
            opened.write(done.stdout)
    return done.returncode == 0


def _asked(pid: int, file: Path) -> None:
    if process_state(pid) in "TtZX" or not file.exists():
        return
    before, ends = file.stat().st_size, time.monotonic() + _ANSWER_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, _TELL_STACKS)
        while file.stat().st_size == before and time.monotonic() < ends:
            time.sleep(0.01)
        # threads are written one after another
        time.sleep(0.05)
