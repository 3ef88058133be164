"""Held-out documents are not trained: before a run begins, the document numbers of both plans are compared."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFile
from distattn.data.packing.pack_plan import PackPlan
from distattn.ir.errors import DistattnError
from distattn.training.config.run_file import Config
from distattn.training.run_data import RunData, held_out_data

# a file's dtype, size, and digests of index and tokens: copies have the same
_FileKey = tuple[object, ...]


class _Place(NamedTuple):
    """A document of a corpus, as the numbers of both."""

    corpus: int
    document: int

    @property
    def code(self) -> int:
        """Both numbers as one integer."""
        return (self.corpus << 32) + self.document


def check_held_out(config: Config, data: RunData) -> None:
    """Raise DistattnError if a held-out document is also trained, and where `held_out_data` does.

    data: the training data. Corpora with the same files, or the same digests, are the same, whatever their names. Reads
    the records of all training steps.
    """
    held, begin = held_out_data(config, data)
    trained = {place.code: place for place in _same_documents(held, begin, config, data.corpora)}
    sorted_codes = np.array(sorted(trained), np.int64)
    for step in range(config.train.steps if len(sorted_codes) else 0):
        held_out_codes = sorted_codes[np.isin(sorted_codes, _codes(data.plan, step))]
        if len(held_out_codes):
            place = trained[int(held_out_codes[0])]
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
    """Yield the held-out documents under the numbers of the training corpora; none where no file is the same."""
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
    """Return `_Place.code` of each piece of a step, int64 (N,)."""
    rows = plan.step(step).rows
    codes: np.ndarray = (rows["corpus"].astype(np.int64) << 32) + rows["document"]
    return codes


def _files(corpus: Corpus) -> Iterable[tuple[int, IndexedFile]]:
    """Yield (number of its first document, file) of each file."""
    first = 0
    for file in corpus.files:
        yield first, file
        first += file.documents


def _key(file: IndexedFile) -> _FileKey:
    if file.digests is not None:
        return file.dtype.name, file.bin_bytes, file.index_digest, file.digests.bin_root
    # no digests of its tokens: only the same file on the disk is the same
    status = os.stat(f"{file.prefix}.bin")
    return file.dtype.name, file.bin_bytes, file.index_digest, status.st_dev, status.st_ino
