"""Real ranks for tests: forked processes on gloo. A fork after `import torch` takes 0.1 s, a fresh process 4 s."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SECONDS = 120


def run_on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(rank, *arguments)` on every rank of a gloo group; their results by rank. A failure carries its traceback."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, folder, work, arguments)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_SECONDS)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        outcomes = [
            torch.load(file) if (file := Path(folder, f"{r}.pt")).exists() else ("lost", None) for r in range(ranks)
        ]
    failures = [f"rank {rank}: {value}" for rank, (state, value) in enumerate(outcomes) if state != "done"]
    assert not hung and not failures, f"hung ranks: {hung}\n" + "\n".join(failures)
    return [value for _, value in outcomes]


def sum_gradients(model: torch.nn.Module) -> None:
    """Over the ranks of the default group, as the simplest of trainers does."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def _rank(rank: int, ranks: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # first of all: a forked child must not use the parent's thread pool
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=_SECONDS))
    try:
        outcome = ("done", work(rank, *arguments))
    except BaseException:
        outcome = ("failed", traceback.format_exc())
    torch.save(outcome, Path(folder, f"{rank}.tmp"))
    Path(folder, f"{rank}.tmp").rename(Path(folder, f"{rank}.pt"))
    # nobody leaves while others still talk
    if outcome[0] == "done":
        dist.barrier()
        dist.destroy_process_group()
