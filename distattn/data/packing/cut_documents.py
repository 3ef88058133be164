"""Cut documents longer than a pack, but never within a span of tokens that belong together.

Spans are defined in `distattn.data.files.label_masks`; the placeholder tokens of an image are one example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from distattn.ir.errors import DistattnError


class CorpusSpans(NamedTuple):
    """The spans of a corpus.

    corpus: the corpus's name. of: a function that returns the spans (begin, end) of a document in order, int64 (S, 2).
    """

    corpus: str
    of: Callable[[int], np.ndarray]


def cut_documents(rows: np.ndarray, tokens: int, spans: Mapping[int, CorpusSpans]) -> tuple[np.ndarray, np.ndarray]:
    """Cut rows with more tokens than a pack. Return (pieces (N,), the index of each piece's source row (N,)).

    rows: documents or pieces of them, PIECE (D,) of `pack_windows.py`. tokens: tokens per pack. spans: by corpus index, for each
    corpus that has spans. Each piece has as many tokens as fit, and the last piece has the rest. A piece that would end inside a
    span ends before the span instead. Raises DistattnError for a span that does not fit into a pack.
    """
    lengths = rows["length"].astype(np.int64)
    pieces = -(-lengths // tokens)
    long = np.flatnonzero(pieces > 1)
    if not len(long):
        return rows, np.arange(len(rows))
    # offsets of the pieces from the start of their row, for each long row of a corpus with spans
    begins = {row: _begins(rows[row], tokens, spans[rows["corpus"][row]]) for row in _with_spans(rows, long, spans)}
    for row, row_begins in begins.items():
        pieces[row] = len(row_begins)
    source = np.repeat(np.arange(len(rows)), pieces)
    first = np.cumsum(pieces) - pieces
    begin = (np.arange(len(source)) - first[source]) * tokens
    for row, row_begins in begins.items():
        begin[first[row] : first[row] + len(row_begins)] = row_begins
    # each piece ends where the next piece of the same row begins
    is_last = np.append(source[1:] != source[:-1], True)
    end = np.where(is_last, lengths[source], np.append(begin[1:], 0))
    out = rows.take(source)
    out["start"] += begin.astype(np.uint32)
    out["length"] = end - begin
    out["ends_document"] &= is_last
    return out, source


def _with_spans(rows: np.ndarray, long: np.ndarray, spans: Mapping[int, CorpusSpans]) -> list[int]:
    """Return the indices of those `long` rows whose corpora have spans."""
    rows_with_spans: list[int] = long[np.isin(rows["corpus"][long], list(spans))].tolist() if spans else []
    return rows_with_spans


def _begins(row: np.void, tokens: int, spans: CorpusSpans) -> list[int]:
    """Return the offsets of a row's pieces from the row's start."""
    start, length, document = int(row["start"]), int(row["length"]), int(row["document"])
    limits = spans.of(document) - start
    begins = [0]
    while (limit := begins[-1] + tokens) < length:
        # the first span that ends after the limit
        at = int(np.searchsorted(limits[:, 1], limit, "right"))
        if at < len(limits) and limits[at, 0] < limit:
            begin, end = limits[at].tolist()
            if begin <= begins[-1]:
                raise DistattnError(
                    f"corpus {spans.corpus}: document {document:,} has a span of {end - begin:,} tokens ({start + begin:,} to "
                    f"{start + end:,}), which no pack of {tokens:,} holds, and a span is never cut; use a longer context, "
                    'long_documents = "keep", or leave the document out.'
                )
            limit = begin
        begins.append(limit)
    return begins
