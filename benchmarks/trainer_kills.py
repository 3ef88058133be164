"""A training run that is killed again and again ends with the curve and the checkpoint of one that nobody disturbed.

    python benchmarks/trainer_kills.py [--kills 200] [--seed 1] [--folder FOLDER]

`distattn train` of a tiny model on 2 ranks is killed by SIGKILL at a random moment: one of the ranks, or the launcher. Half of
the kills fall amid a save. `distattn resume` goes on, and is killed as well, until the run has come to its end. Then every line
of its metrics, its losses by position, the documents of each step and the digests of the last checkpoint's tensors must be those
of a run without a kill, and nothing may be left over; and the next run begins.

The commands are the real ones, in processes that are forked from this one after its imports, which take longer than a run. Ranks
are started as torchrun starts them, by a launcher that ends them when one has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoint_faults import hold_store

from distattn.checkpoints.checkpoint_folder import list_checkpoints, newest_good
from distattn.launch import cli, local
from distattn.launch.die_with_launcher import die_with_launcher
from distattn.training import config as configuration
from distattn.training import rank as rank_process
from distattn.training.config_sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ParallelConfig,
    ReferenceCheckConfig,
    RunConfig,
    TrainConfig,
)
from distattn.training.json_lines import read_rows
from distattn.training.run_folder import RunFolder
from distattn.training.step_documents import documents_of_step

RANKS, STEPS = 2, 14
TEXT = Path(__file__).parents[1] / "LICENSE"
# only what hangs takes so long
LIMIT_SECONDS = 300.0
# about what a save takes, so that a kill amid one falls anywhere in it
MOST_SAVE_SECONDS = 0.03
_SIGNALLED = 128
# what differs between two runs of the same steps
_PLACES = ("file", "attempt")
_TIMES = ("seconds", "data_seconds", "wait_seconds", "memory_resident")
# imported before ranks are forked
_LATE_IMPORTS = ("torch.utils.tensorboard", "matplotlib.image", "matplotlib.figure", "distattn.launch.run_locally")


class Kill(NamedTuple):
    """One kill. victim: a rank, or the launcher; amid_save: whether a part of a save was left; step: of the newest checkpoint."""

    victim: str
    amid_save: bool
    step: int


class KillReport(NamedTuple):
    """What the kills have shown. runs: so many came to their end, and were compared."""

    kills: list[Kill]
    runs: int
    seconds: float


class Attempt:
    """`distattn train` or `distattn resume` in a forked process, with its ranks in forked ones. Output goes to a file."""

    def __init__(self, words: Sequence[str], log: Path):
        context = multiprocessing.get_context("fork")
        self._pids, self._log = context.SimpleQueue(), log
        self._launcher = context.Process(target=_launcher, args=(list(words), self._pids, log))
        self._launcher.start()
        self._ranks: list[int] = []

    @property
    def exit_code(self) -> int | None:
        """Of the command; None while it runs."""
        return self._launcher.exitcode

    def wait_for_ranks(self) -> bool:
        """Return once the ranks' processes are there; False where the command ended before."""
        ends = time.monotonic() + LIMIT_SECONDS
        while self._pids.empty() and self.exit_code is None and time.monotonic() < ends:
            time.sleep(0.001)
        if not self._pids.empty():
            self._ranks = self._pids.get()
        return bool(self._ranks)

    def kill(self, victim: int) -> None:
        """Kill a rank, or, -1, the launcher."""
        pid = self._launcher.pid if victim < 0 else self._ranks[victim]
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> int:
        """The command's exit code, once all its processes have ended."""
        self._launcher.join(LIMIT_SECONDS)
        assert self.exit_code is not None, f"the launcher hangs: {self.said()}"
        ends = time.monotonic() + LIMIT_SECONDS
        while left := [pid for pid in self._ranks if _runs(pid)]:
            assert time.monotonic() < ends, f"ranks {left} hang: {self.said()}"
            time.sleep(0.002)
        return self.exit_code

    def said(self) -> str:
        """What the command and its ranks have printed."""
        return self._log.read_text("utf-8", "replace")


