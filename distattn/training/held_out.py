"""Check that no held-out document is trained on, by comparing the document numbers of both plans before a run begins."""

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

# identifies a file: its dtype, size, and digests of index and tokens, so that copies of a file have equal keys
_FileKey = tuple[object, ...]


class _Place(NamedTuple):
    """A document, identified by its corpus's index and its index within the corpus."""

    corpus: int
    document: int

    @property
    def code(self) -> int:
        """Both indices packed into one integer."""
        return (self.corpus << 32) + self.document


def check_held_out(config: Config, data: RunData) -> None:
    """Raise DistattnError if a held-out document is also trained on, or if `held_out_data` does.

    data: the training data. Two files count as the same if they are one file on disk or have equal digests, whatever
    their corpora are called. Reads the records of all training steps.
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
    """Yield the held-out documents whose files also belong to training corpora, as numbered in those corpora."""
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
    """Return `_Place.code` for each piece of a step, int64 (N,)."""
    rows = plan.step(step).rows
    codes: np.ndarray = (rows["corpus"].astype(np.int64) << 32) + rows["document"]
    return codes


def _files(corpus: Corpus) -> Iterable[tuple[int, IndexedFile]]:
    """Yield (index of the file's first document, file) for each file of a corpus."""
    first = 0
    for file in corpus.files:
        yield first, file
        first += file.documents


def _key(file: IndexedFile) -> _FileKey:
    if file.digests is not None:
        return file.dtype.name, file.bin_bytes, file.index_digest, file.digests.bin_root
    # without digests, two paths count as the same file only if they lead to one file on disk
    status = os.stat(f"{file.prefix}.bin")
    return file.dtype.name, file.bin_bytes, file.index_digest, status.st_dev, status.st_ino
