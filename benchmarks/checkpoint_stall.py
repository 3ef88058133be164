"""The time that a training step waits for a checkpoint: ours and plain torch.distributed.checkpoint (DCP), sync and async.

    python benchmarks/checkpoint_stall.py [--folder FOLDER] [--megabytes 400] [--tensors 150] [--ranks 1] [--repeats 5]

A loop of steps (matrix products, then an in-place update of every tensor of the state, like an optimizer's) saves its
state once. "stall": seconds that the loop's thread spends in checkpoint calls, on the slowest rank. "save": seconds
from the call until the checkpoint is complete and synchronized with the disk. "steps amid it, more": how much longer
steps take during a save, because the writer uses the same CPU and disk. A contestant whose checkpoint does not load
bitwise equal is not timed.

  ours             save(), which returns when the tensors are copied
  ours, overlap    save(overlap=True), and wait_staged() before the update
  dcp              dcp.save
  dcp async        dcp.async_save
  dcp async, kept  dcp.async_save with a writer that reuses its copies from one save to the next; GPUs only
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from process_guard import guard_processes

from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.retention import KeepRule

# width of a step's matrix products, and the minimum seconds per step
_WIDTH, _STEP_SECONDS = 1024, 0.25


class Timed(NamedTuple):
    """The seconds measured in one loop with a save, and the checkpoint's folder."""

    stall: float
    save: float
    steps: list[float]
    folder: Path


# a function that starts a save: (step, state) -> (a function to call before the update, a function that waits until
# everything is written, the folder)
Begin = Callable[[int, dict], tuple[Callable[[], Any], Callable[[], Any], Path]]


