"""Real ranks for tests, as forked processes on gloo. A fork after `import torch` takes 0.1 s, a fresh process 4 s."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ports import free_ports

# shorter than the limit for a hung rank, so that the group reports a message that never arrives
_GROUP_TIMEOUT = timedelta(seconds=120)
_SECONDS = 300
_MUCH_MEMORY = 1 << 30
_TELL_STACKS = signal.SIGUSR1
# native threads of libraries' thread pools
_POOLS: set[int | None] = set()


def run_on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `work(rank, *arguments)` on every rank of a gloo group. Return the results in the order of ranks. A failure
    includes the rank's traceback.
    """
    context = _fork_context()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, folder, work, arguments)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_SECONDS)
        hung = _hung(dict(enumerate(processes)), folder)
        for process in processes:
            process.kill()
        outcomes = [
            torch.load(file) if (file := Path(folder, f"{r}.pt")).exists() else ("lost", None) for r in range(ranks)
        ]
    failures = [f"rank {rank}: {value}" for rank, (state, value) in enumerate(outcomes) if state != "done"]
    assert not hung and not failures, hung + "\n".join(failures)
    return [value for _, value in outcomes]


def run_survivors(
    ranks: int, lost: int, work: Callable[..., Any], *arguments: Any, rank_0_holds_store: bool = False
) -> dict[int, Any]:
    """Run `work(rank, *arguments)` on every rank and do not wait for rank `lost`. Return the others' results, keyed by
    rank.

    The store is held by a separate process, as torchrun's agent does, or by rank 0. It is not a file, because a rank
    that is stopped while it holds the file's lock would block all others.
    """
    context = _fork_context()
    with tempfile.TemporaryDirectory() as folder:
        port, holder = context.SimpleQueue(), None
        if rank_0_holds_store:
            port.put(free_ports(1)[0])
        else:
            holder = context.Process(target=_hold_store, args=(port,))
            holder.start()
        store = ("rank 0" if holder is None else "launcher", port.get())
        rank_arguments = [(rank, ranks, folder, work, arguments, store) for rank in range(ranks)]
        processes = [context.Process(target=_rank, args=arguments_) for arguments_ in rank_arguments]
        for process in processes:
            process.start()
        survivors = [rank for rank in range(ranks) if rank != lost]
        for rank in survivors:
            processes[rank].join(_SECONDS)
        hung = _hung({rank: processes[rank] for rank in survivors}, folder)
        for process in [*processes, *([holder] if holder else [])]:
            process.kill()
        assert not hung, hung
        outcomes = {rank: torch.load(Path(folder, f"{rank}.pt")) for rank in survivors}
    failures = [f"rank {rank}: {value}" for rank, (state, value) in outcomes.items() if state != "done"]
    assert not failures, "\n".join(failures)
    return {rank: value for rank, (_, value) in outcomes.items()}


def run_script_on_ranks(ranks: int, script: Path, *arguments: str, before: str | None = None) -> list[str]:
    """Return what a script prints on each rank, with ranks started as by torchrun. before: a module to import first."""
    context = _fork_context()
    with tempfile.TemporaryDirectory() as folder:
        (port,) = free_ports(1)
        rank_arguments = [(rank, ranks, port, Path(folder), script, arguments, before) for rank in range(ranks)]
        processes = [context.Process(target=_script, args=arguments_) for arguments_ in rank_arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_SECONDS)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        outputs = [Path(folder, f"{rank}.txt").read_text() for rank in range(ranks)]
    assert codes == [0] * ranks, f"exit codes {codes}\n" + "\n".join(outputs)
    return outputs


def _script(
    rank: int, ranks: int, port: int, folder: Path, script: Path, arguments: tuple[str, ...], before: str | None
) -> None:
    # for the reasons given in `_rank`
    gc.freeze()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
    output = os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w", buffering=1) for _ in range(2))
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    if before is not None:
        importlib.import_module(before)
    runpy.run_path(str(script), run_name="__main__")
    # no rank may leave while others still communicate
    if dist.is_initialized():
        dist.barrier()


