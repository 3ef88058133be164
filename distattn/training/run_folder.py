"""The run folder: everything a run writes, and the one place that knows the names of its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from distattn.data.packing import pack_epoch
from distattn.data.text import Corpus, Document
from distattn.ir.errors import DistattnError
from distattn.training import config as configuration
from distattn.training.config import Config


@dataclass(frozen=True)
class StepMetrics:
    """What one training step reports.

    loss: mean over tokens, in nats; grad_norm: before clipping; tokens: of all ranks; seconds: wall time of the step on rank 0.
    """

    step: int
    loss: float
    grad_norm: float
    tokens: int
    seconds: float


class RunFolder:
    """The folder of one run, and the names of the files in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config_file = folder / "config.toml"
        self.documents_file = folder / "documents.jsonl"
        self.metrics_file = folder / "metrics.jsonl"
        self.plan_file = folder / "plan.npz"
        self.explanation_file = folder / "plan.txt"
        self.report_file = folder / "report.html"
        self.replay_file = folder / "replay.jsonl"
        self.reference_check_file = folder / "reference_check.json"
        self.logs = folder / "logs"
        # of a batch system
        self.script_file = folder / "job.sbatch"
        self.job_file = folder / "job.json"
        self.state_file = folder / "state"

    def log_file(self, rank: int) -> Path:
        """The file of a rank's output, where the run keeps logs."""
        return self.logs / f"rank-{rank}.log"

    @staticmethod
    def create(config: Config, packs: Iterable[Sequence[Document]]) -> RunFolder:
        """Make a new folder with the configuration and the documents of every pack. Raises DistattnError where it cannot."""
        try:
            run = RunFolder(_new_folder(Path(config.run.folder)))
            configuration.save(config, run.config_file)
            with open(run.documents_file, "w", encoding="utf-8") as file:
                for number, pack in enumerate(packs):
                    of_pack = {"step": number // config.parallel.data_parallel_size, "pack": number}
                    for document in pack:
                        file.write(json.dumps({**of_pack, **document._asdict()}) + "\n")
        except OSError as error:
            raise DistattnError(f"run.folder: {config.run.folder} cannot be written: {error.strerror}.") from None
        return run

    def steps(self) -> Iterator[list[list[Document]]]:
        """The packs of each step, in order, and the documents of each pack: a pack for each data-parallel rank."""
        with open(self.documents_file, encoding="utf-8") as file:
            rows = (json.loads(line) for line in file)
            for _, step in groupby(rows, key=lambda row: row["step"]):
                packs = groupby(step, key=lambda row: row["pack"])
                yield [[Document(row["file"], row["start"], row["end"]) for row in pack] for _, pack in packs]

    def append(self, path: Path, row: object) -> None:
        """Add one JSON line to a file of the run."""
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[StepMetrics]:
        """The metrics of the steps so far."""
        return [StepMetrics(**row) for row in read_lines(self.metrics_file)]


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def packs_of_run(config: Config, corpus: Corpus) -> Iterator[list[Document]]:
    """The documents of each pack of the epochs the run will enter, in order: whole epochs, with enough packs for all steps."""
    shares = config.parallel.data_parallel_size
    lengths = [document.length for document in corpus.documents]
    number, epoch = 0, 0
    while number < config.train.steps * shares:
        for pack in pack_epoch(lengths, config.data.tokens_per_step // shares, config.run.seed, epoch):
            yield [corpus.documents[i] for i in pack]
            number += 1
        epoch += 1


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
