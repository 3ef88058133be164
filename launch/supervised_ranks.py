"""Ranks of one machine that are watched, and started again where one was killed or hangs: torchrun's API around a fork server.

A fork of a process that has imported torch takes a hundredth of a second, a fresh import seconds. Every attempt has a rendezvous
of its own, since torch 2.13 keeps the dead ranks' addresses over restarts (pytorch#167288).
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distattn.launch.rank_entry import run_rank
from distattn.supervision.heartbeats import HeartbeatBoard
from distattn.supervision.rank_watch import Patience, RankWatch, Trouble

# what a rank imports sooner or later; torch._dynamo is what the first optimizer imports
_PRELOAD = ("torch", "torch._dynamo", "distattn.launch.rank_entry")


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
    attempts: Path,
    restarts: Restarts,
    patience: Patience,
    preload: Sequence[str] = (),
) -> int:
    """Run a function once per rank in processes of their own, again where one is killed or hangs. Returns the exit code.

    function: module:name, which returns an exit code; ranks that say themselves why they end are not started again. attempts: a
    folder that gets one for each attempt, with what is known of ranks that hung, and a line in attempts.jsonl. preload: modules
    that are imported once for all ranks. Ranks end when this process ends.

    Returns 0 when all ranks end well, else the exit code of the one to blame, 128 + the signal that killed it or stopped this
    process, or 1 where ranks hang.
    """
    # a process with more than one thread must not fork: BLAS starts its threads when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload([*_PRELOAD, *preload])
    without_progress, furthest = 0, restarts.progress()
    while True:
        number = _next_number(attempts)
        attempt = _Attempt(ranks, function, tuple(arguments), attempts / f"{number:03d}", number, patience)
        code, trouble = attempt.run()
        _append(attempts / "attempts.jsonl", attempt.facts(code, trouble))
        if trouble is None:
            return code
        now = restarts.progress()
        without_progress, furthest = (1, now) if now > furthest else (without_progress + 1, furthest)
        if code < 128 and not trouble.hung or without_progress > restarts.limit:
            _say(f"{trouble}; the other ranks were stopped.")
            return code
        count = f"restart {without_progress} of {restarts.limit} until the run comes further"
        _say(f"{trouble}; all ranks start again from step {now:,} ({count}).")


class _Attempt:
    def __init__(
        self, ranks: int, function: str, arguments: tuple[object, ...], folder: Path, number: int, patience: Patience
    ):
        self._ranks, self._function, self._arguments = ranks, function, arguments
        self._folder, self._number, self._patience = folder, number, patience
        self._began = time.time()

    def run(self) -> tuple[int, Trouble | None]:
        """The exit code, and what went wrong with a rank; None also where this process was stopped."""
        self._folder.mkdir(parents=True, exist_ok=True)
        board = HeartbeatBoard.make(self._ranks)
        watch = RankWatch(board, self._ranks, self._patience, self._folder)
        given = (os.getpid(), str(board.path), self._number, str(self._folder), self._function, *self._arguments)
        # what torchrun logs of failures and signals is said in a sentence, and by the rank itself
        logging.disable(logging.CRITICAL)
        handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            elastic_launch(self._config(), run_rank)(*given)
        except ChildFailedError as error:
            trouble = watch.close()
            return _exit_code(error, trouble), trouble
        except SignalException as stop:
            _say(f"stopped by {signal.Signals(stop.sigval).name}; what was done is in the run folder.")
            return 128 + stop.sigval, None
        finally:
            watch.close()
            board.close()
            logging.disable(logging.NOTSET)
            # torchrun leaves its own behind
            for name, handler in handlers.items():
                signal.signal(name, handler)
            with contextlib.suppress(OSError):
                # files of stacks that nobody asked for, and a folder that has nothing else
                for file in self._folder.glob("stacks-*.txt"):
                    if not file.stat().st_size:
                        file.unlink()
                self._folder.rmdir()
        return 0, None

    def facts(self, code: int, trouble: Trouble | None) -> dict[str, object]:
        """The line of this attempt."""
        found: dict[str, object] = {
            "attempt": self._number,
            "began": self._began,
            "ended": time.time(),
            "exit_code": code,
        }
        if trouble is not None:
            found |= {"ranks": [one.rank for one in trouble.culprits], "why": str(trouble), "hung": trouble.hung}
            found |= {"step": trouble.step, "noticed_seconds": round(trouble.seconds, 3)}
        return found

    def _config(self) -> LaunchConfig:
        return LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            # a machine's own host name need not resolve
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.05,
            start_method="forkserver",
        )


def _exit_code(error: ChildFailedError, trouble: Trouble | None) -> int:
    """Of the ranks that are to blame; all others were killed after them."""
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    if trouble is not None and trouble.hung:
        return 1
    blamed = [codes[one.rank] for one in trouble.culprits if one.rank in codes] if trouble else []
    code = (blamed or list(codes.values()))[0]
    return code if code > 0 else 128 - code


def _next_number(attempts: Path) -> int:
    attempts.mkdir(parents=True, exist_ok=True)
    file = attempts / "attempts.jsonl"
    return 1 + (len(file.read_text("utf-8").splitlines()) if file.exists() else 0)


def _append(file: Path, facts: dict[str, object]) -> None:
    # a full disk must not keep a run from going on
    with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as opened:
        opened.write(json.dumps(facts) + "\n")


def _say(text: str) -> None:
    sys.stderr.write(f"distattn: {text}\n")
    sys.stderr.flush()
