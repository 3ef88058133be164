"""A check that a run whose ranks are repeatedly killed or hang ends with the curve and checkpoint of an undisturbed run.

    python benchmarks/trainer_kills.py [--kills 200] [--hangs 20] [--seed 1] [--ranks 2] [--strategy ring]
        [--patience 5] [--folder FOLDER]

`distattn train` runs a tiny model on some ranks. SIGKILL hits either a rank, which the launcher restarts, or the
launcher, after which `distattn resume` continues. A third of the kills fall at any time, a third during a save, and a
third when a rank reports an activity: connecting, reading, waiting for keys and values, computing gradients, updating
weights. With ulysses on more than two ranks, messages are all-to-alls. There are five kinds of hangs. The launcher must
notice each and name the rank and its activity. When a run ends, every line of its metrics, its losses by position, the
documents of each step and the digests of the last checkpoint's tensors must equal those of a run without faults, and
nothing may be left over. Then the next run starts.

The commands and the launcher are the real ones, in processes forked from this one after its imports.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from process_guard import guard_processes

from distattn.checkpoints.checkpoint_folder import list_checkpoints
from distattn.launch import cli, run_locally
from distattn.launch.attempts import Attempts
from distattn.launch.ranks import rank as rank_process
from distattn.launch.ranks.die_with_launcher import die_with_launcher
from distattn.parallel.runtime.communication.transport import GroupTransport, Packet, PendingMessages
from distattn.supervision import heartbeats
from distattn.supervision.culprits import process_state
from distattn.supervision.heartbeats import Heartbeat
from distattn.training.config import run_file as configuration
from distattn.training.config.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ParallelConfig,
    ReferenceCheckConfig,
    RunConfig,
    SupervisionConfig,
    TrainConfig,
)
from distattn.training.reporting.json_lines import read_rows
from distattn.training.reporting.step_documents import documents_of_step
from distattn.training.run_folder import RunFolder

STEPS = 14
TEXT = Path(__file__).parents[1] / "LICENSE"
# maximum time to wait, in seconds: only a hang takes this long
LIMIT_SECONDS = 300.0
# roughly the duration of a save, over which the kills during a save are spread
MOST_SAVE_SECONDS = 0.03
# the activities, as reported by ranks, during which ranks are killed
_MOMENTS = ("connecting", "reading the data", "from rank", "forward and backward", "the optimizer's step")
# the kinds of hangs, and the activity that must be named for each
_WORDS = {
    "lock": "forward and backward",
    "read": "reading the data of step",
    "message": "from rank",
    "interpreter": "the optimizer's step",
}
_HANGS = ("stopped", *_WORDS)
# a file in a run folder that tells a rank to hang
_PLANTED = "fault.json"
_MOST_OF_A_RUN = 8
# fields of metrics and documents that differ between two runs of the same steps
_PLACES = ("file", "attempt")
_TIMES = ("seconds", "data_seconds", "wait_seconds", "memory_resident")
# modules to import before launchers are forked
_LATE_IMPORTS = ("torch.utils.tensorboard", "matplotlib.image", "matplotlib.figure", "distattn.launch.finish_run")


class Fault(NamedTuple):
    """One kill or hang. victim: a rank or the launcher. moment: the moment of the kill, or the kind of hang.

    step: the step of the newest checkpoint afterwards. amid_save: True if a partial save was left behind. noticed, resumed:
    seconds until the fault was noticed, and until the ranks were training again; None for kills of the launcher.
    """

    victim: str
    moment: str
    step: int
    amid_save: bool
    noticed: float | None
    resumed: float | None


class FaultReport(NamedTuple):
    """All faults, the number of runs that were finished and compared, and the total seconds."""

    faults: list[Fault]
    runs: int
    seconds: float


class Launch:
    """`distattn train` or `distattn resume` in a forked process, with its output in a file."""

    def __init__(self, command: Sequence[str], run: RunFolder, ranks: int, log: Path):
        self._attempts, self._number, self._log = Attempts(run.attempts), ranks, log
        self._launcher = multiprocessing.get_context("fork").Process(target=_launcher, args=(list(command), log))
        self._launcher.start()
        self._ranks: dict[int, Heartbeat] = {}

    @property
    def exit_code(self) -> int | None:
        """The exit code of the command, or None while it is running."""
        return self._launcher.exitcode

    @property
    def ended(self) -> list[dict[str, Any]]:
        """The records of the attempts that have ended."""
        return [row for row in self._attempts.rows() if "why" in row]

    def until(self, condition: Callable[[dict[int, Heartbeat]], bool]) -> dict[int, Heartbeat] | None:
        """Wait until the condition holds for the ranks' heartbeats and return them, or None if the command ends first."""
        ends = time.monotonic() + LIMIT_SECONDS
        while self.exit_code is None:
            beats = self._attempts.beats() or {}
            self._ranks = beats or self._ranks
            if len(beats) == self._number and condition(beats):
                return beats
            assert time.monotonic() < ends, f"nothing comes of it: {beats}, {self.said()}"
            time.sleep(0.0005)
        return None

    def signal(self, victim: int, number: signal.Signals) -> None:
        """Send a signal to a rank, or to the launcher if `victim` is -1."""
        pid = self._launcher.pid if victim < 0 else self._ranks[victim].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def wait(self) -> int:
        """Wait until all processes of the command have ended. Return its exit code."""
        self._launcher.join(LIMIT_SECONDS)
        assert self.exit_code is not None, f"the launcher hangs: {self.said()}"
        ends = time.monotonic() + LIMIT_SECONDS
        while left := [beat.pid for beat in self._ranks.values() if process_state(beat.pid) not in "ZX"]:
            assert time.monotonic() < ends, f"ranks {left} hang: {self.said()}"
            time.sleep(0.002)
        return self.exit_code

    def said(self) -> str:
        """Return the output of the command and its ranks."""
        return self._log.read_text("utf-8", "replace")


