"""Killed and stopped ranks under distattn's supervision, torchrun, NVIDIA's ft_launcher and torchft.

    python benchmarks/supervision_rivals.py [--ranks 2] [--repeats 3] [--patience 5] [--limit 30] [--rivals FOLDER]

All contestants run the training of `supervision_loop.py` on this machine, on CPUs over gloo, with a checkpoint every
ten steps. Its last rank receives a SIGKILL or a SIGSTOP five steps after a checkpoint. The table has the median seconds
from the signal to the first line that the supervisor prints about it (noticed) and to the end of a step of the rank
that replaces the last one, and thus of all ranks (trains again); the number of repeated steps (steps lost); and the
ranks that the supervisor blames (names). --patience is passed to all supervisors with such a setting. An outcome that
does not occur within --limit seconds counts as never and is tried only once. A repeated step with a different loss is
an error, except for torchft: its ranks are replicas that come and go, so losses depend on which were present.

`pip install --target FOLDER --no-deps nvidia-resiliency-ext==0.4.1 nvidia-ml-py pynvml defusedxml psutil pyyaml`
creates the folder of rivals. For torchft, add `--no-deps torchft==0.2.0` and `opentelemetry-sdk
opentelemetry-exporter-otlp-proto-http`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
from harness import Cell, write
from process_guard import guard_processes
from supervision_loop import EVERY, torchrun

HERE = Path(__file__).parent
FAULTS = ("SIGKILL", "SIGSTOP")
# maximum time in seconds until ranks are training, on a busy machine
_START_SECONDS = 240.0
_NEVER = "not within {:.0f} s"
# matches a failed rank in the output of torchrun's agents and of launchers based on them
_FAILED = r"failed \(exitcode: .*?\) local_rank: (\d+)"
# matches the first line that a supervisor prints about a fault, but not what torchft's lighthouse prints in every step
_NOTICED = re.compile(r"^distattn: |failed \(exitcode|closing signal|timeout elapsed")
_NVIDIA = "nvidia_resiliency_ext.fault_tolerance.launcher"


class Rival(NamedTuple):
    """A supervisor. command: a function that returns the command that starts it and its ranks. blames: a pattern for
    the ranks it blames.

    module: a module that it needs. repeats: True if repeated steps must have the same loss.
    """

    command: Callable[[Path, argparse.Namespace], Sequence[object]]
    blames: str = _FAILED
    environment: dict[str, str] = {}
    module: str = "torch"
    repeats: bool = True


class Note(NamedTuple):
    """A recorded step of a rank: when it was done and by which process, the step's number, and its loss."""

    at: float
    pid: int
    step: int
    loss: str


class Struck(NamedTuple):
    """The outcome of a fault: seconds until each event, steps lost (both None past the limit), and ranks blamed.

    alone: seconds until the other ranks continued without the victim.
    """

    noticed: float | None = None
    again: float | None = None
    lost: int | None = None
    alone: float | None = None
    blamed: tuple[int, ...] = ()


def _of_loop(role: str) -> Callable[[Path, argparse.Namespace], Sequence[object]]:
    return lambda folder, arguments: [
        sys.executable,
        HERE / "supervision_loop.py",
        role,
        folder,
        arguments.ranks,
        arguments.patience,
    ]


def _of_torchrun(folder: Path, arguments: argparse.Namespace) -> Sequence[object]:
    return [*torchrun(arguments.ranks), *_logs(folder), "train", folder]


def _of_nvidia(folder: Path, arguments: argparse.Namespace) -> Sequence[object]:
    beats = ["--ft-rank-heartbeat-timeout", arguments.patience, "--ft-initial-rank-heartbeat-timeout", _START_SECONDS]
    checks = ["--ft-workload-check-interval", 0.5, "--ft-enable-nic-monitor", "False"]
    return [*torchrun(arguments.ranks, _NVIDIA), *beats, *checks, *_logs(folder), "monitored", folder]


def _logs(folder: Path) -> Sequence[object]:
    return ["--redirects", "3", "--log-dir", folder / "logs", HERE / "supervision_loop.py"]


