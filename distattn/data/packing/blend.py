"""The order of documents of several corpora: each is shuffled anew for every epoch, and all are blended by weights in tokens.

The *turn* of a document is the number of tokens of its corpus before it, divided by the weight of the corpus. Documents are
ordered by their turns, and ties by the number of the corpus: the corpus that is furthest behind comes next. So in every prefix a
corpus is at most one document ahead of its share of the tokens, and at most its share of one document of each corpus behind.
Turns are whole numbers, and the turns of a corpus do not depend on other corpora, so blocks of documents are merged by sorting,
and the size of the blocks does not change the result.

A corpus ends after `max_epochs`. The others go on with their turns, as if their weights were normalised anew.
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

# weights are multiples of 1 / 2^20 of all weights together, and turns of 1 / 2^20 of a token over a weight
WEIGHT_UNITS = 1 << 20
MOST_DOCUMENTS = (1 << 32) - 1
MOST_CORPORA = MOST_EPOCHS = (1 << 16) - 1
_BLOCK_DOCUMENTS = 1 << 16
# a block of a small corpus has at most this many epochs: each is read separately, and few more than needed
_BLOCK_EPOCHS = 64
# the tokens of a block times WEIGHT_UNITS fit into an int64
_MOST_BLOCK_TOKENS = (1 << 43) - 1


@dataclass(frozen=True)
class BlendSource:
    """One corpus of a blend.

    documents, tokens: the size of the corpus. weight: its share of the tokens is weight / sum of weights. max_epochs: how often
    its documents may be read; in a fraction of an epoch that share of the documents is read. None: as often as there are steps.
    """

    name: str
    documents: int
    tokens: int
    weight: float
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        """Raise DistattnError naming the corpus and its first wrong value."""
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
        """Documents that may be read in all epochs together."""
        return most_documents(self.documents, self.max_epochs)


class DocumentColumns(NamedTuple):
    """Documents in their order: numbers of corpora, of documents within them and of epochs (from 0), tokens; all int64 (D,)."""

    corpus: np.ndarray
    document: np.ndarray
    epoch: np.ndarray
    length: np.ndarray

    def rows(self, chosen: slice | np.ndarray) -> DocumentColumns:
        """Return some of the rows."""
        return DocumentColumns(*(column[chosen] for column in self))


def most_documents(documents: int, max_epochs: float | None) -> int | None:
    """Return how many documents of a corpus may be read in all epochs together; None if there is no limit."""
    return None if max_epochs is None else math.floor(Fraction(max_epochs) * documents)


def weight_units(sources: Sequence[BlendSource]) -> list[int]:
    """Return the weights as whole numbers, at least 1 each: multiples of 1 / 2^20 of the sum of all weights."""
    total = sum(Fraction(source.weight) for source in sources)
    return [max(1, round(Fraction(source.weight) / total * WEIGHT_UNITS)) for source in sources]


def blend_documents(
    sources: Sequence[BlendSource], lengths: Sequence[np.ndarray], seed: int, *, block_documents: int | None = None
) -> Iterator[DocumentColumns]:
    """Yield blocks of documents of all epochs, in their order, until every corpus has ended.

    lengths: tokens of each corpus's documents, integers (documents,). Documents without tokens are left out. block_documents: how
    many documents of a corpus are read at a time; the order does not depend on it. The iterator never ends if a corpus has no
    max_epochs. Raises DistattnError if there is no corpus, or if an epoch's number does not fit.
    """
    if not 0 < len(sources) <= MOST_CORPORA:
        raise DistattnError(f"a blend of {len(sources):,} corpora; name 1 to {MOST_CORPORA:,}.")
    # all blocks together stay small where there are many corpora
    block = block_documents or max(1024, _BLOCK_DOCUMENTS // len(sources))
    readers = [
        _CorpusReader(number, source, units, lengths[number], seed, block)
        for number, (source, units) in enumerate(zip(sources, weight_units(sources), strict=True))
    ]
    while readers:
        for reader in readers:
            reader.fill()
        # documents before this turn have all been read
        horizon = min((reader.next_turn for reader in readers if not reader.ended), default=None)
        parts = [reader.take(horizon) for reader in readers]
        turns = np.concatenate([turn for turn, _ in parts])
        columns = DocumentColumns(*map(np.concatenate, zip(*(columns for _, columns in parts), strict=True)))
        if len(readers) > 1:
            # the sort is stable, and the columns are in the order of corpora
            columns = columns.rows(np.argsort(turns, kind="stable"))
        if len(turns):
            yield columns
        readers = [reader for reader in readers if reader.waiting or not reader.ended]


def epoch_order(seed: int, corpus: int, epoch: int, documents: int, positions: np.ndarray) -> np.ndarray:
    """Return the documents at `positions` (N,) of an epoch of a corpus that has this many documents; int64 (N,).

    corpus, epoch: their numbers.
    """
    return permuted(positions, documents, derived_key(seed, corpus, epoch))


class _CorpusReader:
    """A reader of one corpus, which gives its documents in their order with the turn of each."""

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
        # documents read in all epochs, and their tokens
        self._position = 0
        self._tokens = 0
        self._turns = np.empty(0, np.int64)
        self._columns = DocumentColumns(*(np.empty(0, np.int64) for _ in range(4)))

    @property
    def waiting(self) -> int:
        """Documents that were read and not taken."""
        return len(self._turns)

    @property
    def ended(self) -> bool:
        """Whether all documents of all epochs were read."""
        return self._position == self._source.most_documents

    @property
    def next_turn(self) -> int:
        """The turn of the first document that was not read."""
        return self._tokens * WEIGHT_UNITS // self._units

    def fill(self) -> None:
        """Read until half a block of documents waits, or the corpus has ended."""
        while not self.ended and self.waiting * 2 < self._block:
            self._read()

    def take(self, horizon: int | None) -> tuple[np.ndarray, DocumentColumns]:
        """Remove the waiting documents whose turns are before the horizon, or all of them. Return (turns, documents)."""
        count = len(self._turns) if horizon is None else int(np.searchsorted(self._turns, horizon))
        taken = self._turns[:count], self._columns.rows(slice(count))
        self._turns, self._columns = self._turns[count:], self._columns.rows(slice(count, None))
        return taken

    def _read(self) -> None:
        """Read a block of documents, or what is left of an epoch."""
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
