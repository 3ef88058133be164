"""The first hour on GPUs in one command: planted faults, then checks, then a table and a verdict.

    python benchmarks/first_hour.py gpu [--minutes 9] [options of gpu.py]
    python benchmarks/first_hour.py cluster [--minutes 9] [options of check_cluster.py]

Every part is a separate program with a time limit. Its output is passed on and recorded, and the other parts run no
matter how it ends. A part that exceeds its limit is stopped and named; a part is skipped and named if no time is left
for it. build/first-hour keeps everything: the output, the findings as JSON lines, and the trials of kernels. The exit
code is 1 if something is wrong, a planted fault was not found, or a part failed. Without GPUs the same parts run,
smaller, in Triton's interpreter and over gloo.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import findings
import torch
from process_guard import guard_processes
from verdict import TIERS, Outcome, speed_table, time_table, verdict

from distattn.kernels.trial_cache import cache_file

HERE = Path(__file__).parent
FOLDER = HERE.parent / "build" / "first-hour"
MINUTES = 9.0
# parts are not started if less time than this is left
LEAST_SECONDS = 20.0
# the fraction of its time limit that a program receives as --seconds
OWN_SHARE = 0.8
# seconds that a stopped part has to exit: more than the 30 s that torchrun gives its ranks
GRACE_SECONDS = 35.0
NO_GPU = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Part(NamedTuple):
    """A program and its time limit. keeps_time: the program accepts --seconds and leaves out whatever would take longer."""

    name: str
    command: Sequence[str]
    seconds: float
    keeps_time: bool = False


def main() -> int:
    """Run all parts and print the table and the verdict. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=("gpu", "cluster"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    arguments, more = parser.parse_known_args()
    gpus = torch.cuda.device_count()
    stages = one_gpu(gpus > 0, more) if arguments.what == "gpu" else cluster(gpus, more)
    return first_hour(stages, FOLDER / arguments.what, 60 * arguments.minutes, missing(arguments.what, gpus))


def one_gpu(has_gpu: bool, more: Sequence[str]) -> list[list[Part]]:
    """Return the stages of `make bench-gpu`. The parts of a stage run side by side, since compilers take most of their time."""
    executor = [] if has_gpu else ["--ranks", "2"]
    stages = [
        [Part("planted faults", program("gpu_plants.py"), 150)],
        [Part(f"kernel {name}", program("gpu_checks.py", "--tiers", name), 200, keeps_time=True) for name in TIERS],
        [Part("executor", program("gpu_executor.py", *executor), 90)],
        [Part("executor with gluon", program("gpu_executor.py", "--kernel", "gluon", *executor), 90)],
        [Part("one rank", launched(1, "check_cluster.py"), 90)],
        [Part("recurrences", program("gpu_recurrence.py"), 150, keeps_time=True)],
    ]
    if has_gpu:
        out = ("--out", str(HERE / "results" / "gpu.jsonl"))
        stages.append([Part("speed", program("gpu.py", "--tiers-only", *out, *more), 60 * MINUTES, keeps_time=True)])
    return stages


def cluster(gpus: int, more: Sequence[str]) -> list[list[Part]]:
    """Return the stages of `make check-cluster`. The part that loses a rank comes last."""
    ranks = gpus if gpus > 1 else 2
    return [
        [Part("planted faults", launched(ranks, "cluster_plants.py"), 120)],
        [Part("all strategies", launched(ranks, "check_cluster.py", *more), 240)],
        [Part("recurrent layers", launched(ranks, "check_recurrences.py"), 150, keeps_time=True)],
        [Part("planted: a lost rank", launched(ranks, "cluster_plants.py", "--stop"), 120)],
    ]


def program(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / script), *arguments]