class Killer:
    """Runs that are killed until they have come to their end, and compared with one that nobody disturbed."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._random = folder, random.Random(seed)
        self.kills: list[Kill] = []
        self.runs = 0
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "text"
        text.mkdir()
        for number, paragraph in enumerate(TEXT.read_text("utf-8").split("\n\n")):
            (text / f"{number:03d}.txt").write_text(paragraph, "utf-8")
        self._config_file = folder / "run.toml"
        configuration.save(tiny_config(text), self._config_file)
        self._undisturbed = RunFolder(folder / "undisturbed")
        attempt = Attempt(self._command(self._undisturbed), folder / "undisturbed.log")
        attempt.wait_for_ranks()
        began = time.monotonic()
        assert attempt.wait() == 0, attempt.said()
        # a kill may fall anywhere in a run
        self._seconds = time.monotonic() - began

    def kill_until_done(self, most: int) -> None:
        """One run, killed at most so many times; then it comes to its end, and is compared."""
        self.runs += 1
        run, killed, before = RunFolder(self._folder / f"run-{self.runs}"), 0, 0
        while True:
            attempt = Attempt(self._command(run), self._folder / f"run-{self.runs}-{killed}.log")
            found = self._kill(attempt, run) if killed < most else None
            code = attempt.wait()
            assert "Resuming from" not in attempt.said(), attempt.said()
            if found is None or code == 0:
                break
            victim, amid_save = found
            wanted = -signal.SIGKILL if victim == "launcher" else _SIGNALLED + signal.SIGKILL
            assert code == wanted, f"{victim} was killed, and the command ended with {code}: {attempt.said()}"
            before = self._checked(run, before)
            killed += 1
            self.kills.append(Kill(victim, amid_save, before))
            sys.stderr.write(
                f"kill {len(self.kills)}: {victim}{', amid a save' if amid_save else ''}; run {self.runs} is at step {before}\n"
            )
        assert code == 0, attempt.said()
        compare_runs(run, self._undisturbed)

    def _command(self, run: RunFolder) -> list[str]:
        if run.folder.exists():
            return ["resume", str(run.folder)]
        return ["train", str(self._config_file), f"--run.folder={run.folder}"]

    def _kill(self, attempt: Attempt, run: RunFolder) -> tuple[str, bool] | None:
        """Kill somebody at a random moment: (who, whether a part of a save was left); None where the command ended before."""
        if not attempt.wait_for_ranks():
            return None
        if self._random.random() < 0.5:
            time.sleep(self._random.uniform(0, self._seconds))
        else:
            # amid one of the next saves
            for _ in range(self._random.randrange(1, 5)):
                _wait_for_save(attempt, run, begins=False)
                _wait_for_save(attempt, run, begins=True)
            time.sleep(self._random.uniform(0, MOST_SAVE_SECONDS))
        victim = self._random.choice([*range(RANKS), -1])
        attempt.kill(victim)
        attempt.wait()
        return ("launcher" if victim < 0 else f"rank {victim}", bool(_unfinished(run)))

    def _checked(self, run: RunFolder, before: int) -> int:
        """The step of the newest checkpoint, which is whole and not older than the one before."""
        steps = [one.step for one in list_checkpoints(run.checkpoints)]
        newest = newest_good(run.checkpoints)
        found = 0 if newest is None else int(newest.name.removeprefix("step-"))
        assert found == max(steps, default=0) >= before, f"{newest} is left, of steps {steps}, after step {before}"
        return found


def tiny_config(text: Path) -> Config:
    """A run of some seconds that saves every second step, and evaluates."""
    model = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24
    )
    return Config(
        run=RunConfig(seed=3),
        data=DataConfig(path=str(text), tokens_per_step=256, max_document_tokens=100, context_length=128),
        model=model,
        parallel=ParallelConfig(ranks=RANKS, layout="document_zigzag", min_chunk=16),
        train=TrainConfig(steps=STEPS, schedule="cosine", warmup_steps=2),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=3),
        evaluation=EvaluationConfig(every_steps=5, steps=1),
        reference_check=ReferenceCheckConfig(steps=0),
    )


def compare_runs(run: RunFolder, wanted: RunFolder) -> None:
    """Raise AssertionError where a run differs from another in a number, a document, a tensor's byte, or by a leftover."""
    curve = {row["step"]: _without(row, _TIMES) for row in read_rows(wanted.metrics_file)}
    assert sorted(curve) == list(range(1, STEPS + 1))
    rows = read_rows(run.metrics_file)
    assert {row["step"] for row in rows} == set(curve)
    for row in rows:
        # also those of attempts whose steps were done again
        assert _without(row, _TIMES) == curve[row["step"]], f"{run.folder}: {row}, not {curve[row['step']]}"
    for split in ("training", "evaluation"):
        assert run.losses(split) == wanted.losses(split), f"{run.folder}: {split} losses differ"
    for step in range(STEPS):
        pieces, others = (
            [_without(row, _PLACES) for row in documents_of_step(one.documents_file, step)] for one in (run, wanted)
        )
        assert pieces == others, f"{run.folder}: step {step} was trained on other documents"
    assert _digests(run) == _digests(wanted), f"{run.folder}: the last checkpoint has other bytes"
    names = sorted(os.listdir(run.checkpoints))
    assert names == sorted(os.listdir(wanted.checkpoints)), f"{run.folder}: {names} are left in checkpoints"
    files, expected = ({name for name in os.listdir(one.folder)} for one in (run, wanted))
    # that a run was resumed is written down, and its configurations are kept
    left = {name for name in files - expected if name != "events.jsonl" and not name.startswith("config.until-")}
    assert not left and not expected - files, f"{run.folder}: {left} are left, {expected - files} are missing"


