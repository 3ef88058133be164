"""Order the documents of several corpora: each corpus is reshuffled every epoch, and all are blended by weights in tokens.

The *turn* of a document is the number of tokens of its corpus before it, divided by the weight of the corpus. Documents are
ordered by turn, and ties by corpus number, so the corpus that is furthest behind comes next. In every prefix a corpus is at most
one document ahead of its share of the tokens, and at most its share of one document of each corpus behind. Turns are integers,
and the turns of a corpus do not depend on other corpora. So blocks of documents can be merged by sorting, and the block size does
not change the result.

A corpus ends after `max_epochs`. The others continue with their turns, as if their weights were renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from distattn.data.packing.permutation import derived_key, permuted
from distattn.ir.errors import DistattnError

# the sum of all weights after conversion to integers; a document's turn is the number of its corpus's earlier tokens x
# WEIGHT_UNITS / weight
WEIGHT_UNITS = 1 << 20
MOST_DOCUMENTS = (1 << 32) - 1
MOST_CORPORA = MOST_EPOCHS = (1 << 16) - 1
_BLOCK_DOCUMENTS = 1 << 16
# a block of a small corpus has at most this many epochs, because each epoch is read separately and only a few are needed in
# advance
_BLOCK_EPOCHS = 64
# the tokens of a block times WEIGHT_UNITS must fit into an int64
_MOST_BLOCK_TOKENS = (1 << 43) - 1


@dataclass(frozen=True)
class BlendSource:
    """One corpus of a blend.

    documents, tokens: the size of the corpus. weight: the corpus's share of the tokens is weight / sum of weights. max_epochs:
    how often its documents may be read, or None for no limit. In a fractional last epoch, only that fraction of them is read.
    """

    name: str
    documents: int
    tokens: int
    weight: float
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        """Raise DistattnError naming the corpus and its first invalid value."""
        if not 0 < self.documents <= MOST_DOCUMENTS:
            raise DistattnError(
                f"corpus {self.name}: {self.documents:,} documents; it must have 1 to {MOST_DOCUMENTS:,}."
            )
        if self.tokens <= 0:
            raise DistattnError(f"corpus {self.name}: all {self.documents:,} documents are empty; leave it out.")
        for field, value in (("weight", self.weight), ("max_epochs", self.max_epochs)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise DistattnError(f"corpus {self.name}: {field} is {value}; it must be a number above 0.")
        if self.max_epochs is not None and self.max_epochs > MOST_EPOCHS:
            raise DistattnError(
                f"corpus {self.name}: max_epochs is {self.max_epochs}; it must be at most {MOST_EPOCHS:,}."
            )

    @property
    def most_documents(self) -> int | None:
        """The maximum number of documents read over all epochs, or None if there is no limit."""
        return most_documents(self.documents, self.max_epochs)


class DocumentColumns(NamedTuple):
    """Documents in order, as columns int64 (D,). document: index in the corpus. epoch: counted from 0. length: in tokens."""

    corpus: np.ndarray
    document: np.ndarray
    epoch: np.ndarray
    length: np.ndarray

    def rows(self, chosen: slice | np.ndarray) -> DocumentColumns:
        """Return the chosen rows."""
        return DocumentColumns(*(column[chosen] for column in self))


def most_documents(documents: int, max_epochs: float | None) -> int | None:
    """Return how many documents of a corpus may be read over all epochs, or None if there is no limit."""
    return None if max_epochs is None else math.floor(Fraction(max_epochs) * documents)


def weight_units(sources: Sequence[BlendSource]) -> list[int]:
    """Return the weights as integers, at least 1 each, in units of 1 / 2^20 of their sum."""
    total = sum(Fraction(source.weight) for source in sources)
    return [max(1, round(Fraction(source.weight) / total * WEIGHT_UNITS)) for source in sources]


def blend_documents(
    sources: Sequence[BlendSource], lengths: Sequence[np.ndarray], seed: int, *, block_documents: int | None = None
) -> Iterator[DocumentColumns]:
    """Yield the documents of all epochs in order, in blocks, until every corpus has ended.

    lengths: for each corpus, the number of tokens in each document, integers (documents,). Empty documents are left out.
    block_documents: how many documents of a corpus to read at a time; the order does not depend on it. The iterator never ends
    if a corpus has no max_epochs. Raises DistattnError if there are no corpora or too many, and if a corpus reaches too many
    epochs.
    """
    if not 0 < len(sources) <= MOST_CORPORA:
        raise DistattnError(f"a blend of {len(sources):,} corpora; name 1 to {MOST_CORPORA:,}.")
    # keep the total size of the blocks small if there are many corpora
    block = block_documents or max(1024, _BLOCK_DOCUMENTS // len(sources))
    readers = [
        _CorpusReader(number, source, units, lengths[number], seed, block)
        for number, (source, units) in enumerate(zip(sources, weight_units(sources), strict=True))
    ]
    while readers:
        for reader in readers:
            reader.fill()
        # all documents before this turn have been read
        horizon = min((reader.next_turn for reader in readers if not reader.ended), default=None)
        parts = [reader.take(horizon) for reader in readers]
        turns = np.concatenate([turn for turn, _ in parts])
        columns = DocumentColumns(*map(np.concatenate, zip(*(columns for _, columns in parts), strict=True)))
        if len(readers) > 1:
            # the columns are ordered by corpus, so a stable sort breaks ties by corpus
            columns = columns.rows(np.argsort(turns, kind="stable"))
        if len(turns):
            yield columns
        readers = [reader for reader in readers if reader.waiting or not reader.ended]


def epoch_order(seed: int, corpus: int, epoch: int, documents: int, positions: np.ndarray) -> np.ndarray:
    """Return the documents at `positions` (N,) in the shuffled order of an epoch, int64 (N,).

    corpus, epoch: their indices. documents: the number of documents in the corpus.
    """
    return permuted(positions, documents, derived_key(seed, corpus, epoch))


class _CorpusReader:
    """A reader that returns the documents of one corpus in order, with the turn of each."""

    def __init__(
        self, number: int, source: BlendSource, units: int, lengths: np.ndarray, seed: int, block: int
    ) -> None:
        self._number = number
        self._source = source
        self._units = units
        self._lengths = lengths
        self._seed = seed
        longest = int(lengths.max())
        self._block = max(1, min(block, _MOST_BLOCK_TOKENS // max(longest, 1), _BLOCK_EPOCHS * source.documents))
        # the numbers of documents and of tokens read so far, over all epochs
        self._position = 0
        self._tokens = 0
        self._turns = np.empty(0, np.int64)
        self._columns = DocumentColumns(*(np.empty(0, np.int64) for _ in range(4)))

    @property
    def waiting(self) -> int:
        """The number of documents read but not yet returned."""
        return len(self._turns)

    @property
    def ended(self) -> bool:
        """True if all documents of all epochs have been read."""
        return self._position == self._source.most_documents

    @property
    def next_turn(self) -> int:
        """The turn of the first document not yet read."""
        return self._tokens * WEIGHT_UNITS // self._units

    def fill(self) -> None:
        """Read until at least half a block of documents is waiting, or the corpus has ended."""
        while not self.ended and self.waiting * 2 < self._block:
            self._read()

    def take(self, horizon: int | None) -> tuple[np.ndarray, DocumentColumns]:
        """Remove the waiting documents with turns before `horizon`, or all if it is None. Return them as (turns, documents)."""
        count = len(self._turns) if horizon is None else int(np.searchsorted(self._turns, horizon))
        taken = self._turns[:count], self._columns.rows(slice(count))
        self._turns, self._columns = self._turns[count:], self._columns.rows(slice(count, None))
        return taken

    def _read(self) -> None:
        """Read a block of documents, or the rest of the epoch if that is less."""
        documents = self._source.documents
        epoch, first = divmod(self._position, documents)
        if epoch >= MOST_EPOCHS:
            raise DistattnError(
                f"corpus {self._source.name}: a plan has at most {MOST_EPOCHS:,} epochs of a corpus; give it a lower weight."
            )
        count = min(self._block, documents - first)
        if self._source.most_documents is not None:
            count = min(count, self._source.most_documents - self._position)
        document = epoch_order(self._seed, self._number, epoch, documents, np.arange(first, first + count))
        length = self._lengths[document].astype(np.int64)
        self._position += count
        full = length > 0
        if not full.all():
            document, length = document[full], length[full]
        before = np.cumsum(length) - length
        base, rest = divmod(self._tokens * WEIGHT_UNITS, self._units)
        turns = (before * WEIGHT_UNITS + rest) // self._units + base
        self._tokens += int(length.sum())
        columns = DocumentColumns(np.full_like(document, self._number), document, np.full_like(document, epoch), length)
        self._turns = np.concatenate([self._turns, turns])
        self._columns = DocumentColumns(*map(np.concatenate, zip(self._columns, columns, strict=True)))