RIVALS = {
    "distattn": Rival(_of_loop("launch_supervised"), r"^distattn: rank (\d+)"),
    "torchrun": Rival(_of_torchrun),
    "torchrun, a store for each restart": Rival(_of_torchrun, environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
    "ft_launcher": Rival(_of_nvidia, module="nvidia_resiliency_ext"),
    "torchft": Rival(
        _of_loop("launch_replicas"), r"^replica (\d+): .*failed \(exitcode", module="torchft", repeats=False
    ),
}


class Launch:
    """A running supervisor and its ranks. Leaving the context kills all of them."""

    def __init__(self, rival: Rival, folder: Path, arguments: argparse.Namespace):
        self._rival, self._folder, self._arguments = rival, folder, arguments
        self._victim = arguments.ranks - 1
        paths = [HERE, HERE.parent, *([arguments.rivals] if arguments.rivals else [])]
        loopback = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": ":".join(map(str, paths))}
        self._process = subprocess.Popen(
            [str(word) for word in rival.command(folder, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | loopback | rival.environment,
        )
        self._lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._process.kill()
        for process in self._seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def strike(self, fault: str) -> Struck:
        """Send a signal to the last rank, halfway between two checkpoints, once all ranks are training. Return the outcome."""
        begun = {rank: len(self._notes(rank)) for rank in range(self._arguments.ranks)}

        def amid_checkpoints() -> bool:
            done = all(len(self._notes(rank)) > begun[rank] + EVERY for rank in begun)
            return done and self._notes(self._victim)[-1].step % EVERY == EVERY // 2

        if not self._until(amid_checkpoints, _START_SECONDS):
            raise RuntimeError(f"the ranks do not train: {self.said()}")
        self._look()
        victim, at = self._notes(self._victim)[-1], time.time()
        old = {self._notes(rank)[-1].pid for rank in begun}
        os.kill(victim.pid, signal.Signals[fault])
        done = self._until(lambda: self._notes(self._victim)[-1].pid not in old, self._arguments.limit)
        self._look()
        after = [(when, line) for when, line in self._lines if when > at]
        blamed = {int(rank) for _, line in after for rank in re.findall(self._rival.blames, line)}
        alone = [note.at for note in self._notes(0) if note.at > at and note.pid in old and note.step > victim.step + 1]
        noticed = next((when for when, line in after if _NOTICED.search(line)), None)
        new = [note for note in self._notes(self._victim) if note.pid not in old and note.at > at]
        return Struck(
            None if noticed is None else noticed - at,
            new[0].at - at if done else None,
            max(0, victim.step + 1 - new[0].step) if done else None,
            alone[0] - at if alone else None,
            tuple(sorted(blamed)),
        )

    def wrong(self) -> str:
        """Return what is wrong with the repeated steps, or an empty string."""
        losses: dict[int, str] = {}
        for note in self._notes(0):
            if losses.setdefault(note.step, note.loss) != note.loss:
                return f"step {note.step} has another loss when it is done again"
        return ""

    def said(self) -> str:
        """Return the last lines that the supervisor printed."""
        return "\n".join(line for _, line in self._lines[-20:])

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append((time.time(), line.rstrip()))

    def _notes(self, rank: int) -> list[Note]:
        file = self._folder / f"rank-{rank}.steps"
        fields = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [Note(float(at), int(pid), int(step), loss) for at, pid, step, loss in fields]

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the condition holds, time runs out or the supervisor ends. Return whether the condition holds."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and self._process.poll() is None:
            if condition():
                return True
            time.sleep(0.002)
        return condition()

    def _look(self) -> None:
        """Remember the supervisor's current descendants, to kill those that outlive the process that started them."""
        if self._process.poll() is None:
            self._seen |= set(psutil.Process(self._process.pid).children(recursive=True))


def measured(name: str, arguments: argparse.Namespace, folder: Path) -> list[Cell]:
    """Measure a contestant with all faults, in as few launches as possible. Return a cell per fault."""
    rival = RIVALS[name]
    outcomes: dict[str, list[Struck]] = {fault: [] for fault in arguments.faults}
    if importlib.util.find_spec(rival.module) is None:
        note = f"{rival.module} is not there: see --rivals"
        return [Cell(fault, name, "unsupported", note) for fault in arguments.faults]
    note, launches = "", 0
    while not note and (left := [fault for fault in arguments.faults if _is_left(outcomes[fault], arguments.repeats)]):
        launches += 1
        (here := folder / f"{launches}").mkdir(parents=True)
        with Launch(rival, here, arguments) as launch:
            for fault in [fault_left for _ in range(arguments.repeats) for fault_left in left]:
                if _is_left(outcomes[fault], arguments.repeats):
                    sys.stderr.write(f"{name}: {fault} {len(outcomes[fault]) + 1} of {arguments.repeats}\n")
                    outcomes[fault].append(launch.strike(fault))
                    if outcomes[fault][-1].again is None:
                        # use a new launch, because no rank trains in this launch any longer
                        break
            note = launch.wrong() if rival.repeats else ""
    return [_cell(name, fault, outcomes[fault], note, arguments) for fault in arguments.faults]


def _is_left(struck: Sequence[Struck], repeats: int) -> bool:
    return len(struck) < repeats and (not struck or struck[-1].again is not None)


def _cell(name: str, fault: str, struck: Sequence[Struck], note: str, arguments: argparse.Namespace) -> Cell:
    """Return the cell of a contestant and fault."""
    facts = {
        "noticed": _known(outcome.noticed for outcome in struck),
        "lost": _known(outcome.lost for outcome in struck),
        "alone": _known(outcome.alone for outcome in struck),
        "blamed": [list(outcome.blamed) for outcome in struck],
        "victim": arguments.ranks - 1,
        "ranks": arguments.ranks,
        "patience": arguments.patience,
        "limit": arguments.limit,
    }
    return Cell(fault, name, "wrong" if note else "ok", note, _known(outcome.again for outcome in struck), facts)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def line(cell: Cell) -> str:
    """Format a row of the table."""
    if cell.status != "ok":
        return f"| {cell.contestant} | {cell.case} | {cell.status}: {cell.note} | | | |"
    facts = cell.facts
    never = _NEVER.format(facts["limit"])

    def median(values: Sequence[float], form: str = "{:.2f} s") -> str:
        return form.format(statistics.median(values)) if values else never

    again, tried = median(cell.seconds), len(facts["blamed"])
    if 0 < len(cell.seconds) < tried:
        again += f" in {len(cell.seconds)} of {tried}, else {never}"
    if facts["alone"]:
        again += f"; the others alone: {median(facts['alone'])}"
    blamed = sorted({rank for ranks in facts["blamed"] for rank in ranks})
    whom = "no rank" if not blamed else "it" if blamed == [facts["victim"]] else f"ranks {blamed}"
    lost = median(facts["lost"], "{:.0f}") if facts["lost"] else "-"
    return f"| {cell.contestant} | {cell.case} | {median(facts['noticed'])} | {again} | {lost} | {whom} |"


def main() -> int:
    """Print the table in the form used by the docs. If --out is set, also append the numbers to a file. Return the exit
    code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("ranks", 2), ("repeats", 3), ("patience", 5.0), ("limit", 30.0)):
        parser.add_argument(f"--{option}", type=type(default), default=default)
    parser.add_argument("--rivals", type=Path, help="a folder with packages of rivals")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.rivals:
        sys.path.append(str(arguments.rivals))
    sys.stdout.write("| what | fault | noticed | trains again | steps lost | names |\n|---|---|---|---|---|---|\n")
    failed = False
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            cells = measured(name, arguments, Path(folder))
        for cell in cells:
            sys.stdout.write(f"{line(cell)}\n")
            failed |= cell.status == "wrong"
        sys.stdout.flush()
        if arguments.out:
            write(arguments.out, cells)
    return int(failed)


if __name__ == "__main__":
    guard_processes()
    sys.exit(main())
