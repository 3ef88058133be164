"""A run's data: either text, whose bytes are written to an indexed file in the run folder, or an existing plan of packs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from distattn.data.files.corpus import Corpus
from distattn.data.files.text import VOCABULARY, TextCorpus, byte_corpus, find_corpus
from distattn.data.packing.make_pack_plan import CorpusLengths, make_pack_plan
from distattn.data.packing.pack_config import (
    PackConfig,
    load_pack_config,
    open_configured_plan,
    open_corpora,
    vocabulary_of,
)
from distattn.data.packing.pack_plan import PackPlan
from distattn.data.packing.pack_rule import PackRule
from distattn.data.packing.shares import check_pairs, check_shares, deal_packs
from distattn.ir.errors import DistattnError
from distattn.training.config.run_file import Config
from distattn.training.run_folder import RunFolder

# maximum number of packs in a packing window
_MOST_WINDOW = 1024
# name of the corpus made from a run's text
_TEXT = "text"


class RunData(NamedTuple):
    """A plan of packs and its corpora. vocabulary: upper bound (exclusive) of token ids."""

    plan: PackPlan
    corpora: list[Corpus]
    vocabulary: int

    @property
    def context(self) -> int:
        """Number of tokens in the longest pack."""
        return max(tokens for _, tokens in self.plan.rule.context)


def pack_config(config: Config) -> PackConfig | None:
    """Return the configuration of the plan of packs in data.path, or None if data.path names text."""
    return load_pack_config(config.data.path) if config.data.path.endswith(".toml") else None


def find_text(config: Config) -> TextCorpus:
    """Return the documents of the run's text without reading any file. Raises DistattnError if it has no documents."""
    data = config.data
    return find_corpus(
        data.path, suffix=data.suffix, exclude=data.exclude, max_document_tokens=data.max_document_tokens
    )


def write_text(run: RunFolder, config: Config, text: TextCorpus) -> None:
    """Write the bytes of the run's text and the plan of its packs to the run folder.

    Raises DamagedDataError if a file is not UTF-8 text or changes while it is read.
    """
    _plan_text(config, byte_corpus(text, str(run.corpus_prefix), _TEXT), run.packs_file)


def open_data(run: RunFolder, config: Config) -> RunData:
    """Return a run's data. Raises DistattnError if the data changed or do not suffice for all steps."""
    planned = pack_config(config)
    if planned is None:
        corpora = [Corpus.open(_TEXT, [str(run.corpus_prefix)], config.data.check_tokens)]
        return RunData(PackPlan.open(run.packs_file), corpora, vocabulary_size(config))
    data = _planned_data(config, planned)
    if config.parallel.overlap:
        check_pairs(data.plan, config.parallel.data_parallel_size, 0, config.train.steps)
    return data


def plan_longer(run: RunFolder, config: Config, data: RunData, path: Path) -> RunData:
    """Extend the plan of a run on text to its current number of steps, write it to `path`, and return the data with that plan.

    Raises DistattnError if held-out documents would be trained on, or if the longer plan would begin with different packs.
    """
    steps, plan = config.train.steps, data.plan
    if held_out_steps(config):
        raise DistattnError(
            f"train.steps: {steps:,}, but the last of the run's {plan.steps:,} planned steps are held out, and would be trained; "
            "name other documents in evaluation.path."
        )
    longer = make_pack_plan(path, data.corpora, seed=plan.seed, rule=plan.rule, steps=steps)
    if longer.order_digest != plan.order_digest or any(
        not np.array_equal(plan.step(step).rows, longer.step(step).rows) for step in range(plan.steps)
    ):
        raise DistattnError(
            f"train.steps: {steps:,}, but packs are now planned differently from when {run.packs_file} was made; use at most "
            f"{plan.steps:,}, or begin a new run."
        )
    return data._replace(plan=longer)


def vocabulary_size(config: Config, corpora: Sequence[Corpus] | None = None) -> int:
    """Return the upper bound (exclusive) of a run's token ids, or 0 if neither the run file nor the data files give it.

    corpora: the open corpora of the run's plan; opened here if None.
    """
    planned = pack_config(config)
    if config.model.vocab_size or planned is None:
        return config.model.vocab_size or VOCABULARY
    return vocabulary_of(open_corpora(planned) if corpora is None else corpora) or 0


@contextmanager
def planned_packs(config: Config) -> Iterator[PackPlan]:
    """Yield the plan of a run's packs before the run exists. For text, it is computed from the file sizes."""
    planned = pack_config(config)
    if planned is not None:
        yield _planned_data(config, planned).plan
        return
    lengths = np.array([document.length for document in find_text(config).documents], np.int32)
    with TemporaryDirectory() as folder:
        yield _plan_text(config, _Lengths(_TEXT, lengths, ""), Path(folder, "packs"))


def held_out_steps(config: Config) -> int:
    """Return how many steps at the end of the run's own plan are evaluated instead of trained."""
    evaluation = config.evaluation
    return evaluation.steps if evaluation.every_steps and not evaluation.path else 0


