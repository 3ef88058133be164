"""Seconds until a run on Slurm or Ray trains again after one of its ranks was killed or stopped.

    python benchmarks/cluster_restarts.py [--on local slurm ray] [--repeats 3] [--patience 5] [--data.tokens_per_step ...]

The clusters are real, with two nodes of two ranks each, all on this machine, as in the tests. Each fault gets its own run
of `configs/tiny.toml`, because a node blamed twice in a row is left out: rank 0 receives a SIGKILL in one run and a
SIGSTOP in the other. The table has the median seconds from the signal until the rank's node has named it (noticed), until
the next attempt starts, and until its first step is done (trains again). The last includes the new processes' imports,
which are also measured separately. `local` is `distattn launch local` with four ranks, whose restarts import nothing.
Additional arguments are passed to the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import Cell, write
from process_guard import guard_processes

from distattn.checkpoints.owner import Owner
from distattn.launch.attempts import Attempts
from distattn.training.reporting.json_lines import read_rows

ROOT = Path(__file__).parents[1]
FAULTS = (signal.SIGKILL, signal.SIGSTOP)
TARGETS = ("local", "slurm", "ray")
# maximum time to wait for a condition, in seconds
_LIMIT_SECONDS = 600.0
# seconds that ranks may take to save when the run is cancelled
_ENDING_SECONDS = 60.0
# steps to wait for before the fault: ranks have more time to answer during the first steps
_STEPS = 4


class Times(NamedTuple):
    """Seconds from a fault until it was noticed, until the next attempt started, and until training continued."""

    noticed: float
    begun: float
    again: float


class Target(NamedTuple):
    """A cluster. command: the arguments that start a run. environment: variables for the run and for commands that
    concern it."""

    command: tuple[str, ...]
    environment: dict[str, str]


@contextlib.contextmanager
def cluster(name: str, folder: Path) -> Iterator[Target]:
    """Start a cluster of two nodes for the duration of the block."""
    if name == "slurm":
        from slurm_cluster import SlurmCluster

        slurm = SlurmCluster(folder)
        slurm.start()
        try:
            yield Target(("slurm", "--nodes=2", "--gpus=2"), slurm.environment)
        finally:
            slurm.stop()
    elif name == "ray":
        from ray_cluster import RayCluster

        ray = RayCluster(2, "node1", "node2")
        try:
            yield Target(("ray", "--nodes=2", "--gpus=2", f"--ray.address={ray.address}"), ray.environment)
        finally:
            ray.stop()
    else:
        yield Target(("local", "--gpus=4"), {})


def measured(target: Target, folder: Path, fault: signal.Signals, patience: float, further: Sequence[str]) -> Times:
    """Start a run in a new folder, inject `fault`, and return its times. further: additional arguments for the run."""
    options = (
        "--checkpoint.every_steps=2",
        "--checkpoint.keep_last=2",
        "--reference_check.steps=0",
        "--train.steps=100000",
    )
    limit = f"--supervision.patience_seconds={patience}"
    command = (
        "launch",
        target.command[0],
        str(ROOT / "configs/tiny.toml"),
        *target.command[1:],
        f"--run.folder={folder}",
    )
    paths = {
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment = os.environ | target.environment | paths
    cli = [sys.executable, "-m", "distattn.launch.cli"]
    log = Path(f"{folder}.out")
    with log.open("w") as output:
        process = subprocess.Popen(
            [*cli, *command, *options, limit, *further],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def trouble() -> str:
        return f"{target.command[0]}: {log.read_text()[-3000:]}"

    try:
        return _struck(folder, fault, trouble)
    finally:
        subprocess.run([*cli, "launch", "cancel", str(folder)], env=environment, capture_output=True)
        ends, owner = time.monotonic() + _ENDING_SECONDS, Owner.read(folder / "owner.json")
        while (process.poll() is None or (owner and owner.is_alive())) and time.monotonic() < ends:
            time.sleep(0.1)
        process.kill()


def _struck(folder: Path, fault: signal.Signals, trouble: Callable[[], str]) -> Times:
    """Send a signal to rank 0 of the first attempt. Return the times of the events that follow."""
    attempts, metrics = Attempts(folder / "attempts"), folder / "metrics.jsonl"
    _until(lambda: metrics.exists() and len(read_rows(metrics)) > _STEPS, trouble)
    os.kill(Owner.read(folder / "owner.json").pid, fault)
    began = time.time()
    _until(lambda: attempts.node_reports(1) or attempts.latest > 1, trouble)
    noticed = time.time() - began
    _until(lambda: attempts.latest >= 2 and attempts.goes_on, trouble)
    begun = time.time() - began
    rows = len(read_rows(metrics))
    _until(lambda: len(read_rows(metrics)) > rows, trouble)
    return Times(noticed, begun, time.time() - began)


def _until(condition: Callable[[], object], trouble: Callable[[], str]) -> None:
    ends = time.monotonic() + _LIMIT_SECONDS
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError(trouble())
        time.sleep(0.01)


def import_seconds() -> float:
    """Return the seconds that a new process takes to import a rank's modules."""
    began = time.time()
    subprocess.run(
        [sys.executable, "-c", "import distattn.training.rank, distattn.training.loop"], cwd=ROOT, check=True
    )
    return time.time() - began


def main() -> None:
    """Measure the restarts and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=float, default=5)
    parser.add_argument("--out", type=Path, help="a file that gets the numbers, too")
    arguments, further = parser.parse_known_args()
    sys.stdout.write("| on | fault | noticed | next attempt | trains again |\n|---|---|---|---|---|\n")
    # import the clusters from the tests, which share their code
    sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "support" / "launching")]
    cells, imports = [], import_seconds()
    for name in arguments.on:
        # ranks of a cancelled job may still be writing
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            cluster(name, Path(folder, "cluster")) as target,
        ):
            times: dict[signal.Signals, list[Times]] = {fault: [] for fault in FAULTS}
            for number, fault in itertools.product(range(arguments.repeats), FAULTS):
                run = Path(folder, f"{fault.name}-{number}")
                times[fault].append(measured(target, run, fault, arguments.patience, further))
                sys.stderr.write(f"{name}, {fault.name}: {times[fault][-1]}\n")
            for fault, rows in times.items():
                noticed, begun, again = map(list, zip(*rows, strict=True))
                medians = (f"{statistics.median(column):.1f} s" for column in (noticed, begun, again))
                sys.stdout.write(f"| {name} | {fault.name} | {' | '.join(medians)} |\n")
                sys.stdout.flush()
                facts = {"noticed": noticed, "begun": begun, "patience": arguments.patience, "imports": imports}
                cells.append(Cell(fault.name, name, seconds=again, facts=facts))
    sys.stdout.write(f"\nimports of a new process: {imports:.1f} s\n")
    if arguments.out:
        write(arguments.out, cells)


if __name__ == "__main__":
    guard_processes()
    main()
