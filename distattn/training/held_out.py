"""Held-out documents are not trained: those of both plans are compared by their numbers, before a run begins."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from distattn.data.corpus import Corpus
from distattn.data.indexed_file import IndexedFile
from distattn.data.pack_plan import PackPlan
from distattn.ir.errors import DistattnError
from distattn.training.config import Config
from distattn.training.run_data import RunData, held_out_data

# of a file's size, index and tokens: a copy has the same
_FileKey = tuple[object, ...]


class _Place(NamedTuple):
    """A document of a corpus, by numbers of both."""

    corpus: int
    document: int

    @property
    def code(self) -> int:
        """Both numbers in one."""
        return (self.corpus << 32) + self.document


def check_held_out(config: Config, data: RunData) -> None:
    """Raise DistattnError, naming the document, where one is evaluated that is trained, too, and as `held_out_data` does.

    data: what is trained. Corpora are the same where their files are, or have the same digests, whatever they are called. Reads
    the records of all steps that are trained.
    """
    held, begin = held_out_data(config, data)
    trained = {place.code: place for place in _same_documents(held, begin, config, data.corpora)}
    wanted = np.array(sorted(trained), np.int64)
    for step in range(config.train.steps if len(wanted) else 0):
        both = wanted[np.isin(wanted, _codes(data.plan, step))]
        if len(both):
            place = trained[int(both[0])]
            key = "evaluation.path" if config.evaluation.path else "evaluation.steps"
            raise DistattnError(
                f"{key}: document {place.document:,} of corpus {data.corpora[place.corpus].name} is evaluated, and trained in "
                f"step {step:,}, counted from 0; {_way_out(config)}."
            )


def _way_out(config: Config) -> str:
    if config.evaluation.path:
        return "name other documents"
    return "hold out another number of steps, or name other documents in evaluation.path"


def _same_documents(held: RunData, begin: int, config: Config, corpora: list[Corpus]) -> Iterator[_Place]:
    """The held-out documents as the corpora that are trained number them; none where no file is the same."""
    places: dict[_FileKey, list[_Place]] = {}
    for number, corpus in enumerate(corpora):
        for first, file in _files(corpus):
            places.setdefault(_key(file), []).append(_Place(number, first))
    steps = range(begin, begin + config.evaluation.steps)
    codes = np.unique(np.concatenate([_codes(held.plan, step) for step in steps]))
    for code in codes.tolist():
        file, within = held.corpora[code >> 32].file_of(code & 0xFFFFFFFF)
        for number, first in places.get(_key(file), []):
            yield _Place(number, first + within)


def _codes(plan: PackPlan, step: int) -> np.ndarray:
    """`_Place.code` of each piece of a step, int64 (N,)."""
    rows = plan.step(step).rows
    codes: np.ndarray = (rows["corpus"].astype(np.int64) << 32) + rows["document"]
    return codes


def _files(corpus: Corpus) -> Iterable[tuple[int, IndexedFile]]:
    """(Number of its first document, file) of each file."""
    first = 0
    for file in corpus.files:
        yield first, file
        first += file.documents


def _key(file: IndexedFile) -> _FileKey:
    if file.digests is not None:
        return file.dtype.name, file.bin_bytes, file.index_digest, file.digests.bin_root
    # nothing is known of its tokens: it is the same where it is the same file
    found = os.stat(f"{file.prefix}.bin")
    return file.dtype.name, file.bin_bytes, file.index_digest, found.st_dev, found.st_ino