class Faults:
    """Runs that suffer kills and hangs until they are finished, and are then compared with an undisturbed run."""

    def __init__(self, folder: Path, seed: int, ranks: int, strategy: str, patience: float):
        self._folder, self._random, self._ranks = folder, random.Random(seed), ranks
        self.faults: list[Fault] = []
        self._hung = 0
        self.runs = 0
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "text"
        text.mkdir()
        for number, paragraph in enumerate(TEXT.read_text("utf-8").split("\n\n")):
            (text / f"{number:03d}.txt").write_text(paragraph, "utf-8")
        self._config_file = folder / "run.toml"
        configuration.save(tiny_config(text, ranks, strategy, patience), self._config_file)
        self._undisturbed = RunFolder(folder / "undisturbed")
        launch = Launch(self._command(self._undisturbed), self._undisturbed, ranks, folder / "undisturbed.log")
        launch.until(lambda beats: True)
        began = time.monotonic()
        assert launch.wait() == 0, launch.said()
        # the duration of a run, so that kills can happen at any point in it
        self._seconds = time.monotonic() - began

    def until_done(self, kills: int, hangs: int) -> None:
        """Finish one run with at most `kills` kills and `hangs` hangs, and compare it with the undisturbed run."""
        self.runs += 1
        run, launches = RunFolder(self._folder / f"run-{self.runs}"), 0
        planned = [*["kill"] * min(kills, _MOST_OF_A_RUN), *["hang"] * min(hangs, _MOST_OF_A_RUN)]
        self._random.shuffle(planned)
        planned = planned[:_MOST_OF_A_RUN]
        code = None
        while code != 0:
            log = self._folder / f"run-{self.runs}-{launches}.log"
            launch = Launch(self._command(run), run, self._ranks, log)
            launches += 1
            while planned and launch.exit_code is None:
                fault = self._kill(launch, run) if planned[0] == "kill" else self._hang(launch, run)
                if fault is not None:
                    planned.pop(0)
                    self.faults.append(fault)
                    sys.stderr.write(f"{len(self.faults)}: {fault} of run {self.runs}\n")
                if fault is not None and fault.victim == "launcher":
                    break
            code = launch.wait()
            assert code in (0, -signal.SIGKILL), f"the command ended with {code}: {launch.said()}"
            assert "Resuming from" not in launch.said(), launch.said()
        compare_runs(run, self._undisturbed)

    def _command(self, run: RunFolder) -> list[str]:
        if run.folder.exists():
            return ["resume", str(run.folder)]
        return ["train", str(self._config_file), f"--run.folder={run.folder}"]

    def _kill(self, launch: Launch, run: RunFolder) -> Fault | None:
        """Kill a rank or the launcher. Return the fault, or None if the command ended first."""
        victim = self._random.choice([*range(self._ranks), *range(self._ranks), -1])
        moment = self._random.choice(("any", "save", self._random.choice(_MOMENTS)))
        if launch.until(lambda beats: True) is None:
            return None
        if moment == "any":
            time.sleep(self._random.uniform(0, self._seconds))
        elif moment == "save":
            _wait_for_save(launch, run)
            time.sleep(self._random.uniform(0, MOST_SAVE_SECONDS))
        else:
            launch.until(lambda beats: moment in beats[max(victim, 0)].activity)
        ended = len(launch.ended)
        launch.signal(victim, signal.SIGKILL)
        return self._seen(launch, run, victim, moment, ended)

    def _hang(self, launch: Launch, run: RunFolder) -> Fault | None:
        """Make a rank hang. Return the fault, or None if the command ended first."""
        victim, kind = self._random.randrange(self._ranks), _HANGS[self._hung % len(_HANGS)]
        if launch.until(lambda beats: True) is None:
            return None
        ended = len(launch.ended)
        if kind == "stopped":
            if launch.until(lambda beats: min(beat.step for beat in beats.values()) >= 0) is None:
                return None
            launch.signal(victim, signal.SIGSTOP)
        else:
            planted = run.folder / _PLANTED
            # ranks poll for this file, so create it atomically
            aside = planted.with_suffix(".new")
            aside.write_text(json.dumps({"rank": victim, "kind": kind}), "utf-8")
            aside.rename(planted)
            if launch.until(lambda beats: not planted.exists()) is None:
                planted.unlink(missing_ok=True)
                return None
        self._hung += 1
        return self._seen(launch, run, victim, kind, ended)

    def _seen(self, launch: Launch, run: RunFolder, victim: int, moment: str, ended: int) -> Fault | None:
        """Check that the fault just planted is named, wait until the ranks train again, and return the fault.

        Return None if the run ended before the fault took effect.
        """
        began = time.monotonic()
        noticed = resumed = None
        if victim < 0:
            launch.wait()
        else:
            before = launch.ended
            while len(launch.ended) == ended and launch.exit_code is None:
                time.sleep(0.0005)
            noticed, before = time.monotonic() - began, launch.ended
            if len(before) == ended or before[ended]["exit_code"] == 0:
                # the run had already ended
                return None
            why, named = before[ended]["why"], before[ended]["ranks"]
            # if a rank's messages are lost, the other ranks hang first and this rank later, so others must be named
            right = named == [victim] if moment != "message" else bool({*named} - {victim})
            assert right, f"{moment} of rank {victim}: {why}"
            assert moment != "message" or re.search(rf"from ranks? ([\d, ]* )?{victim}\b", why), why
            wanted = {"stopped": "is stopped"} | _WORDS
            assert wanted.get(moment, "was killed") in before[ended]["why"], f"{moment}: {before[ended]['why']}"
            # heartbeats of the ended attempt can still be read, so wait for those of a later attempt
            last = before[ended]["attempt"]
            launch.until(lambda beats: all(beat.attempt > last and beat.step >= 0 for beat in beats.values()))
            resumed = time.monotonic() - began
        steps = (
            [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)] if run.checkpoints.exists() else []
        )
        name = "launcher" if victim < 0 else f"rank {victim}"
        return Fault(name, moment, max(steps, default=0), bool(_unfinished(run)), noticed, resumed)