def launched(ranks: int, script: str, *arguments: str) -> list[str]:
    """Return the command that runs a script with several ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, str(HERE / script), *arguments]


def missing(program_name: str, gpus: int) -> str:
    """Return a sentence saying what cannot be shown with this many GPUs, or an empty string."""
    if program_name == "cluster" and gpus == 1:
        return "One GPU here: messages went over gloo, between processes on the CPU. Nothing about NCCL or about speed was shown."
    if gpus == 0:
        return (
            "No GPU here: kernels ran in Triton's interpreter, messages went over gloo. Nothing about GPUs, NCCL or speed was "
            "shown."
        )
    return ""


def first_hour(stages: Sequence[Sequence[Part]], folder: Path, seconds: float, without: str) -> int:
    """Run all parts and print their results. Return the exit code. without: see `missing`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began, outcomes = time.monotonic(), []
    with (folder / "output.txt").open("w") as kept:
        lock = threading.Lock()

        def print_line(text: str) -> None:
            # parts that run side by side print from different threads
            with lock:
                for file in (sys.stdout, kept):
                    file.write(text + "\n")
                    file.flush()

        environment = os.environ | (NO_GPU if without else {})
        for stage in stages:
            left = max(began + seconds - time.monotonic(), 0.0)
            print_line(f"\n--- {', '.join(part.name for part in stage)} ({left:.0f} s left)")
            if left < LEAST_SECONDS:
                outcomes += [Outcome(part.name, [], left_out="no time was left") for part in stage]
            else:
                outcomes += run_stage(stage, folder, left, environment, print_line)
        rows = [row for outcome in outcomes for row in outcome.findings]
        print_line("\n" + ("" if without else "\n\n".join(filter(None, (speed_table(rows), time_table(rows))))))
        text, right = verdict(outcomes, without)
        print_line(f"\n{text}")
        for machine in [row for row in rows if row["kind"] == "ended"][:1]:
            versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
            print_line(
                f"{machine['device']}; {versions}; commit {machine['commit']}; {time.monotonic() - began:.0f} s."
            )
        print_line(f"To send something back, or only the figures: {folder}, with the output of distattn doctor --json.")
    with suppress(FileNotFoundError):
        shutil.copy(cache_file(), folder)
    return 0 if right else 1


def run_stage(
    stage: Sequence[Part], folder: Path, left: float, environment: dict[str, str], print_line: Callable[[str], None]
) -> list[Outcome]:
    """Run parts side by side, each for at most its time limit and the time left. Return their outcomes."""
    running = [
        Running(part, folder, min(part.seconds, left), environment, print_line, len(stage) > 1) for part in stage
    ]
    try:
        return [part.outcome() for part in running]
    finally:
        # stop the parts even if the user interrupts
        for part in running:
            part.stop()


class Running:
    """A running part. Its output is passed on line by line, prefixed with its name if other parts run at the same time."""

    def __init__(
        self,
        part: Part,
        folder: Path,
        seconds: float,
        environment: dict[str, str],
        print_line: Callable[[str], None],
        named: bool,
    ):
        self.part, self.seconds, self.ends = part, seconds, time.monotonic() + seconds
        self.path = folder / f"{part.name.replace(' ', '-').replace(':', '')}.jsonl"
        limit = ["--seconds", f"{OWN_SHARE * seconds:.0f}"] if part.keeps_time else []
        self.process = subprocess.Popen(
            [*part.command, *limit, "--findings", str(self.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            # start a new session, so that all of the part's processes can be killed
            start_new_session=True,
        )
        self.last: deque[str] = deque([""], maxlen=1)
        prefix = f"{part.name}: " if named else ""
        self.reader = threading.Thread(
            target=self._pass_on, args=(self.process.stdout, prefix, print_line), daemon=True
        )
        self.reader.start()

    def _pass_on(self, output: IO[str], prefix: str, print_line: Callable[[str], None]) -> None:
        for line in output:
            print_line(prefix + line.rstrip())
            if line.strip():
                self.last.append(line.strip())

    def outcome(self) -> Outcome:
        """Wait until the part ends, or stop it at its time limit. Return its outcome."""
        failed = ""
        try:
            code = self.process.wait(max(self.ends - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            failed = f"it was stopped after {self.seconds:.0f} s; its last line: {self.last[0][:200]}"
            self.stop()
        self.reader.join(timeout=5)
        rows = findings.read(self.path)
        wrong = any(
            bool(row["text"]) == (row["kind"] == "check") for row in rows if row["kind"] in ("check", "planted")
        )
        if not failed and (not any(row["kind"] == "ended" for row in rows) or code != wrong):
            failed = f"exit code {code}; its last line: {self.last[0][:200]}"
        return Outcome(self.part.name, rows, failed)

    def stop(self) -> None:
        """Stop the part and all its processes if it is still running."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


if __name__ == "__main__":
    guard_processes()
    sys.exit(main())