def main() -> int:
    """Run all contestants and print the table. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; by default a temporary one")
    parser.add_argument("--megabytes", type=int, default=400, help="of a rank's state")
    parser.add_argument("--tensors", type=int, default=150)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as store:
        arguments.folder = arguments.folder or Path(store)
        if arguments.ranks == 1:
            _run(0, arguments, store)
            return 0
        ranks = [context.Process(target=_run, args=(rank, arguments, store)) for rank in range(arguments.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


def _run(rank: int, arguments: argparse.Namespace, store: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=arguments.ranks, init_method=f"file://{store}/store")
    state = {"step": 0, "model": _tensors(arguments, rank)}
    saved: dict[str, Any] = {}
    timings: dict[str, list[Timed]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        contestants = {}
        for name, open_one in _CONTESTANTS.items():
            folder = arguments.folder / name.replace(" ", "-").replace(",", "")
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            dist.barrier()
            begin = stack.enter_context(open_one(folder))

            def ready(name: str = name, begin: Begin = begin) -> Timed:
                timed = _loop(state, saved, begin)
                timings[name].append(timed)
                return timed

            contestants[name] = lambda ready=ready: ready

        def check(timed: Timed) -> str:
            timings.clear()
            loaded = {"step": 0, "model": {key: torch.empty_like(value) for key, value in state["model"].items()}}
            dcp.load(loaded, checkpoint_id=timed.folder)
            same = all(torch.equal(loaded["model"][key], value) for key, value in saved.items())
            return "" if same else "loads other tensors than were saved"

        quiet = statistics.median(_step(state) for _ in range(2 * arguments.repeats + 1))
        cells = harness.compare("a save", contestants, check, repeats=arguments.repeats)
    rows = [None] * arguments.ranks
    dist.all_gather_object(rows, {name: timings[name][-arguments.repeats :] for name in timings})
    if rank == 0:
        _print(arguments, cells, rows, quiet)
    dist.destroy_process_group()


def _tensors(arguments: argparse.Namespace, rank: int) -> dict[str, torch.Tensor]:
    """Return tensors that belong to this rank alone. Every fifth tensor is four times as large as the others."""
    generator = torch.Generator().manual_seed(rank)
    shares = [4 if number % 5 == 0 else 1 for number in range(arguments.tensors)]
    unit = arguments.megabytes * 250_000 // sum(shares)
    return {
        f"rank {rank} tensor {number}": torch.rand(share * unit, generator=generator)
        for number, share in enumerate(shares)
    }


def _step(state: dict, before_update: Callable[[], Any] | None = None) -> float:
    """Run matrix products, then an in-place update. Return the seconds taken, except for those spent in `before_update`."""
    began = time.perf_counter()
    a = torch.rand(_WIDTH, _WIDTH)
    while time.perf_counter() - began < _STEP_SECONDS:
        a = torch.mm(a, a).clamp_(-1, 1)
    middle = time.perf_counter()
    if before_update is not None:
        before_update()
    update = time.perf_counter()
    torch._foreach_mul_(list(state["model"].values()), 0.999)
    return middle - began + time.perf_counter() - update


def _loop(state: dict, saved: dict, begin: Begin) -> Timed:
    """Save once, and run steps until the checkpoint is complete."""
    dist.barrier()
    state["step"] += 1
    saved |= {key: value.clone() for key, value in state["model"].items()}
    steps: list[float] = []
    began = time.perf_counter()
    before_update, done, folder = begin(state["step"], state)
    stall = time.perf_counter() - began
    finished: list[float] = []
    waiter = _Waiter(done, finished)
    waiter.start()

    def staged() -> None:
        nonlocal stall
        at = time.perf_counter()
        before_update()
        stall += time.perf_counter() - at

    while not finished:
        steps.append(_step(state, staged))
    waiter.join()
    if waiter.error is not None:
        raise waiter.error
    return Timed(stall, finished[0] - began, steps, folder)


class _Waiter:
    """A thread that waits for a save, and records when it is complete."""

    def __init__(self, done: Callable[[], Any], finished: list[float]):
        self.error: Exception | None = None

        def wait() -> None:
            try:
                done()
            except Exception as error:
                self.error = error
            finished.append(time.perf_counter())

        thread = threading.Thread(target=wait)
        self.start, self.join = thread.start, thread.join


@contextlib.contextmanager
def _ours(folder: Path, overlap: bool = False) -> Iterator[Begin]:
    def warn(line: str) -> None:
        raise AssertionError(line)

    checkpoints = Checkpoints(folder, group=dist.group.WORLD, facts={}, keep=KeepRule(last=1), warn=warn)

    def begin(step: int, state: dict) -> Any:
        checkpoints.save(step, state, overlap=overlap)
        return checkpoints.wait_staged, checkpoints.wait, folder / f"step-{step:08d}"

    yield begin
    checkpoints.close()


@contextlib.contextmanager
def _dcp(folder: Path) -> Iterator[Begin]:
    def begin(step: int, state: dict) -> Any:
        dcp.save(state, checkpoint_id=_fresh(folder, step))
        return _nothing, _nothing, folder / str(step)

    yield begin


@contextlib.contextmanager
def _dcp_async(folder: Path, keep: bool = False) -> Iterator[Begin]:
    if keep and not torch.cuda.is_available():
        yield _unsupported
        return
    writer = dcp.FileSystemWriter(folder, cache_staged_state_dict=True) if keep else None
    group = dist.new_group(backend="gloo")

    def begin(step: int, state: dict) -> Any:
        path = _fresh(folder, step)
        how: dict[str, Any] = {} if writer is None else {"storage_writer": writer}
        future = dcp.async_save(state, checkpoint_id=path, process_group=group, **how)
        return _nothing, future.result, path

    yield begin


def _fresh(folder: Path, step: int) -> Path:
    """Create and return the folder for a step. Delete earlier folders, like a run that keeps only its last checkpoint."""
    if dist.get_rank() == 0:
        for old in folder.glob("*"):
            shutil.rmtree(old)
        (folder / str(step)).mkdir(parents=True)
    return folder / str(step)


def _unsupported(step: int, state: dict) -> Any:
    raise harness.Unsupported("it pins its copies for a GPU")


def _nothing() -> None:
    return


_CONTESTANTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Begin]]] = {
    "ours": _ours,
    "ours, overlap": lambda folder: _ours(folder, overlap=True),
    "dcp": _dcp,
    "dcp async": _dcp_async,
    "dcp async, kept": lambda folder: _dcp_async(folder, keep=True),
}


def _print(arguments: argparse.Namespace, cells: list[harness.Cell], rows: list[Any], quiet: float) -> None:
    sys.stdout.write(
        f"{arguments.megabytes} MB in {arguments.tensors} tensors a rank, {arguments.ranks} ranks; "
        f"a step without a save: {quiet:.3f} s\n"
        f"{'':18s}{'stall':>9s}{'save':>9s}{'stall/save':>12s}{'steps amid it, more':>21s}\n"
    )
    for cell in cells:
        if cell.status != "ok":
            sys.stdout.write(f"{cell.contestant:18s}{cell.status}: {cell.note}\n")
            continue
        runs = list(zip(*(row[cell.contestant] for row in rows), strict=True))
        stall = statistics.median(max(timed.stall for timed in run) for run in runs)
        save = statistics.median(max(timed.save for timed in run) for run in runs)
        amid = [step / quiet - 1 for run in runs for timed in run for step in timed.steps]
        more = f"{statistics.mean(amid):20.1%}" if amid else f"{'none':>20s}"
        sys.stdout.write(f"{cell.contestant:18s}{stall:7.3f} s{save:7.2f} s{stall / save:11.1%}{more}\n")


if __name__ == "__main__":
    guard_processes()
    sys.exit(main())