def held_out_data(config: Config, data: RunData) -> tuple[RunData, int]:
    """Return the evaluation data (from evaluation.path, or else the last steps of the run's own plan) and its first step.

    Raises DistattnError if there are too few steps, or if the held-out steps of the run's own plan repeat documents (a
    second epoch). `held_out.check_held_out` checks that no held-out document is also trained on.
    """
    begin, steps = data.plan.steps - config.evaluation.steps, config.evaluation.steps
    if config.evaluation.path:
        planned = load_pack_config(config.evaluation.path)
        corpora = open_corpora(planned)
        data, begin = RunData(open_configured_plan(planned, corpora), corpora, data.vocabulary), 0
        if data.plan.steps < steps:
            raise DistattnError(f"evaluation.steps: {steps:,}, but {data.plan.path} has {data.plan.steps:,} steps.")
        check_shares(data.plan, config.parallel.data_parallel_size, 0, steps)
    elif begin < config.train.steps:
        raise DistattnError(
            f"evaluation.steps: {steps:,} and train.steps {config.train.steps:,} are more than the {data.plan.steps:,} "
            "planned ones; use fewer, or name other documents in evaluation.path."
        )
    elif any(
        row["epoch"] for step in range(begin, begin + steps) for pack in data.plan.step(step).packs for row in pack.rows
    ):
        raise DistattnError(
            f"evaluation.steps: the data end with step {begin:,} and begin again, so later steps would not be held out; train "
            "fewer steps, or name other documents in evaluation.path."
        )
    return data, begin


def first_packs(plan: PackPlan, config: Config, step: int = 0) -> list[list[int]]:
    """Return each pack's document lengths in a step's first attention call, over all shares that attend together."""
    first, shares = plan.step(step), config.parallel.data_parallel_size
    together = shares if config.parallel.data == "per_rank" else 1
    return [first.packs[share[0]].lengths for share in deal_packs(first, shares)[:together]]


def piece_rows(data: RunData, step: int) -> Iterator[dict[str, Any]]:
    """Yield the location of each document piece of a step, with everything needed to read it without this package.

    file, dtype, byte: the file, its dtype, and the byte offset of the piece's first token. follows: True if the
    document continues after the piece, so that the last token has a label.
    """
    for number, pack in enumerate(data.plan.step(step).packs):
        for row in pack.rows:
            corpus, document = data.corpora[row["corpus"]], int(row["document"])
            file, within = corpus.file_of(document)
            start, length = int(row["start"]), int(row["length"])
            yield {
                "step": step,
                "pack": number,
                "corpus": corpus.name,
                "document": document,
                "epoch": int(row["epoch"]),
                "start": start,
                "length": length,
                "follows": not row["ends_document"],
                "file": os.path.abspath(f"{file.prefix}.bin"),
                "dtype": file.dtype.name,
                "byte": file.first_byte(within) + start * file.dtype.itemsize,
            }


class _Lengths(NamedTuple):
    """The fields of a corpus needed for planning."""

    name: str
    lengths: np.ndarray
    digest: str


def _plan_text(config: Config, corpus: CorpusLengths, file: Path) -> PackPlan:
    """Make the plan of packs of a run on text, in `file`. It does not depend on the numbers of ranks and shares."""
    by_step = config.data.context_by_step
    context = min(tokens for _, tokens in by_step)
    packs = config.data.tokens_per_step // context
    # a window longer than an epoch would mix epochs; a window longer than the plan would repeat documents
    steps = config.train.steps + held_out_steps(config)
    window = min(_MOST_WINDOW, steps * packs, -(-int(corpus.lengths.sum(dtype=np.int64)) // context))
    rule = PackRule(by_step, config.data.tokens_per_step, window)
    return make_pack_plan(file, [corpus], seed=config.run.seed, rule=rule, steps=steps)


def _planned_data(config: Config, planned: PackConfig) -> RunData:
    corpora = open_corpora(planned, config.data.check_tokens)
    plan = open_configured_plan(planned, corpora)
    needed_steps = config.train.steps + held_out_steps(config)
    if plan.steps < needed_steps:
        way_out = (
            "it ends with its corpora, so use fewer, or begin a new run with a plan that reads them more often"
            if plan.ends_with_corpora
            else f"raise steps in {config.data.path} and run distattn data pack --force, whose plan begins with the same steps"
        )
        and_evaluation = " and evaluation.steps" if needed_steps > config.train.steps else ""
        raise DistattnError(
            f"train.steps: {config.train.steps:,}{and_evaluation}, but {plan.path} has {plan.steps:,} steps; {way_out}."
        )
    check_shares(plan, config.parallel.data_parallel_size, 0, config.train.steps)
    masked = [source.name for source in plan.sources if source.masks is not None]
    if masked and config.reference_check.steps:
        raise DistattnError(
            f"reference_check.steps: {config.reference_check.steps}, but the check cannot apply masks, and corpus "
            f"{masked[0]} has some; use 0."
        )
    vocabulary = vocabulary_size(config, corpora)
    if not vocabulary:
        raise DistattnError(
            f"model.vocab_size: not set, and {_without_manifest(corpora)} has no .json with its tokenizer's; set it."
        )
    return RunData(plan, corpora, vocabulary)


def _without_manifest(corpora: Sequence[Corpus]) -> str:
    prefixes = [file.prefix for corpus in corpora for file in corpus.files]
    return next(prefix for prefix in prefixes if not Path(f"{prefix}.json").exists())
