"""Contestants side by side in one run: a correctness gate, warm-up, interleaved timing, medians and spread.

A contestant with wrong results is not timed. A case that it does not support, or in which it fails, is still a cell of
the table. In a process group all ranks must call these functions, and times are those of the slowest rank.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# in order of severity: a cell has the worst status of any rank
STATUSES = ("ok", "unsupported", "wrong", "out of memory", "error")


class Unsupported(Exception):
    """Raised by a contestant that does not support a case. The message says why."""


@dataclass
class Cell:
    """The result of one contestant in one case. seconds: the time of every repeat. facts: other measured values, keyed
    by name."""

    case: str
    contestant: str
    status: str = "ok"
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Half the difference between the slowest and the fastest repeat, divided by the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median if self.seconds else None


# a function that returns the function to time; called once per contestant and case
Contestant = Callable[[], Callable[[], Any]]


def compare(
    case: str,
    contestants: Mapping[str, Contestant],
    check: Callable[[Any], str],
    *,
    repeats: int = 5,
    warmup: int = 1,
    count: Callable[[], Mapping[str, int]] = dict,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Cell]:
    """Run all contestants of one case and return their cells. check: a function that returns what is wrong with a
    result, or "".

    count: a function that returns running totals, such as bytes sent. What one call adds to them becomes part of a
    cell's facts, as does the attribute `facts` of a contestant's function.
    """
    cells = {name: Cell(case, name) for name in contestants}
    ready: dict[str, Callable[[], Any]] = {}
    for name, make in contestants.items():
        progress(f"{case}: {name}: check")
        _guarded(cells[name], lambda name=name, make=make: ready.__setitem__(name, make()))
        # the first call checks correctness, so it is never left out
        for _ in range(max(warmup, 1)):
            _guarded(cells[name], lambda name=name: _judge(cells[name], check, ready[name]()))
        if cells[name].status == "ok":
            before = count()
            _guarded(cells[name], ready[name])
            cells[name].facts |= {key: value - before[key] for key, value in count().items()}
            cells[name].facts |= getattr(ready[name], "facts", {})
    for repeat in range(repeats):
        # start with a different contestant each time
        order = list(contestants)[repeat % len(contestants) :] + list(contestants)[: repeat % len(contestants)]
        for name in order:
            if cells[name].status == "ok":
                progress(f"{case}: {name}: {repeat + 1} of {repeats}")
                _guarded(cells[name], lambda name=name: cells[name].seconds.append(_timed(ready[name])))
    return list(cells.values())


def environment() -> dict[str, Any]:
    """Return the versions, machine, commit and command of this run, for the record."""
    versions = {}
    for name in ("torch", "numpy", "triton", "deepspeed", "transformers", "nvidia-resiliency-ext", "torchft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": versions,
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str:
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def write(path: Path, cells: Sequence[Cell], **more: Any) -> None:
    """Append one JSON line per cell, each with the environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for cell in cells:
            row = asdict(cell) | {"median": cell.median, "spread": cell.spread} | more | environment()
            file.write(json.dumps(row) + "\n")


def table(cells: Sequence[Cell], facts: Mapping[str, Callable[[Any], str]] | None = None) -> str:
    """Format the cells as a text table. The fastest cell of each case is marked. A cell without times says why.

    facts: how to format additional columns, keyed by the name of the fact.
    """
    facts = facts or {}
    width = max(len(cell.contestant) for cell in cells)
    lines = []
    for case in dict.fromkeys(cell.case for cell in cells):
        here = [cell for cell in cells if cell.case == case]
        fastest = min((cell.median for cell in here if cell.median), default=None)
        lines += [
            "",
            case,
            f"{'':{width + 2}s}{'median':>10s} {'spread':>7s}" + "".join(f"{name:>14s}" for name in facts),
        ]
        for cell in here:
            if cell.status != "ok":
                lines.append(f"  {cell.contestant:{width}s} {cell.status}: {cell.note}")
                continue
            shown = "".join(f"{show(cell.facts[name]):>14s}" for name, show in facts.items())
            mark = "   <- fastest" if cell.median == fastest else f"   {cell.median / fastest:.2f}x"
            lines.append(f"  {cell.contestant:{width}s}{cell.median * 1e3:7.1f} ms {cell.spread:6.0%} {shown}{mark}")
    return "\n".join(lines)


def joined() -> tuple[int, int, torch.device]:
    """Join the launcher's process group, using NCCL if there are GPUs and gloo otherwise. Return (this rank, number of
    ranks, its device)."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def slowest(value: float) -> float:
    """Return the maximum of `value` over all ranks, on every rank."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    number = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return float(number)


def _judge(cell: Cell, check: Callable[[Any], str], result: Any) -> None:
    if why := check(result):
        cell.status, cell.note = "wrong", why


def _guarded(cell: Cell, work: Callable[[], Any]) -> None:
    """Run a contestant's work unless it has failed before. Give its cell the same status on all ranks."""
    if cell.status != "ok":
        return
    try:
        work()
    except Unsupported as error:
        cell.status, cell.note = "unsupported", str(error)
    except torch.OutOfMemoryError as error:
        cell.status, cell.note = "out of memory", str(error).splitlines()[0]
    except Exception as error:
        cell.status, cell.note = (
            "error",
            f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}",
        )
    worst = STATUSES[int(slowest(STATUSES.index(cell.status)))]
    if worst != "ok" and dist.is_initialized():
        cell.status, cell.note = worst, _named(cell, worst)


def _named(cell: Cell, worst: str) -> str:
    """Return the notes of the ranks with the worst status, prefixed with their ranks unless all notes are the same."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (cell.status, cell.note))
    if len(set(outcomes)) == 1:
        return cell.note
    return "; ".join(f"rank {rank}: {note}" for rank, (status, note) in enumerate(outcomes) if status == worst)


def _timed(work: Callable[[], Any]) -> float:
    """Return the seconds of one call, from a common start to the end on the slowest rank.

    If `work` has an attribute `calls`, it makes that many calls, and the time is divided by their number.
    """
    if dist.is_initialized():
        dist.barrier()
    _finish()
    began = time.perf_counter()
    work()
    _finish()
    return slowest(time.perf_counter() - began) / getattr(work, "calls", 1)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
