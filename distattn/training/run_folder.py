"""The run folder: everything a run writes, and the one place that knows the names of its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from distattn.data.packing import pack_epoch
from distattn.data.text import Corpus, Document
from distattn.ir.errors import DistattnError
from distattn.ir.layout import make_layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Plan
from distattn.parallel.make_plan import make_plan
from distattn.training import config as configuration
from distattn.training.config import Config


@dataclass(frozen=True)
class Step:
    """What one training step reports: loss per token, gradient norm before clipping, tokens, seconds."""

    step: int
    loss: float
    grad_norm: float
    tokens: int
    seconds: float


class Run:
    """A run folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config_file = folder / "config.toml"
        self.documents_file = folder / "documents.jsonl"
        self.metrics_file = folder / "metrics.jsonl"
        self.plan_file = folder / "plan.npz"
        self.explanation_file = folder / "plan.txt"
        self.report_file = folder / "report.html"
        self.replay_file = folder / "replay.jsonl"
        self.proof_file = folder / "proof.json"
        self.logs = folder / "logs"
        # of a batch system
        self.script_file = folder / "job.sbatch"
        self.job_file = folder / "job.json"
        self.state_file = folder / "state"

    def log_file(self, rank: int) -> Path:
        """Where a rank's output goes, if the run keeps logs."""
        return self.logs / f"rank-{rank}.log"

    @staticmethod
    def create(config: Config, corpus: Corpus) -> Run:
        """A new folder with the configuration and the documents of every pack of the epochs the run will enter."""
        try:
            run = Run(_new_folder(Path(config.run.folder)))
            configuration.save(config, run.config_file)
            with open(run.documents_file, "w", encoding="utf-8") as file:
                for pack, document in _documents(config, corpus):
                    file.write(json.dumps({"pack": pack, **document._asdict()}) + "\n")
        except OSError as error:
            raise DistattnError(f"run.folder: {config.run.folder} cannot be written: {error.strerror}.") from None
        return run

    def packs(self) -> Iterator[list[Document]]:
        """The documents of each pack, in order."""
        with open(self.documents_file, encoding="utf-8") as file:
            rows = (json.loads(line) for line in file)
            for _, pack in groupby(rows, key=lambda row: row["pack"]):
                yield [Document(row["file"], row["start"], row["end"]) for row in pack]

    def first_plan(self, config: Config) -> Plan:
        """The plan of the first step's attention calls. Raises DistattnError when it cannot be made."""
        lengths = [document.end - document.start for document in next(self.packs())]
        return plan_of(config, lengths)

    def append(self, path: Path, row: object) -> None:
        """Add one JSON line to a file of the run."""
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[Step]:
        """The steps so far."""
        return [Step(**row) for row in read_lines(self.metrics_file)]


def plan_of(config: Config, lengths: list[int]) -> Plan:
    """The plan the configuration asks for on documents of these lengths."""
    parallel, model = config.parallel, config.model
    mask = Mask.documents(lengths)
    return make_plan(
        mask,
        make_layout(parallel.layout, lengths, parallel.ranks, mask, **parallel.layout_options),
        strategy=parallel.strategy,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.width // model.heads,
        dtype=model.dtype,
        backward=parallel.backward or None,
        cluster=parallel.cluster,
    )


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _documents(config: Config, corpus: Corpus) -> Iterable[tuple[int, Document]]:
    """(pack number, document) for whole epochs, until there are enough packs for the run."""
    lengths = [document.end - document.start for document in corpus.documents]
    number, epoch = 0, 0
    while number < config.train.steps:
        for pack in pack_epoch(lengths, config.data.axis, config.run.seed, epoch):
            yield from ((number, corpus.documents[i]) for i in pack)
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