def run_kills(kills: int, seed: int, folder: Path) -> KillReport:
    """Kill runs so many times."""
    # what ranks would import takes longer than their steps
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    # a forked process must not use the parent's pool
    torch.set_num_threads(1)
    began = time.monotonic()
    killer = Killer(folder, seed)
    while len(killer.kills) < kills:
        killer.kill_until_done(kills - len(killer.kills))
    return KillReport(killer.kills, killer.runs, time.monotonic() - began)


def _launcher(words: list[str], pids: Any, log: Path) -> None:
    die_with_launcher(os.getppid())
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w", buffering=1) for _ in range(2))
    local.run_ranks = functools.partial(_run_ranks, pids)
    code = cli.main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_ranks(pids: Any, ranks: int, module: str, *arguments: str) -> int:
    """In place of `local.run_ranks`: forks, and as torchrun does, holds the ranks' store, and ends them when one has failed."""
    assert module == "distattn.launch.rank"
    context = multiprocessing.get_context("fork")
    port = context.SimpleQueue()
    holder = context.Process(target=_hold_store, args=(port,))
    holder.start()
    number = port.get()
    processes = [context.Process(target=_rank, args=(rank, ranks, number, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    pids.put([process.pid for process in processes])
    failed: list[int] = []
    while not failed and any(process.exitcode is None for process in processes):
        time.sleep(0.002)
        failed = [process.exitcode for process in processes if process.exitcode]
    for process in processes:
        if failed:
            process.terminate()
        process.join()
    holder.kill()
    # who was killed is the cause, and others failed for it
    code = min(failed, default=0)
    return _SIGNALLED - code if code < 0 else code


def _hold_store(port: Any) -> None:
    die_with_launcher(os.getppid())
    hold_store(port)


def _rank(rank: int, ranks: int, port: int, folder: str, json_lines: str) -> None:
    die_with_launcher(os.getppid())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.exit(rank_process.main(folder, json.loads(json_lines)))


def _wait_for_save(attempt: Attempt, run: RunFolder, begins: bool) -> None:
    """Return once a save has begun, or, without `begins`, once none is under way; or the command has ended."""
    while attempt.exit_code is None and bool(_unfinished(run)) != begins:
        time.sleep(0.0005)


def _unfinished(run: RunFolder) -> list[str]:
    return [name for name in os.listdir(run.checkpoints) if "." in name] if run.checkpoints.exists() else []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _without(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _digests(run: RunFolder) -> dict[str, Any]:
    """Of the files of the last step's tensors, by their names."""
    manifest = json.loads((run.checkpoints / f"step-{STEPS:08d}" / "manifest.json").read_text("utf-8"))
    return {file["name"]: file["blocks"] for file in manifest["files"] if file["name"].endswith(".distcp")}


def main() -> int:
    """Kill, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="an empty folder to work in; by default a temporary one")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = run_kills(given.kills, given.seed, folder)
    victims = Counter(kill.victim for kill in found.kills)
    sys.stdout.write(
        f"{len(found.kills)} kills in {found.seconds:.0f} s: "
        f"{', '.join(f'{count} of {victim}' for victim, count in sorted(victims.items()))}; "
        f"{sum(kill.amid_save for kill in found.kills)} left a part of a save, "
        f"{sum(not kill.step for kill in found.kills)} came before the first checkpoint.\n"
        f"{found.runs} runs of {STEPS} steps came to their end: curves, losses by position, documents and the last checkpoint's "
        "digests are those of an undisturbed run, and nothing was left over.\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
