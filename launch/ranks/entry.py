"""The entry point of a rank in a forked process. The rank ends with its launcher, and reports its activity by heartbeats."""

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
from distattn.supervision.evidence import allow_stack_reads, answer_with_stacks
from distattn.supervision.flight_recorder import answer_with_flight_recorder
from distattn.supervision.heartbeats import attach, set_activity, set_end, set_left

_AFTER_OTHERS_SECONDS = 0.5
# seconds that library threads may continue after a rank's work is done
_LEFT_THREADS_SECONDS = 60.0


def run_rank(launcher: int, board: str, attempt: int, evidence: str, function: str, *arguments: object) -> None:
    """Run one rank in this process. function: "module:name" of the function to call, which returns an exit code.

    launcher: the launcher's process id. board: path of the heartbeat board. evidence: folder for the stacks of this rank's
    threads.
    """
    # Ctrl-C ends a rank immediately and silently, since the launcher prints the message; the fork server has blocked the
    # signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_process(launcher)
    # end_with_process has a thread, which may not get the GIL: also end with the fork server, which ends with the launcher
    set_parent_death_signal()
    rank = int(os.environ["RANK"])
    attach(Path(board), int(os.environ["LOCAL_RANK"]), attempt)
    answer_with_stacks(Path(evidence), rank)
    allow_stack_reads(launcher)
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
        # if this rank fails because another rank died, the launcher must notice that rank's end first
        time.sleep(_AFTER_OTHERS_SECONDS)
        # torchrun sees exceptions and exit codes, but not return values
        os._exit(code)
    # runs at exit, after torchrun has released all ranks, which wait for each other
    Finalize(None, _leave, (_LEFT_THREADS_SECONDS, rank), exitpriority=0)


def end_with_process(pid: int) -> None:
    """Kill this process as soon as process `pid`, which need not be its parent, has ended in any way."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)

    def follow() -> None:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True, name="distattn-launcher").start()


def _leave(seconds: float, rank: int) -> None:
    """End this process, whose work is done, with exit code 0 after `seconds`, even if Python still waits for threads."""
    set_left()

    def end() -> None:
        main = threading.main_thread()
        left = [thread.name for thread in threading.enumerate() if not thread.daemon and thread is not main]
        sys.stderr.write(
            f"rank {rank} is done and no longer waits for {', '.join(left) or 'its exit'}, which has not ended.\n"
        )
        sys.stderr.flush()
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