def tiny_config(text: Path, ranks: int, strategy: str, patience: float) -> Config:
    """Return the configuration of a run that takes a few seconds, saves every second step, and evaluates."""
    model = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=ranks, num_key_value_heads=1, intermediate_size=24
    )
    return Config(
        run=RunConfig(seed=3),
        data=DataConfig(path=str(text), tokens_per_step=256, max_document_tokens=100, context_length=128),
        model=model,
        parallel=ParallelConfig(ranks=ranks, strategy=strategy, layout="document_zigzag", min_chunk=16),
        train=TrainConfig(steps=STEPS, schedule="cosine", warmup_steps=2),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=3),
        supervision=SupervisionConfig(max_restarts=1000, patience_seconds=patience, starting_seconds=120),
        evaluation=EvaluationConfig(every_steps=5, steps=1),
        reference_check=ReferenceCheckConfig(steps=0),
    )


def compare_runs(run: RunFolder, wanted: RunFolder) -> None:
    """Raise AssertionError if two runs differ in metrics, documents or bytes of tensors, or if there are leftover files."""
    curve = {row["step"]: _without(row, _TIMES) for row in read_rows(wanted.metrics_file)}
    assert sorted(curve) == list(range(1, STEPS + 1))
    rows = read_rows(run.metrics_file)
    assert {row["step"] for row in rows} == set(curve)
    for row in rows:
        # compare all rows, including those of attempts whose steps were repeated
        assert _without(row, _TIMES) == curve[row["step"]], f"{run.folder}: {row}, not {curve[row['step']]}"
    for split in ("training", "evaluation"):
        assert run.losses(split) == wanted.losses(split), f"{run.folder}: {split} losses differ"
    for step in range(STEPS):
        pieces, others = (
            [_without(row, _PLACES) for row in documents_of_step(run_folder.documents_file, step)]
            for run_folder in (run, wanted)
        )
        assert pieces == others, f"{run.folder}: step {step} was trained on other documents"
    assert _digests(run) == _digests(wanted), f"{run.folder}: the last checkpoint has other bytes"
    names = sorted(os.listdir(run.checkpoints))
    assert names == sorted(os.listdir(wanted.checkpoints)), f"{run.folder}: {names} are left in checkpoints"
    files, expected = ({name for name in os.listdir(run_folder.folder)} for run_folder in (run, wanted))
    # a resumed run records that it was resumed, and keeps its earlier configurations
    left = {name for name in files - expected if name != "events.jsonl" and not name.startswith("config.until-")}
    assert not left and not expected - files, f"{run.folder}: {left} are left, {expected - files} are missing"