def sum_gradients(model: torch.nn.Module) -> None:
    """Sum gradients over the default group, as the simplest trainer does."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def _give_back_memory() -> None:
    """Return freed memory to the system. Otherwise the process would keep it (10 GB in one run), and every fork would
    copy its page tables.
    """
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > _MUCH_MEMORY:
        # malloc_trim exists only in glibc
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def _fork_context() -> Any:
    """Wait until no thread is ending or computing, then return the fork context. A child would wait forever for a lock
    held by such a thread.

    A thread that has multiplied matrices holds a lock of MKL's while it ends, even after Python's `join` has returned.
    In a child forked at that moment nothing releases the lock, and its first product spins forever. A planning thread
    left behind by an earlier test holds the locks of modules that NumPy imports lazily.
    """
    _give_back_memory()
    began = time.monotonic()
    while ending := _native_threads() - {thread.native_id for thread in threading.enumerate()} - _POOLS:
        if time.monotonic() > began + 1:
            # threads of a library's pool stay alive and sleep. On a busy machine, a thread that waits for a core counts
            # as running
            _POOLS.update(ending if time.monotonic() > began + 30 else filter(_sleeps, ending))
        time.sleep(0.001)
    ends = time.monotonic() + 60
    while _others_compute() and time.monotonic() < ends:
        pass
    return multiprocessing.get_context("fork")


def _others_compute() -> bool:
    """Return whether another Python thread uses more CPU time than polling would."""
    others = {thread.native_id for thread in threading.enumerate()} - {threading.get_native_id()}
    before = {thread: _nanoseconds(thread) for thread in others}
    time.sleep(0.02 if others else 0)
    return any(_nanoseconds(thread) - then > 500_000 for thread, then in before.items())


def _nanoseconds(thread: int | None) -> int:
    """Return the CPU time that a thread has used, in nanoseconds, or 0 if the thread has ended."""
    try:
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _sleeps(thread: int | None) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[0] == "S"
    return False


def _native_threads() -> set[int | None]:
    return {int(number) for number in os.listdir("/proc/self/task")}


def _hung(processes: dict[int, Any], folder: str) -> str:
    """Return the stack of each rank that is still running, or an empty string if all have ended."""
    alive = {rank: process for rank, process in processes.items() if process.is_alive()}
    for process in alive.values():
        os.kill(process.pid, _TELL_STACKS)
    if alive:
        time.sleep(2)
    return "".join(f"rank {rank} hangs:\n{Path(folder, f'{rank}.stacks').read_text()}\n" for rank in alive)


def _hold_store(port: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.put(store.port)
    threading.Event().wait()


def _rank(
    rank: int,
    ranks: int,
    folder: str,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    store: tuple[str, int] | None = None,
) -> None:
    """Run `work` on one rank.

    store: (holder, port) in runs that lose a rank. In such runs the ranks do not wait for each other at the end.
    """
    faulthandler.register(_TELL_STACKS, os.open(Path(folder, f"{rank}.stacks"), os.O_CREAT | os.O_WRONLY))
    # a garbage collection would otherwise copy the memory of the parent's objects
    gc.freeze()
    # set this before anything is computed, because a forked child must not use the parent's thread pool
    torch.set_num_threads(1)
    together = store is None
    how: dict[str, Any] = {"init_method": f"file://{folder}/store"}
    if store is not None:
        holder, port = store
        how = {"init_method": f"tcp://127.0.0.1:{port}"}
        if holder == "launcher":
            how = {"store": dist.TCPStore("127.0.0.1", port, is_master=False)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=_GROUP_TIMEOUT, **how)
    try:
        outcome = ("done", work(rank, *arguments))
    except BaseException:
        outcome = ("failed", traceback.format_exc())
    torch.save(outcome, Path(folder, f"{rank}.tmp"))
    Path(folder, f"{rank}.tmp").rename(Path(folder, f"{rank}.pt"))
    # no rank may leave while others still communicate
    if not together:
        # end immediately, as a failing process does
        os._exit(0)
    if outcome[0] == "done":
        dist.barrier()
        dist.destroy_process_group()
