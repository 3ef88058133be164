"""The run folder, which holds everything that a run writes. Only this module knows the names of its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distattn.checkpoints.folder_handle import FolderHandle
from distattn.ir.errors import DistattnError
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config
from distattn.training.job_secret import write_secret
from distattn.training.reporting.json_lines import JsonLines, Row, append_rows, json_text, read_rows, write_whole

# values of the field `split` in losses.jsonl
TRAINING, EVALUATION = "training", "evaluation"
# kind of event: the ranks loaded a checkpoint and continue from its step
RESUMED = "resumed"


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one training step. None means unknown.

    loss: mean over tokens, in nats. grad_norm: gradient norm before clipping. tokens: over all ranks. seconds: wall time
    on rank 0. context_length: tokens per pack. mfu: share of the devices' peak, in [0, 1]. skipped: why the step was not
    applied, or empty. data_seconds, wait_seconds and the memory in bytes are rank 0's; see `step_clock.StepCosts`.
    """

    step: int
    loss: float
    grad_norm: float
    tokens: int
    seconds: float
    learning_rate: float | None = None
    mfu: float | None = None
    data_seconds: float | None = None
    wait_seconds: float | None = None
    memory_allocated: int | None = None
    memory_reserved: int | None = None
    memory_resident: int | None = None
    skipped: str = ""
    context_length: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Throughput in tokens per second of wall time, over all ranks."""
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the known values of the step, for a JSON line."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


class RunFolder:
    """The folder of one run, with the paths of its files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lines: dict[Path, JsonLines] = {}
        self._held: FolderHandle | None = None
        self.config_file = folder / "config.toml"
        # for a run on text: the indexed file of its bytes, and the plan of its packs
        self.corpus_prefix = folder / "corpus"
        self.packs_file = folder / "corpus.packs"
        # the document pieces of each step
        self.documents_file = folder / "documents.jsonl"
        self.metrics_file = folder / "metrics.jsonl"
        # losses by position and corpus, in training and evaluation
        self.losses_file = folder / "losses.jsonl"
        # rare events, such as refused steps with their findings, restarts, and ranks that compute wrongly
        self.events_file = folder / "events.jsonl"
        # the ranks' speeds and GPU errors, and the token required to scrape them
        self.health_file = folder / "health.jsonl"
        self.prometheus_token = folder / "prometheus_token"
        # the run's id in Weights & Biases
        self.wandb_file = folder / "wandb_id"
        # one folder per checkpoint, and the initial weights, from which the reference check starts
        self.checkpoints = folder / "checkpoints"
        self.initial_weights = folder / "initial"
        self.plan_file = folder / "plan.npz"
        self.explanation_file = folder / "plan.txt"
        self.report_file = folder / "report.html"
        # proves that a process is a rank of the run
        self.secret_file = folder / "secret"
        self.replay_file = folder / "replay.jsonl"
        self.reference_check_file = folder / "reference_check.json"
        # results of the ranks' checks before the first step
        self.preflight_file = folder / "preflight.json"
        self.logs = folder / "logs"
        # why ranks were restarted, and their state at that time
        self.attempts = folder / "attempts"
        # while this file exists, the run is asked to save and end; it contains the reason
        self.stop_file = folder / "stop"
        # created by a launcher to make the ranks save and end, so that it can restart them on more nodes
        self.regroup_file = folder / "regroup"
        # for a run or sweep in a batch system (Slurm)
        self.script_file = folder / "job.sbatch"
        self.job_file = folder / "job.json"
        self.state_file = folder / "state"
        # on a Ray cluster: the process that runs the attempts, and its machine
        self.ray_file = folder / "ray.json"

    def proposed_config_file(self, name: str) -> Path:
        """Return the file of a launcher's proposal before its ranks accept it. See `Proposal`."""
        return self.folder / f"config.proposed-{name}.toml"

    def applied_config_file(self, name: str) -> Path:
        """Return the file of a launcher's proposal after its ranks have accepted it."""
        return self.folder / f"config.applied-{name}.toml"

    def proposals(self) -> list[str]:
        """Return the names of the proposals in the folder, accepted or not."""
        files = [*self.folder.glob("config.proposed-*.toml"), *self.folder.glob("config.applied-*.toml")]
        return sorted({file.stem.partition("-")[2] for file in files})

    def log_file(self, rank: int) -> Path:
        """Return the file of a rank's output, if the run keeps logs."""
        return self.logs / f"rank-{rank}.log"

    def note_job(self, job: int | str) -> None:
        """Record the Slurm job of a run or sweep. Raises OSError."""
        write_whole(self.job_file, json_text({"job": job}) + "\n")

    def ask_to_stop(self, reason: str) -> None:
        """Request that the ranks save and end after their next step, with exit code 75. An earlier reason is kept."""
        with suppress(FileExistsError), open(self.stop_file, "x", encoding="utf-8") as file:
            file.write(f"{reason}\n")

    def forget_requests(self) -> None:
        """Remove the requests to end. Call it after the ranks have ended. Raises OSError."""
        for file in (self.stop_file, self.regroup_file):
            file.unlink(missing_ok=True)

    def accept_config(self, config: Config, step: int) -> None:
        """Replace the run's configuration, and keep the old file as config.until-STEP.toml. Call this while no rank reads it.

        step: the step from which the ranks continue. Later changes at the same step keep the old file as
        config.until-STEP-2.toml and so on. Raises OSError, leaving the run's configuration unchanged.
        """
        if configuration.load(self.config_file) == config:
            return
        before, number = self.config_file.read_text("utf-8"), 1
        newest, file = None, self.folder / f"config.until-{step}.toml"
        while file.exists():
            number += 1
            newest, file = file, self.folder / f"config.until-{step}-{number}.toml"
        # if a process was killed between the two writes below, the old configuration has already been kept
        if newest is None or newest.read_text("utf-8") != before:
            write_whole(file, before)
        configuration.save(config, self.config_file)

    @staticmethod
    def create(config: Config) -> RunFolder:
        """Create a new run folder with the configuration in it. Raises DistattnError if it cannot be written."""
        try:
            run = RunFolder(_new_folder(Path(config.run.folder)))
            configuration.save(config, run.config_file)
            write_secret(run.secret_file)
        except OSError as error:
            raise DistattnError(f"run.folder: {config.run.folder} cannot be written: {error.strerror}.") from None
        return run

    def append(self, path: Path, *rows: Row) -> None:
        """Append JSON lines to a file of the run. See `JsonLines`."""
        self.lines(path).add(lambda: rows)

    def lines(self, path: Path, append: Callable[[Path, Sequence[Row]], None] = append_rows) -> JsonLines:
        """Return the `JsonLines` of a file of the run. `close` closes it."""
        if path not in self._lines:
            self._lines[path] = JsonLines(path, append, self.is_in_place)
        return self._lines[path]

    def hold(self) -> FolderHandle:
        """Keep the folder open until `close`, to notice if it is moved or deleted. Return its handle. Raises OSError."""
        if self._held is None:
            self._held = FolderHandle(self.folder)
        return self._held

    def is_in_place(self) -> bool:
        """Return False if this process holds the folder and the path no longer leads to it."""
        return self._held is None or self._held.is_in_place()

    def follow(self) -> Path | None:
        """Return the held folder's current path, where JSON lines continue from now on, or None if it no longer has a path."""
        place = None if self._held is None else self._held.where()
        if place is not None:
            for lines in self._lines.values():
                lines.move_to(place)
        return place

    def close(self) -> None:
        """Write the lines still waiting for disk space (see `JsonLines`), and release the folder."""
        for lines in self._lines.values():
            lines.close()
        if self._held is not None:
            self._held.close()
            self._held = None

    def metrics(self, steps: float = math.inf) -> list[StepMetrics]:
        """Return the metrics of the steps so far, in order. Steps repeated after a rollback keep only their last metrics.

        steps: the configured number of steps. Later steps, done before that number was lowered, are left out.
        """
        last = {row["step"]: StepMetrics(**row) for row in read_rows(self.metrics_file) if row["step"] <= steps}
        return [last[step] for step in sorted(last)]

    def losses(self, split: str, steps: float = math.inf) -> list[dict[str, Any]]:
        """Return the last row of each step in `losses.jsonl` for one split (EVALUATION or TRAINING), in step order.

        steps: see `metrics`.
        """
        rows = {
            row["step"]: row for row in read_rows(self.losses_file) if row["split"] == split and row["step"] <= steps
        }
        return [rows[step] for step in sorted(rows)]

    def steps_done(self) -> int:
        """Return the number of steps done: the last recorded step or, if the run has resumed since, its checkpoint's step.

        Raises DistattnError if the configuration cannot be read.
        """
        if not self.metrics_file.exists():
            return 0
        rows, done = read_rows(self.metrics_file), 0
        if rows:
            done = rows[-1]["step"]
        resumed = [event for event in self.events() if event["kind"] == RESUMED]
        # if no step was done since the last resume, the resumed checkpoint's step counts
        if resumed and resumed[-1].get("metrics_bytes", -1) >= self.metrics_file.stat().st_size:
            done = resumed[-1]["step"]
        # steps beyond the configured number, done before it was lowered, do not count
        return min(done, configuration.load(self.config_file).train.steps)

    def resumed_facts(self) -> Row:
        """Return facts for a RESUMED event: the current size of the metrics file, which later shows whether steps followed."""
        with suppress(OSError):
            return {"metrics_bytes": self.metrics_file.stat().st_size}
        return {}

    def events(self) -> list[dict[str, Any]]:
        """Return the run's events in chronological order. Each has step, kind, text, and fields that depend on the kind."""
        return read_rows(self.events_file)


def _new_folder(path: Path) -> Path:
    """Create the folder, or PATH-2, PATH-3, ... if it exists. Concurrent callers get different folders."""
    number = 1
    while True:
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