def run_faults(
    kills: int, hangs: int, seed: int, ranks: int, strategy: str, patience: float, folder: Path
) -> FaultReport:
    """Kill ranks and launchers `kills` times and make ranks hang `hangs` times. Return the report."""
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    # a forked process must not use the parent's thread pool
    torch.set_num_threads(1)
    began = time.monotonic()
    faults = Faults(folder, seed, ranks, strategy, patience)
    while left := kills + hangs - len(faults.faults):
        hung = sum(fault.moment in _HANGS for fault in faults.faults)
        faults.until_done(left - (hangs - hung), hangs - hung)
    return FaultReport(faults.faults, faults.runs, time.monotonic() - began)


def rank(folder: str, json_lines: bool, proposed: str = "") -> int:
    """Run the trainer on this rank, and hang if a file in the run folder tells it to. Return the exit code."""
    planted, told = Path(folder, _PLANTED), heartbeats._CURRENT
    write = told.write
    assert write is not None

    first: list[int] = []
    lost = threading.Event()
    exchange = GroupTransport.exchange

    def lose(
        transport: GroupTransport, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> PendingMessages:
        if lost.is_set():
            # stay out of an all-to-all, so that the other ranks wait in theirs
            sends, collective = [], False
        return exchange(transport, sends, receives, collective, where)

    # imitate a network that accepts messages but does not deliver them
    GroupTransport.exchange = lose  # type: ignore[method-assign]

    def write_and_hang(activity: str, step: int, *fields: Any) -> None:
        write(activity, step, *fields)
        if step >= 0 and not first:
            first.append(step)
        # do not hang in the first steps of an attempt, in which ranks are allowed more time
        if first and step > first[0] + 1:
            try:
                fault = json.loads(planted.read_text("utf-8"))
            except FileNotFoundError:
                # no fault is planted, or a different rank has just claimed it
                return
            if fault["rank"] == int(os.environ["RANK"]) and _WORDS[fault["kind"]] in activity:
                planted.unlink()
                if fault["kind"] == "message":
                    lost.set()
                else:
                    _stand_still(fault["kind"])

    told.write = write_and_hang
    return rank_process.run(folder, json_lines, proposed)


def _stand_still(kind: str) -> None:
    """Block forever. kind: the kind of hang."""
    if kind == "lock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    if kind == "interpreter":
        while True:
            # sleep without releasing the GIL, repeatedly, because a signal interrupts the call
            ctypes.PyDLL(None).sleep(1000)
    if kind == "read":
        # read from a pipe that no process writes to
        os.read(os.pipe()[0], 1)


def _launcher(command: list[str], log: Path) -> None:
    die_with_launcher(os.getppid())
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w", buffering=1) for _ in range(2))
    run_locally.RANK = "trainer_kills:rank"
    code = cli.main(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for_save(launch: Launch, run: RunFolder) -> None:
    """Wait until a new save has started or the command has ended."""
    for begins in (False, True):
        while launch.exit_code is None and bool(_unfinished(run)) != begins:
            time.sleep(0.0005)


def _unfinished(run: RunFolder) -> list[str]:
    return [name for name in os.listdir(run.checkpoints) if "." in name] if run.checkpoints.exists() else []


def _without(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _digests(run: RunFolder) -> dict[str, Any]:
    """Return the digests of the tensor files in the last step's checkpoint, keyed by file name."""
    manifest = json.loads((run.checkpoints / f"step-{STEPS:08d}" / "manifest.json").read_text("utf-8"))
    return {file["name"]: file["blocks"] for file in manifest["files"] if file["name"].endswith(".distcp")}


def main() -> int:
    """Run the faults and print the report. Return exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 200), ("hangs", 20), ("seed", 1), ("ranks", 2)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--strategy", default="ring")
    # shorter than in real runs, because a step here only takes a tenth of a second
    parser.add_argument("--patience", type=float, default=5, help="seconds without a heartbeat that are a hang")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in; by default a temporary one")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = run_faults(
            arguments.kills,
            arguments.hangs,
            arguments.seed,
            arguments.ranks,
            arguments.strategy,
            arguments.patience,
            folder,
        )
    for name, faults in (
        ("kills", [fault for fault in report.faults if fault.moment not in _HANGS]),
        ("hangs", [fault for fault in report.faults if fault.moment in _HANGS]),
    ):
        counts = Counter(f"{fault.victim}" for fault in faults), Counter(fault.moment for fault in faults)
        texts = (", ".join(f"{number} {label}" for label, number in sorted(count.items())) for count in counts)
        sys.stdout.write(f"{len(faults)} {name}: {'; '.join(texts)}\n")
        for label, seconds in (
            ("noticed", [fault.noticed for fault in faults if fault.noticed is not None]),
            ("all ranks in a step again", [fault.resumed for fault in faults if fault.resumed is not None]),
        ):
            if seconds:
                sys.stdout.write(
                    f"  {label} after {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s (most)\n"
                )
    sys.stdout.write(
        f"{sum(fault.amid_save for fault in report.faults)} left a part of a save, "
        f"{sum(not fault.step for fault in report.faults)} came before the first checkpoint. All ranks were named.\n"
        f"{report.runs} runs of {STEPS} steps came to their end in {report.seconds:.0f} s: curves, losses by position, "
        "documents and the last checkpoint's digests are those of an undisturbed run, and nothing was left over.\n"
    )
    return 0


if __name__ == "__main__":
    guard_processes()
    sys.exit(main())
