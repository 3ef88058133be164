"""End a process with its launcher in all cases: `python -m distattn.launch.ranks.die_with_launcher PID MODULE ARGUMENTS`.

Runs a module as `python -m MODULE ARGUMENTS` does, in a process that is killed as soon as its parent, process PID, ends.
With -- COMMAND ARGUMENTS instead of a module, the process becomes that command, which Linux kills in the same way.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

# from linux/prctl.h
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 1.0


def die_with_launcher(launcher: int) -> None:
    """Let this process be killed by SIGKILL when its parent, the process with id `launcher`, ends in any way.

    Linux kills it. On other systems a thread checks every second whether the parent is still the same.
    """
    if not set_parent_death_signal():
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()
    # if the launcher died before the signal was set, another process is the parent now
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def set_parent_death_signal() -> bool:
    """Let Linux kill this process when its parent ends. Return False if the system does not support it."""
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):
        return False
    return prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    # Ctrl-C ends a rank at once and silently, since the launcher prints the message
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_launcher(int(sys.argv[1]))
    if sys.argv[2] == "--":
        os.execvp(sys.argv[3], sys.argv[3:])
    _module = sys.argv[2]
    from distattn.launch.ranks.process_title import set_title

    set_title(f"rank {os.environ['RANK']}" if "RANK" in os.environ else "helper", " ".join(sys.argv[2:]))
    # runpy replaces the first argument with the module's file
    sys.argv = sys.argv[2:]
    runpy.run_module(_module, run_name="__main__", alter_sys=True)
