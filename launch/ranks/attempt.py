"""Runs and watches one attempt of a run's ranks on this machine, with torchrun's API around a fork server.

Forking a process that has imported torch takes 10 ms, while a fresh import takes seconds. Every attempt has a new rendezvous,
since torch 2.13 keeps the dead ranks' addresses across restarts (pytorch#167288).
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message
from distattn.launch.ranks.entry import run_rank
from distattn.launch.ranks.local import HERE, Node, RanksInterrupted, restore_process_state, torchrun_config
from distattn.launch.ranks.loopback import gloo_on_loopback, own_place
from distattn.launch.ranks.process_title import RUN_VARIABLE
from distattn.launch.stop_signals import STOPPING
from distattn.supervision.culprits import Culprit
from distattn.supervision.heartbeats import HeartbeatBoard
from distattn.supervision.helper_processes import Helper, describe_exit, shell_exit_code
from distattn.supervision.node_links import NodeLinks
from distattn.supervision.node_reports import NodeReports
from distattn.supervision.rank_watch import Patience, RankWatch, Trouble

# modules that every rank needs; if torch._dynamo were not here, each rank would import it with its first optimizer
_PRELOAD = ("distattn.launch.ranks.ends_with_parent", "torch", "torch._dynamo", "distattn.launch.ranks.entry")
# seconds between torchrun's checks. The watch checks more often: it must find the first failed rank before torchrun ends
# the others
_INTERVAL_SECONDS = 0.1


class Ranks(NamedTuple):
    """The ranks on this machine. function: "module:name", called once on each of `size` ranks; returns the exit code.

    run: the run folder, shown in process titles.
    """

    size: int
    function: str
    arguments: Sequence[object]
    patience: Patience
    node: Node = HERE
    run: str = ""


@contextlib.contextmanager
def fork_server(preload: Sequence[str], node: Node = HERE, run: str = "") -> Iterator[None]:
    """Keep the fork server, from which ranks are forked, running for all attempts within the block.

    preload: additional modules to import besides torch. run: see `Ranks`.
    """
    # the server must not have more than one thread when it forks, and BLAS starts its threads on import
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _forget_server_of_parent()
    multiprocessing.set_forkserver_preload([*_PRELOAD, *preload])
    _start_server(node, run)
    try:
        yield
    except BaseException:
        # end the server before this process: it may be about to fork ranks, and no process would wait for them
        _server().kill()
        raise
    finally:
        # a tracker that is stopped (SIGSTOP) would outlive this process
        if (tracker := _tracker()).is_stopped():
            tracker.kill()


def _start_server(node: Node, run: str) -> None:
    """Start the fork server unless it is running. run: see `Ranks`."""
    os.environ[RUN_VARIABLE] = run
    # block signals: Ctrl-C in a terminal also reaches the server while it imports, and Slurm's SIGTERM reaches all processes
    # of a step. Start the tracker first, because starting it unblocks signals.
    _start_tracker()
    blocked = {signal.SIGINT, signal.SIGTERM} if node.keeps_sigterm else {signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        # ranks inherit the server's environment, so set gloo's interface in it
        with gloo_on_loopback() if node.nodes == 1 else contextlib.nullcontext():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        del os.environ[RUN_VARIABLE]


def _start_tracker() -> None:
    """Start the resource tracker unless it is running. A terminal's signals must not end it before this process ends."""
    # it ignores SIGINT and SIGTERM by itself; other signals stay blocked if they are blocked when it starts, so block them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPPING) - {signal.SIGINT, signal.SIGTERM})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _server() -> Helper:
    """Return the fork server. Ranks are its children and end with it."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    return Helper("the fork server", server._forkserver_pid or 0)


def _tracker() -> Helper:
    """Return multiprocessing's resource tracker, which removes semaphores left by dead processes."""
    tracker: Any = resource_tracker._resource_tracker  # type: ignore[attr-defined]

    def replace() -> int:
        # suppress Python's warning about semaphores that may leak
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _start_tracker()
        # register existing semaphores with the new tracker, which would otherwise print a traceback when one is removed
        registry: dict[Any, Any] = util._finalizer_registry  # type: ignore[attr-defined]
        for finalizer in list(registry.values()):
            if getattr(finalizer, "_callback", None) is SemLock._cleanup:  # type: ignore[attr-defined]
                resource_tracker.register(finalizer._args[0], "semaphore")
        return int(tracker._pid)

    return Helper("the resource tracker", tracker._pid, replace)


