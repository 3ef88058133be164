"""The run folder: everything a run writes, and the one place that knows the names of its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distattn.checkpoints.held_folder import HeldFolder
from distattn.ir.errors import DistattnError
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.job_secret import write_secret
from distattn.training.json_lines import JsonLines, Row, append_rows, json_text, read_rows, write_whole

# whose losses by position and corpus are written
TRAINING, EVALUATION = "training", "evaluation"
# the kind of an event: ranks have loaded a checkpoint, and go on from its step
RESUMED = "resumed"


@dataclass(frozen=True)
class StepMetrics:
    """What one training step reports.

    loss: mean over tokens, in nats; grad_norm: before clipping; tokens: of all ranks; seconds: wall time of the step on rank 0.
    learning_rate: of this step. context_length: tokens of a pack. mfu: share of the devices' peak, in [0, 1]. skipped: why the
    step was not applied, empty where it was. Of rank 0, as in `step_clock.StepCosts`: data_seconds, wait_seconds, and bytes of
    memory. None where it is not known.
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
        """Tokens of all ranks over the step's wall time."""
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """What is known of the step, for a JSON line."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


class RunFolder:
    """The folder of one run, and the names of the files in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lines: dict[Path, JsonLines] = {}
        self._held: HeldFolder | None = None
        self.config_file = folder / "config.toml"
        # of a run on text: its bytes as an indexed file, and the plan of its packs
        self.corpus_prefix = folder / "corpus"
        self.packs_file = folder / "corpus.packs"
        # the pieces of documents that each step was trained on
        self.documents_file = folder / "documents.jsonl"
        self.metrics_file = folder / "metrics.jsonl"
        # losses by position and corpus of training, and of evaluations
        self.losses_file = folder / "losses.jsonl"
        # steps that were refused and what was found, restarts, ranks that compute wrongly
        self.events_file = folder / "events.jsonl"
        # how fast ranks are, and errors that their GPUs count; what a scrape of the same must show
        self.health_file = folder / "health.jsonl"
        self.prometheus_token = folder / "prometheus_token"
        # its name in Weights & Biases
        self.wandb_file = folder / "wandb_id"
        # a checkpoint each, and the weights before the first step, which the reference check begins with
        self.checkpoints = folder / "checkpoints"
        self.initial_weights = folder / "initial"
        self.plan_file = folder / "plan.npz"
        self.explanation_file = folder / "plan.txt"
        self.report_file = folder / "report.html"
        # what a process must know to be a rank of the run
        self.secret_file = folder / "secret"
        self.replay_file = folder / "replay.jsonl"
        self.reference_check_file = folder / "reference_check.json"
        # what the ranks found of each other before the first step
        self.preflight_file = folder / "preflight.json"
        self.logs = folder / "logs"
        # why ranks were started again, and where they stood
        self.attempts = folder / "attempts"
        # who makes it asks the run to save and to end; it holds the reason
        self.stop_file = folder / "stop"
        # a launcher makes it to have ranks save and end, and starts them again on more nodes
        self.regroup_file = folder / "regroup"
        # of a batch system
        self.script_file = folder / "job.sbatch"
        self.job_file = folder / "job.json"
        self.state_file = folder / "state"
        # of a cluster of Ray: who runs its attempts, and where
        self.ray_file = folder / "ray.json"

    def proposed_config_file(self, name: str) -> Path:
        """Return the file of what a launcher proposes to its ranks, until they have accepted it; see `Proposal`."""
        return self.folder / f"config.proposed-{name}.toml"

    def applied_config_file(self, name: str) -> Path:
        """Return the file of what the ranks of a launcher have accepted."""
        return self.folder / f"config.applied-{name}.toml"

    def proposals(self) -> list[str]:
        """Return the names of the proposals in the folder, accepted or not."""
        files = [*self.folder.glob("config.proposed-*.toml"), *self.folder.glob("config.applied-*.toml")]
        return sorted({file.stem.partition("-")[2] for file in files})

    def log_file(self, rank: int) -> Path:
        """The file of a rank's output, where the run keeps logs."""
        return self.logs / f"rank-{rank}.log"

    def note_job(self, job: int | str) -> None:
        """Leave the number of the Slurm job of a run, or of a sweep, where it is looked up. Raises OSError."""
        write_whole(self.job_file, json_text({"job": job}) + "\n")

    def ask_to_stop(self, reason: str) -> None:
        """Have the ranks save and end after their next step, with exit code 75; a reason that is there stays."""
        with suppress(FileExistsError), open(self.stop_file, "x", encoding="utf-8") as file:
            file.write(f"{reason}\n")

    def forget_requests(self) -> None:
        """Remove what asked ranks to end that have ended. Raises OSError."""
        for file in (self.stop_file, self.regroup_file):
            file.unlink(missing_ok=True)

    def accept_config(self, config: Config, step: int) -> None:
        """Make a configuration the run's; the one before is kept as config.until-STEP.toml. No rank may read it then.

        step: that the ranks go on from. Where the run goes on from the same step again, the next one that is kept is
        config.until-STEP-2.toml, and so on. Raises OSError; the run's configuration stays then.
        """
        if configuration.load(self.config_file) == config:
            return
        before, number = self.config_file.read_text("utf-8"), 1
        newest, file = None, self.folder / f"config.until-{step}.toml"
        while file.exists():
            number += 1
            newest, file = file, self.folder / f"config.until-{step}-{number}.toml"
        # a process that was killed here has written it
        if newest is None or newest.read_text("utf-8") != before:
            write_whole(file, before)
        configuration.save(config, self.config_file)

    @staticmethod
    def create(config: Config) -> RunFolder:
        """Make a new folder with the configuration in it. Raises DistattnError where it cannot."""
        try:
            run = RunFolder(_new_folder(Path(config.run.folder)))
            configuration.save(config, run.config_file)
            write_secret(run.secret_file)
        except OSError as error:
            raise DistattnError(f"run.folder: {config.run.folder} cannot be written: {error.strerror}.") from None
        return run

    def append(self, path: Path, *rows: Row) -> None:
        """Add JSON lines to a file of the run; see `JsonLines`."""
        self.lines(path).add(lambda: rows)

    def lines(self, path: Path, append: Callable[[Path, Sequence[Row]], None] = append_rows) -> JsonLines:
        """Return the JSON lines of a file of the run, which `close` closes."""
        if path not in self._lines:
            self._lines[path] = JsonLines(path, append, self.is_in_place)
        return self._lines[path]

    def hold(self) -> HeldFolder:
        """Keep the folder open until `close`, so that this process notices where it is moved or deleted. Raises OSError."""
        if self._held is None:
            self._held = HeldFolder(self.folder)
        return self._held

    def is_in_place(self) -> bool:
        """Return whether the folder's path names the folder that this process holds, if it holds it."""
        return self._held is None or self._held.is_in_place()

    def follow(self) -> Path | None:
        """Return where the held folder is now, and have waiting lines added there; None where that is nowhere."""
        place = None if self._held is None else self._held.where()
        if place is not None:
            for lines in self._lines.values():
                lines.move_to(place)
        return place

    def close(self) -> None:
        """Add the lines that waited for room on the disk; see `JsonLines`. Let go of the folder."""
        for lines in self._lines.values():
            lines.close()
        if self._held is not None:
            self._held.close()
            self._held = None

    def metrics(self, steps: float = math.inf) -> list[StepMetrics]:
        """Return the metrics of the steps so far, in their order; of a step that was done again after going back, the last.

        steps: of the run's configuration. Later ones, done before the run went on with fewer steps, are left out.
        """
        last = {row["step"]: StepMetrics(**row) for row in read_rows(self.metrics_file) if row["step"] <= steps}
        return [last[step] for step in sorted(last)]

    def losses(self, split: str, steps: float = math.inf) -> list[dict[str, Any]]:
        """Return rows of `losses.jsonl` of one split (EVALUATION or TRAINING) in the order of their steps, the last of each step.

        steps: as for `metrics`.
        """
        rows = {
            row["step"]: row for row in read_rows(self.losses_file) if row["split"] == split and row["step"] <= steps
        }
        return [rows[step] for step in sorted(rows)]

    def steps_done(self) -> int:
        """Return the last step that the run has done, or that of the checkpoint which it has gone on from since.

        0 before the first. Raises DistattnError where the configuration cannot be read.
        """
        if not self.metrics_file.exists():
            return 0
        rows, done = read_rows(self.metrics_file), 0
        if rows:
            done = rows[-1]["step"]
        resumed = [event for event in self.events() if event["kind"] == RESUMED]
        # no step was done since
        if resumed and resumed[-1].get("metrics_bytes", -1) >= self.metrics_file.stat().st_size:
            done = resumed[-1]["step"]
        # later steps, done before the run went on with fewer, do not count
        return min(done, configuration.load(self.config_file).train.steps)

    def resumed_facts(self) -> Row:
        """Return what tells whether steps were done after the event of kind RESUMED that has it: the length of the metrics."""
        with suppress(OSError):
            return {"metrics_bytes": self.metrics_file.stat().st_size}
        return {}

    def events(self) -> list[dict[str, Any]]:
        """What happened seldom, in the order in which it happened: step, kind, text, and facts of the kind."""
        return read_rows(self.events_file)


def _new_folder(wanted: Path) -> Path:
    """The folder, or the first free one numbered from 2; two runs started together get two folders."""
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
