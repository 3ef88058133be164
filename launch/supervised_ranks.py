"""Ranks of one machine that are watched, and started again where one was killed or hangs: torchrun's API around a fork server.

A fork of a process that has imported torch takes a hundredth of a second, a fresh import seconds. Every attempt has a rendezvous
of its own, since torch 2.13 keeps the dead ranks' addresses over restarts (pytorch#167288).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from distattn.ir.errors import LostRankError
from distattn.launch.attempts import Attempts
from distattn.launch.local import as_found, say, stopped_by, torchrun_config
from distattn.launch.loopback import gloo_on_loopback
from distattn.launch.rank_entry import run_rank
from distattn.supervision.culprits import Culprit
from distattn.supervision.heartbeats import HeartbeatBoard
from distattn.supervision.rank_watch import Patience, RankWatch, Trouble

# what a rank imports sooner or later; torch._dynamo is what the first optimizer imports
_PRELOAD = ("torch", "torch._dynamo", "distattn.launch.rank_entry")

# torchrun would end the others where one has failed, and then nobody could tell who was first: the watch looks more often
_INTERVAL_SECONDS = 0.25


@dataclass(frozen=True)
class Restarts:
    """How often ranks are started again without having come further. progress: how far the run has come, as a number."""

    limit: int
    progress: Callable[[], int]


def run_supervised(
    ranks: int,
    function: str,
    arguments: Sequence[object],
    *,
    attempts: Attempts,
    restarts: Restarts,
    patience: Patience,
    preload: Sequence[str] = (),
) -> int:
    """Run a function once per rank in processes of their own, again where one is killed or hangs. Returns the exit code.

    function: module:name, which returns an exit code. preload: modules that are imported once for all ranks. Ranks that are
    killed or hang are started again, and those that raise an error, unless no step was done before it, or the same was raised
    before; those that refuse to go on are not. Ranks end when this process ends.

    Returns 0 when all ranks end well, else the exit code of the one to blame, 128 + the signal that killed it or stopped this
    process, or 1 where ranks hang.
    """
    attempts.end_open("ended with its launcher, before anybody could tell why")
    server = _start_fork_server(preload)
    without_progress, furthest, before = 0, restarts.progress(), ""
    while True:
        try:
            code, trouble = _run_once(ranks, function, arguments, attempts, patience)
        except BaseException:
            _end_fork_server(server)
            raise
        if trouble is None:
            if code:
                _end_fork_server(server)
            return code
        now = restarts.progress()
        without_progress, furthest = (1, now) if now > furthest else (without_progress + 1, furthest)
        if not _may_go_better(trouble, code, before) or without_progress > restarts.limit:
            blamed = ", ".join(f"rank {one.rank}" for one in trouble.culprits)
            # who refuses has said so
            how = f"{blamed} ended with exit code {code}" if trouble.kind == "refused" else str(trouble)
            say(f"{how}; the other ranks were stopped.")
            return code
        before = str(trouble)
        count = f"restart {without_progress} of {restarts.limit} until the run comes further"
        say(f"{trouble}; all ranks start again from step {now:,} ({count}).")


def _may_go_better(trouble: Trouble, code: int, before: str) -> bool:
    """Whether another attempt makes sense. before: what went wrong in the last one."""
    if trouble.kind == "raised":
        return trouble.steps > 0 and str(trouble) != before
    return trouble.kind != "refused" or code == LostRankError.exit_code


def _start_fork_server(preload: Sequence[str]) -> list[int]:
    """Returns its process's number, in a list; an empty one where there was a server before."""
    # a process with more than one thread must not fork: BLAS starts its threads when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload([*_PRELOAD, *preload])
    # Ctrl-C in a terminal reaches it, too, while it imports; the tracker comes first, whose start lets signals through again
    resource_tracker.ensure_running()
    children = _children()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        # ranks have its environment
        with gloo_on_loopback():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return sorted(_children() - children)


def _children() -> set[int]:
    """Processes of this one, as Linux has them."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        # others end meanwhile
        with contextlib.suppress(OSError):
            if file.read_text("utf-8", "replace").rpartition(")")[2].split()[1] == str(os.getpid()):
                found.add(int(file.parent.name))
    return found


def _end_fork_server(server: Sequence[int]) -> None:
    """End it before this process: it may be about to make ranks that nobody waits for any more."""
    for pid in server:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _run_once(
    ranks: int, function: str, arguments: Sequence[object], attempts: Attempts, patience: Patience
) -> tuple[int, Trouble | None]:
    """The exit code, and what went wrong with a rank; None also where this process was stopped."""
    board = HeartbeatBoard.make(ranks)
    number = attempts.begin(host=socket.gethostname(), launcher=os.getpid(), board=str(board.path))
    folder = attempts.folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    watch = RankWatch(board, ranks, patience, folder)
    given = (os.getpid(), str(board.path), number, str(folder), function, *arguments)
    trouble = None
    try:
        with as_found():
            elastic_launch(torchrun_config(ranks, start_method="forkserver", interval=_INTERVAL_SECONDS), run_rank)(
                *given
            )
        code = 0
    except ChildFailedError as error:
        trouble = watch.close() or _silent_end(error)
        code = _exit_code(error, trouble)
        if trouble.kind == "killed" and code > 128:
            how = f"was killed by {signal.Signals(code - 128).name}"
            trouble = replace(trouble, culprits=tuple(one._replace(how=how) for one in trouble.culprits))
    except SignalException as stop:
        code = stopped_by(stop)
    finally:
        watch.close()
    # of stacks that nobody asked for
    for file in folder.glob("stacks-*.txt"):
        if not file.stat().st_size:
            file.unlink()
    if trouble is None:
        attempts.end(number, code, "ended well" if code == 0 else f"stopped by {signal.Signals(code - 128).name}")
    else:
        facts = {"ranks": [one.rank for one in trouble.culprits], "kind": trouble.kind, "steps": trouble.steps}
        attempts.end(number, code, str(trouble), **facts, noticed_seconds=round(trouble.seconds, 3))
    # once nobody looks for it any more
    board.close()
    return code, trouble


def _silent_end(error: ChildFailedError) -> Trouble:
    """Of ranks that told nothing, that which ended first."""
    rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
    if failure.exitcode < 0:
        return Trouble((Culprit(rank, "was killed before it told anything"),), "killed", 0, 0.0)
    how = f"ended with exit code {failure.exitcode} before it told anything"
    return Trouble((Culprit(rank, how),), "raised", 0, 0.0, failure.exitcode)


def _exit_code(error: ChildFailedError, trouble: Trouble) -> int:
    """Of the ranks that are to blame; all others were killed after them."""
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    if trouble.kind != "killed":
        return trouble.exit_code
    blamed = [codes[one.rank] for one in trouble.culprits if one.rank in codes]
    code = (blamed or list(codes.values()))[0]
    return code if code > 0 else 128 - code
