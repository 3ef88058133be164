"""What a rank that a fork server has made does before its work: it ends with its launcher, and tells what it does."""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.launch.ranks.die_with_launcher import set_parent_death_signal
from distattn.supervision.evidence import answer_with_stacks, be_read_by
from distattn.supervision.flight_recorder import answer_with_flight_recorder
from distattn.supervision.heartbeats import LEFT, attach, set_activity, set_end

_AFTER_OTHERS_SECONDS = 0.5
# that threads which libraries have left may go on after a rank's work
_LEFT_THREADS_SECONDS = 60.0


def run_rank(launcher: int, board: str, attempt: int, evidence: str, function: str, *arguments: object) -> None:
    """One rank's process. function: module:name of what it runs, which returns an exit code.

    launcher: its process. board: where it tells what it does. evidence: a folder for the stacks of its threads.
    """
    # Ctrl-C ends a rank at once and silently, the launcher says the sentence; its fork server has it blocked
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_process(launcher)
    # a thread comes to nothing where another one keeps the interpreter to itself; the fork server ends with the launcher
    set_parent_death_signal()
    rank = int(os.environ["RANK"])
    attach(Path(board), int(os.environ["LOCAL_RANK"]), attempt)
    answer_with_stacks(Path(evidence), rank)
    be_read_by(launcher)
    answer_with_flight_recorder()
    set_activity("starting")
    module, name = function.split(":")
    work: Callable[..., int] = getattr(importlib.import_module(module), name)
    try:
        code = work(*arguments)
    except BaseException as error:
        code = error.exit_code if isinstance(error, DistattnError) else 1
        set_end(code, error)
        traceback.print_exception(error)
    else:
        set_end(code)
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        # where it fails because another has died, that one's end is to be found first
        time.sleep(_AFTER_OTHERS_SECONDS)
        # torchrun knows exceptions and exit codes, not return values
        os._exit(code)
    # once torchrun has let all ranks go, for whom each waits
    Finalize(None, _leave, (_LEFT_THREADS_SECONDS, rank), exitpriority=0)


def end_with_process(pid: int) -> None:
    """Have this process killed as soon as another one, which need not be its parent, has ended in any way."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)

    def follow() -> None:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True, name="distattn-launcher").start()


def _leave(seconds: float, rank: int) -> None:
    """End this process well after some time, whatever threads are left that Python waits for: all that it was for is done."""
    set_activity(LEFT)

    def end() -> None:
        left = [one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
        sys.stderr.write(
            f"rank {rank} is done, but {', '.join(left) or 'its exit'} goes on: not waited for any longer.\n"
        )
        sys.stderr.flush()
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