def run_attempt(ranks: Ranks, number: int, folder: Path, board: HeartbeatBoard) -> tuple[int, Trouble | None]:
    """Run the ranks once. Return the exit code, and the trouble, or None if all ended well.

    number: number of the attempt. folder: folder for evidence, shared by all nodes. board: heartbeat board of this machine's
    ranks. The exit code is that of the rank at fault, 128 + N if it was killed by signal N, or 1 if ranks hang or the code is
    unknown. Raises CommandStopped, or DistattnError if /dev/shm has no room for the ranks' semaphores.
    """
    node, reports, links = ranks.node, None, None
    evidence = folder if node.nodes == 1 else folder / f"node-{node.number}"
    try:
        evidence.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # a full disk must not prevent the run
        print_message(f"{evidence}: cannot be created: {error.strerror}; no evidence of ranks that hang is kept there.")
    if node.nodes > 1:
        if (place := own_place(node.address)) is not None:
            links = NodeLinks(folder, node.number, node.nodes, place)
        reports = NodeReports(folder, node.number, node.nodes, links)
    numbers = range(node.number * ranks.size, (node.number + 1) * ranks.size)
    # start it again if it was killed during the previous attempt
    _start_server(node, ranks.run)
    watch = RankWatch(board, numbers, ranks.patience, evidence, reports, [_server(), _tracker()], print_message)
    rank_arguments = (os.getpid(), str(board.path), number, str(evidence), ranks.function, *ranks.arguments)
    config = torchrun_config(ranks.size, node, "forkserver", _INTERVAL_SECONDS)
    code, trouble = 0, None
    try:
        with restore_process_state(node):
            elastic_launch(config, run_rank)(*rank_arguments)
        # torchrun accepts exit code 0 even if the rank's work is not done
        if (trouble := watch.close()) is not None:
            code, trouble = _ended({}, trouble)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        trouble = watch.close()
        code, trouble = _ended(codes, trouble) if trouble is not None else _silent_end(error)
    except (EOFError, OSError) as error:
        # the fork server ended while ranks were requested from it
        if (trouble := watch.close()) is None:
            raise _named(error) from None
        code = trouble.exit_code
    except RanksInterrupted as interrupted:
        trouble = watch.close()
        if interrupted.stop is not None:
            raise interrupted.stop from None
        # the watch signals this process to end ranks without a heartbeat, whose process ids it does not know
        assert trouble is not None
        code = trouble.exit_code
    finally:
        watch.close()
        if links is not None:
            links.close()
        # remove the empty files of ranks whose stacks were not needed
        with contextlib.suppress(OSError):
            for file in evidence.glob("stacks-*.txt"):
                if not file.stat().st_size:
                    file.unlink()
    return code, trouble


def _named(error: EOFError | OSError) -> Exception:
    """Return an error that names /dev/shm and a remedy if a semaphore could not be created; otherwise `error` itself."""
    if not isinstance(error, OSError) or error.errno != errno.ENOSPC or error.filename:
        return error
    return DistattnError(
        "/dev/shm: has no room for the semaphores of ranks, some 32 bytes each: remove old files there, or make it larger "
        "(docker run --shm-size=8g, on Kubernetes an emptyDir with medium: Memory)."
    )


def _forget_server_of_parent() -> None:
    """Forget the parent's fork server in a forked process, where multiprocessing would wait for it in vain."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid is not None and server._forkserver_pid not in _children():
        # close the descriptor: while it is open, the parent's server outlives the parent
        os.close(server._forkserver_alive_fd)
        server.__init__()


def _children() -> set[int]:
    """Return the ids of this process's children, from /proc."""
    children = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        # ignore processes that have ended since they were listed
        with contextlib.suppress(OSError):
            if file.read_text("utf-8", "replace").rpartition(")")[2].split()[1] == str(os.getpid()):
                children.add(int(file.parent.name))
    return children


def _ended(codes: Mapping[int, int], trouble: Trouble) -> tuple[int, Trouble]:
    """Return an attempt's exit code, and its trouble, including how ranks at fault ended. codes: torchrun's exit codes by rank.

    If the watch found several ranks dead at the same time, the ranks at fault are those that torchrun did not end itself. If
    torchrun only has the code of a rank that the watch ended, the code of the rank at fault is unknown.
    """
    if trouble.kind != "killed" or any(culprit.helper for culprit in trouble.culprits):
        return trouble.exit_code, trouble
    first = [culprit for culprit in trouble.culprits if culprit.rank in codes]
    named = tuple(culprit._replace(how=_how_it_died(codes[culprit.rank])) for culprit in first)
    code = shell_exit_code(codes[first[0].rank] if first else trouble.exit_code)
    return code, replace(trouble, culprits=named or trouble.culprits)


def _how_it_died(code: int) -> str:
    return describe_exit(code) + (" without giving a reason" if code >= 0 else "")


def _silent_end(error: ChildFailedError) -> tuple[int, Trouble]:
    """Return the exit code and the trouble of an attempt without any heartbeat. The rank that ended first is blamed."""
    rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
    culprits = (Culprit(rank, f"{describe_exit(failure.exitcode)} before its first heartbeat"),)
    code = shell_exit_code(failure.exitcode)
    return code, Trouble(culprits, "killed" if failure.exitcode < 0 else "raised", 0, 0.0, code)
