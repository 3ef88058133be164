"""Run the ranks of one machine under a watch, and restart them if one was killed or hangs."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distattn.checkpoints.folder_handle import FolderHandle
from distattn.checkpoints.owner import writer_name
from distattn.ir.errors import LostRankError
from distattn.ir.text_format import print_message
from distattn.launch.attempt_end import RepeatedFailures
from distattn.launch.attempts import Attempts
from distattn.launch.ranks.attempt import Ranks, fork_server, run_attempt
from distattn.launch.stop_signals import CommandStopped, stop_on_signals
from distattn.supervision.heartbeats import HeartbeatBoard
from distattn.supervision.rank_watch import Trouble


@dataclass(frozen=True)
class Restarts:
    """The conditions under which ranks are restarted. limit: maximum number of consecutive restarts without progress.

    progress: returns the run's progress as a number. folder: the run folder; ranks are restarted only if it is still there.
    """

    limit: int
    progress: Callable[[], int]
    folder: FolderHandle | None = None


def run_supervised(ranks: Ranks, attempts: Attempts, restarts: Restarts, preload: Sequence[str] = ()) -> int:
    """Run ranks, and restart all of them if one is killed, hangs or raises an error. Ranks end when this process ends.

    They are not restarted if a rank refuses to continue, or raises an error before the first step or the same error as
    before. preload: modules that all ranks import. Returns 0 if all ranks end well, otherwise the exit code of
    `run_attempt`. Raises CommandStopped if this process is stopped.
    """
    attempts.end_open("ended with its launcher, before the cause was known")
    with stop_on_signals(), fork_server(preload, run=ranks.run):
        return _run_until_done(ranks, attempts, restarts)


def _run_until_done(ranks: Ranks, attempts: Attempts, restarts: Restarts) -> int:
    without_progress, furthest = 0, restarts.progress()
    before: Trouble | None = None
    failures = RepeatedFailures()
    while True:
        code, trouble = _run_once(ranks, attempts)
        if trouble is None:
            return code
        if restarts.folder is not None and trouble.kind != "refused":
            restarts.folder.check()
        failures.add(culprit.name for culprit in trouble.culprits)
        now = restarts.progress()
        without_progress, furthest = (1, now) if now > furthest else (without_progress + 1, furthest)
        repeated = without_progress > 1 and trouble.repeats(before)
        if trouble.kind == "refused" and restarts.folder is not None and not restarts.folder.is_in_place():
            # a rank has already reported that the run's folder is gone
            return code
        if not _may_go_better(trouble, code, repeated) or without_progress > restarts.limit:
            names = ", ".join(culprit.name for culprit in trouble.culprits)
            # a rank that refuses has printed its reason
            how = f"{names} ended with exit code {code}" if trouble.kind == "refused" else str(trouble)
            print_message(f"{how}; the other ranks were stopped.")
            if failures.culprit is not None and trouble.kind != "refused":
                same, host = f"{failures.culprit} failed {failures.count} times in a row", socket.gethostname()
                print_message(f"{same} on {host}: if its memory or a device is the cause, leave {host} out.")
            return code
        before = trouble
        count = f"restart {without_progress} of {restarts.limit} since the last progress"
        print_message(f"{trouble}; all ranks start again on {socket.gethostname()} from step {now:,} ({count}).")


def _may_go_better(trouble: Trouble, code: int, repeated: bool) -> bool:
    """Return whether a new attempt may succeed. repeated: True if this is the same failure again, without progress."""
    if trouble.kind == "raised":
        return trouble.steps > 0 and not repeated
    return trouble.kind != "refused" or code == LostRankError.exit_code


def _run_once(ranks: Ranks, attempts: Attempts) -> tuple[int, Trouble | None]:
    board = HeartbeatBoard.make(ranks.size)
    facts = {"host": socket.gethostname(), "launcher": os.getpid(), "process": writer_name(), "board": str(board.path)}
    number = attempts.begin(**facts)
    # close the board only after the end of the attempt is recorded, when no process looks for it any more
    with contextlib.closing(board):
        try:
            code, trouble = run_attempt(ranks, number, attempts.folder(number), board)
        except CommandStopped as stop:
            attempts.end(number, stop.exit_code, f"stopped by {stop.signal.name}", stopped=True)
            raise
        attempts.end(number, code, str(trouble or "ended well"), **(trouble.facts() if trouble else {}))
    return code, trouble
