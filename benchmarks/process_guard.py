"""A guard that kills what a process has started once the process itself has ended, however it ends. For tests and benchmarks.

`guard_processes()` starts a small process that waits for its caller's end and then kills all of the caller's descendants.
They carry a mark that survives a lost parent and a new session: a word in the environment of programs they start, and an open
file in forked processes. The module imports little, because ranks of benchmarks import it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

# the environment variable that holds the marks of a program's guarded ancestors; child programs inherit it
_VARIABLE = "DISTATTN_GUARDS"
# the mark of a guarded process, and the file descriptor that its forked children inherit, keyed by process id
_GUARDED: dict[int, tuple[str, int]] = {}
# the guard ends after this many consecutive looks, this many seconds apart, find no process: a single look can miss a
# process that is just being forked
_EMPTY_LOOKS, _LOOK_SECONDS = 2, 0.05
# multiprocessing's resource trackers remove semaphores and exit after all other processes, so they are killed only after
# this many looks
_TRACKER, _TRACKER_LOOKS = b"multiprocessing.resource_tracker", 40


def guard_processes() -> None:
    """Start a guard that kills all later descendants of this process once it ends. Later calls do nothing. Linux only."""
    if os.getpid() in _GUARDED:
        return
    mark = f"guard-{secrets.token_hex(8)}"
    # give the guard only the ancestors' marks in its own environment, so that it does not kill itself
    above = dict(os.environ)
    command = [sys.executable, "-ISP", __file__, str(os.getpid()), mark]
    guard = subprocess.Popen(
        command, env=above, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert guard.stdout is not None
    # wait until the guard is watching
    guard.stdout.readline()
    guard.stdout.close()
    # set a return code: this process never waits for the guard, and Popen would warn without one
    guard.returncode = 0
    _GUARDED[os.getpid()] = mark, os.memfd_create(mark)
    os.environ[_VARIABLE] = " ".join(filter(None, (above.get(_VARIABLE), mark)))


def main(pid: int, mark: str) -> None:
    """Wait until a process has ended, then kill processes with its mark until no such process is left."""
    with contextlib.suppress(ProcessLookupError):
        watched = os.pidfd_open(pid)
        sys.stdout.write("watching\n")
        sys.stdout.flush()
        select.select([watched], [], [])
    empty, looks = 0, 0
    while empty < _EMPTY_LOOKS:
        marked = [place for place in Path("/proc").glob("[0-9]*") if _is_marked(place, mark)]
        empty, looks = 0 if marked else empty + 1, looks + 1
        for place in marked:
            with contextlib.suppress(OSError):
                if looks > _TRACKER_LOOKS or _TRACKER not in (place / "cmdline").read_bytes():
                    os.kill(int(place.name), signal.SIGKILL)
        time.sleep(_LOOK_SECONDS)


def _is_marked(place: Path, mark: str) -> bool:
    """Return whether the process whose /proc folder is `place` has the mark. Return False if it has ended or is of a
    different user."""
    with contextlib.suppress(OSError):
        variables = (place / "environ").read_bytes().split(b"\0")
        ours = next((word for word in variables if word.startswith(f"{_VARIABLE}=".encode())), b"")
        if mark.encode() in ours:
            return True
    with contextlib.suppress(OSError):
        return any(mark in os.readlink(link) for link in (place / "fd").iterdir())
    return False


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
