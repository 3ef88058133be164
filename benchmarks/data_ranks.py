"""Opening large plans and corpora and seeking in them, and many ranks reading one file: does a rank have to wait?

    python benchmarks/data_ranks.py [--open-documents 1000000 100000000] [--processes 8 32] [--ranks 512] [--step-seconds 5]

"open", measured: for a corpus of this many short documents (1 to 7 8-bit ids) and its plan, the times to open the
corpus, to open the plan, to read the record of a step in the middle, and to make a loader and read a rank's first
tokens. Each of 9 fresh processes does all of this once. Files are in the page cache.

"read", measured: --processes processes, each a rank of CP 8 with its own loader, read their parts of the same steps
from one file in the page cache. They start each step together. The time is what a rank needs for its part (token ids
and labels of its micro-batches): median and maximum over all ranks and steps, as wall-clock time and as CPU time.

Simulated from that: --ranks ranks with CP 8 each read their part of the next step while the current step computes. All of
them ask at the same moment. The cores of one machine (--cores) serve them in turn, each for the CPU time measured for a
part, or for the time its bytes take at the measured bandwidth of copying from the page cache with all processes together,
whichever is longer. A rank waits if its part does not arrive before the step ends.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# import it before anything is timed: otherwise NumPy would import it at the first np.unique
import numpy.ma  # noqa: F401
from data_loading import print_line, write_corpus
from process_guard import guard_processes

from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFileWriter
from distattn.data.loader import PackLoader
from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_plan import PackPlan
from distattn.data.packing.pack_rule import PackRule
from distattn.ir.layout import Layout

CP = 8
PART = 1 << 22
COPIED_BYTES = 1 << 18


class Read(NamedTuple):
    """One rank's reading in one step: wall-clock seconds, CPU seconds and bytes read."""

    seconds: float
    cpu_seconds: float
    bytes: int


def main() -> None:
    """Print the measurements, then the simulation based on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-documents", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--documents", type=int, default=200_000, help="of the file that all read")
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--micro-batches", type=int, default=8, help="packs of a step for each data-parallel share")
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="of the machine that is simulated")
    parser.add_argument("--step-seconds", type=float, default=5.0)
    parser.add_argument("--folder", help="where files are written; by default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for documents in arguments.open_documents:
            print_line(opening(folder, documents))
        prefix, plan_file = os.path.join(folder, "corpus"), os.path.join(folder, "plan.packs")
        tokens = write_corpus(prefix, arguments.documents)
        packs = arguments.ranks // CP * arguments.micro_batches
        rule = PackRule(((0, arguments.context),), packs * arguments.context)
        plan = make_pack_plan(plan_file, [Corpus.open("documents", [prefix])], seed=1, rule=rule, max_epochs=[1.0])
        # the first step warms up, and the last may be shorter
        steps = min(arguments.steps, plan.steps - 2)
        print_line(
            f"\n{tokens:,} tokens in one file; a step is {packs} packs of {arguments.context:,}; {os.cpu_count()} cores"
        )
        for processes in arguments.processes:
            rows = read_together(prefix, plan_file, processes, arguments.ranks, steps)
            print_line(measured(processes, rows))
        bandwidth = copied_together(prefix, max(arguments.processes))
        print_line(
            f"page cache, {max(arguments.processes)} processes: {bandwidth / 1e9:.1f} GB/s by pread of {COPIED_BYTES:,} bytes"
        )
        print_line(simulated(rows, bandwidth, arguments.ranks, arguments.cores, arguments.step_seconds))


def opening(folder: str, documents: int) -> str:
    """Create a corpus and its plan, measure opening and seeking in fresh processes, and return lines with the times."""
    prefix, plan_file = os.path.join(folder, "short"), os.path.join(folder, "short.packs")
    rng = np.random.default_rng(0)
    with IndexedFileWriter(prefix, np.uint8) as writer:
        for first in range(0, documents, PART):
            lengths = rng.integers(1, 8, min(PART, documents - first))
            writer.add_many(rng.integers(0, 256, lengths.sum(), np.uint8), lengths)
    corpus = Corpus.open("short", [prefix])
    began, cpu = time.perf_counter(), time.process_time()
    plan = make_pack_plan(plan_file, [corpus], seed=1, rule=PackRule(((0, 512),), 512 * 64), max_epochs=[1.0])
    planning = f"planned in {time.perf_counter() - began:.1f} s ({time.process_time() - cpu:.1f} CPU s)"
    sizes = [os.path.getsize(file) / 1e6 for file in (f"{prefix}.idx", plan_file)]
    lines = [
        f"open: {documents:,} documents, index {sizes[0]:,.0f} MB, plan {sizes[1]:,.0f} MB, {plan.steps:,} steps, {planning}"
    ]
    rows = [in_processes([(open_and_seek, prefix, plan_file)])[0] for _ in range(9)]
    for part in rows[0]:
        times, cpu_times = zip(*(row[part] for row in rows), strict=True)
        lines.append(
            f"  {part:34s}{statistics.median(times) * 1e3:7.2f} ms, least {min(times) * 1e3:.2f}, most {max(times) * 1e3:.2f}; "
            f"{statistics.median(cpu_times) * 1e3:.2f} ms of CPU (9 processes)"
        )
    for file in Path(folder).iterdir():
        file.unlink()
    return "\n".join(lines)


def open_and_seek(barrier: Any, prefix: str, plan_file: str) -> dict[str, np.ndarray]:
    """Return (seconds, CPU seconds) of each stage of opening and seeking, by name. Call this in a fresh process."""
    laps: dict[str, np.ndarray] = {}
    clocks = lambda: np.array([time.perf_counter(), time.process_time()])  # noqa: E731
    began = clocks()

    def lap(part: str) -> None:
        nonlocal began
        laps[part] = clocks() - began
        began = clocks()

    corpus = Corpus.open("short", [prefix])
    digest = corpus.digest
    lap("corpus, with its digest")
    plan = PackPlan.open(plan_file)
    assert plan.sources[0].digest == digest
    lap("plan")
    plan.step(plan.steps // 2)
    lap("a step in the middle")
    loader = PackLoader(plan, [corpus], rank=0, size=64, start_step=plan.steps // 3, steps=1)
    batch = next(iter(loader))[0]
    batch.local_shard(Layout.zigzag(batch.lengths, CP), 0)
    lap("loader, and a rank's first tokens")
    return laps | {"all together": np.sum(list(laps.values()), 0)}


def read_together(prefix: str, plan_file: str, processes: int, ranks: int, steps: int) -> list[Read]:
    """Return the reads of all processes. Each process is one rank, and all processes start every step together."""
    # choose ranks that are far apart, to cover all CP ranks of a pack and many packs
    chosen = np.linspace(0, ranks - 1, processes).astype(int).tolist()
    work = [(read_parts, prefix, plan_file, rank, ranks, steps) for rank in chosen]
    return [read for reads in in_processes(work) for read in reads]


def read_parts(barrier: Any, prefix: str, plan_file: str, rank: int, ranks: int, steps: int) -> list[Read]:
    """Read one rank's parts of all steps. Return one `Read` per step."""
    share, cp_rank = divmod(rank, CP)
    loader = PackLoader(plan_file, [Corpus.open("documents", [prefix])], rank=share, size=ranks // CP, steps=steps + 1)
    reads = []
    for batches in loader:
        layouts = [Layout.zigzag(batch.lengths, CP) for batch in batches]
        barrier.wait()
        began, cpu, before = time.perf_counter(), time.process_time(), _bytes_read()
        for batch, layout in zip(batches, layouts, strict=True):
            batch.local_shard(layout, cp_rank)
        reads.append(Read(time.perf_counter() - began, time.process_time() - cpu, _bytes_read() - before))
    # the first step warms up
    return reads[1:]


def copied_together(prefix: str, processes: int) -> float:
    """Return the bytes per second that all processes together copy from the page cache."""
    seconds = in_processes([(copy_bytes, f"{prefix}.bin", number) for number in range(processes)])
    return processes * 256 * COPIED_BYTES / max(seconds)


def copy_bytes(barrier: Any, path: str, number: int) -> float:
    """Return the seconds taken to copy COPIED_BYTES at 256 random offsets of the file."""
    places = np.random.default_rng(number).integers(0, max(1, os.path.getsize(path) - COPIED_BYTES), 256).tolist()
    file, room = os.open(path, os.O_RDONLY), bytearray(COPIED_BYTES)
    barrier.wait()
    began = time.perf_counter()
    for place in places:
        os.preadv(file, [room], place)
    return time.perf_counter() - began


def measured(processes: int, rows: list[Read]) -> str:
    """Return a line with the times and bytes of the reads."""
    seconds, cpu = ([getattr(row, name) * 1e3 for row in rows] for name in ("seconds", "cpu_seconds"))
    size = statistics.median(row.bytes for row in rows)
    return (
        f"read: {processes:3d} processes at once: {statistics.median(seconds):.1f} ms a rank and step (worst "
        f"{max(seconds):.1f}), {statistics.median(cpu):.2f} ms of CPU (worst {max(cpu):.2f}), {size / 1e3:,.0f} kB read"
    )


def simulated(rows: list[Read], bandwidth: float, ranks: int, cores: int, step_seconds: float) -> str:
    """Simulate all ranks requesting parts at once, drawn from the measured parts. Return a line with the results.

    The core that is free first serves the next rank. bandwidth: the bytes per second that all cores copy together.
    """
    rng = np.random.default_rng(0)
    waits, ends = 0, []
    for _ in range(1000):
        drawn = rng.integers(0, len(rows), ranks)
        free = np.zeros(cores)
        copied = 0.0
        for row in (rows[number] for number in drawn.tolist()):
            core = free.argmin()
            copied += row.bytes / bandwidth
            free[core] = max(free[core] + row.cpu_seconds, copied)
            ends.append(float(free[core]))
            waits += ends[-1] > step_seconds
    return (
        f"simulated: {ranks} ranks on {cores} cores and one page cache, 1,000 steps: the last part is there after "
        f"{max(ends) * 1e3:.0f} ms at most, {max(ends) / step_seconds:.1%} of a step of {step_seconds:g} s; {waits} waits"
    )


def in_processes(work: list[tuple[Any, ...]]) -> list[Any]:
    """Call each function in a separate process, with a barrier for all processes as the first argument. Return the results."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(work))
    pipes = [context.Pipe(duplex=False) for _ in work]
    processes = [
        context.Process(target=_run, args=(send, barrier, *function_and_arguments))
        for (_, send), function_and_arguments in zip(pipes, work, strict=True)
    ]
    for process, (_, send) in zip(processes, pipes, strict=True):
        process.start()
        send.close()
    try:
        return [receive.recv() for receive, _ in pipes]
    finally:
        for process in processes:
            process.join()


def _run(send: Any, barrier: Any, function: Any, *arguments: Any) -> None:
    send.send(function(barrier, *arguments))


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    guard_processes()
    sys.exit(main())
