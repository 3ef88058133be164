"""Masks that say which tokens of a corpus may be labels, read from files next to those with the tokens.

PREFIX.loss.bin and .idx are an indexed file of uint8 with the same documents and lengths as PREFIX. It has 0 for each token that
must not be learnt, such as the prompts of supervised fine-tuning. PREFIX.spans.bin and .idx are an indexed file of int32 with the
same documents as PREFIX. Each document holds pairs (start, end) in ascending order: tokens [start, end) stand for something other
than text, such as an image. They are not learnt either, and a document longer than a pack is never cut within such a span. Each
kind is optional for each file of a corpus.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distattn.data.files.block_digests import combined_digest
from distattn.data.files.indexed_file import IndexedFile
from distattn.ir.errors import DamagedDataError, DistattnError

if TYPE_CHECKING:
    from distattn.data.files.corpus import Corpus


class FileMasks(NamedTuple):
    """The mask files for one file of a corpus; each is None if it does not exist."""

    loss: IndexedFile | None
    spans: IndexedFile | None


class LabelMasks:
    """The masks of a corpus. digest: digest of all mask files, computed like `Corpus.digest`.

    has_spans: True if any file of the corpus has spans.
    """

    def __init__(self, corpus: Corpus, files: list[FileMasks]) -> None:
        self._corpus = corpus
        self._of_file = dict(zip((file.prefix for file in corpus.files), files, strict=True))
        self.has_spans = any(masks.spans for masks in files)
        self.digest = combined_digest(
            *(
                [file.dtype.name, file.bin_bytes, file.index_digest, file.digests.bin_root if file.digests else None]
                if file
                else None
                for masks in files
                for file in masks
            )
        )

    @classmethod
    def open(cls, corpus: Corpus) -> LabelMasks | None:
        """Open the masks of a corpus, and check their sizes. Return None if there are no masks.

        Raises the same errors as `IndexedFile.open`, and DamagedDataError if the size of a mask differs from that of its file.
        """
        files = [FileMasks(_open(file, "loss", np.uint8), _open(file, "spans", np.int32)) for file in corpus.files]
        for file, (loss, _) in zip(corpus.files, files, strict=True):
            if loss and loss.tokens != file.tokens:
                raise DamagedDataError(
                    f"{loss.prefix}.bin: byte {min(loss.tokens, file.tokens):,}: has masks of {loss.tokens:,} tokens, "
                    f"but {file.prefix}.bin has {file.tokens:,}; write the masks again."
                )
        return cls(corpus, files) if any(any(masks) for masks in files) else None

    def may_be_labels(self, document: int, start: int, count: int) -> np.ndarray:
        """Return which of the tokens [start, start + count) of a document may be labels, bool (count,).

        Reads one byte per token if there is a loss mask, and all spans of the document. Raises DamagedDataError if a mask does
        not match the document.
        """
        file, number = self._corpus.file_of(document)
        loss, spans = self._of_file[file.prefix]
        if loss:
            mask_tokens, tokens = (int(indexed.lengths_of(np.array([number]))[0]) for indexed in (loss, file))
            if mask_tokens != tokens:
                raise DamagedDataError(
                    f"{loss.prefix}.idx: document {number} has masks of {mask_tokens:,} tokens, but in {file.prefix}.idx "
                    f"{tokens:,} tokens; write the masks again."
                )
        allowed = loss.read(number, start, count) != 0 if loss else np.ones(count, np.bool_)
        for begin, end in self.spans_of(document).tolist() if spans else ():
            allowed[max(begin - start, 0) : max(end - start, 0)] = False
        return allowed

    def spans_of(self, document: int) -> np.ndarray:
        """Return the spans (start, end) of a document in order, int64 (S, 2).

        Raises DamagedDataError if the limits do not form pairs, or if spans are empty, overlap, are not in ascending order, or
        extend past the end of the document.
        """
        file, number = self._corpus.file_of(document)
        spans = self._of_file[file.prefix].spans
        if not spans:
            return np.empty((0, 2), np.int64)
        numbers, length = (int(indexed.lengths_of(np.array([number]))[0]) for indexed in (spans, file))
        limits = spans.read(number, 0, numbers).astype(np.int64)
        # a span must not be empty, and must begin at or after the end of the previous one
        wrong = np.flatnonzero((np.diff(limits, prepend=0) < (np.arange(numbers) % 2)) | (limits > length))
        if numbers % 2 or len(wrong):
            at = int(spans.pointers[spans.document_ends[number]]) + 4 * int(wrong[0] if len(wrong) else numbers - 1)
            raise DamagedDataError(
                f"{spans.prefix}.bin: byte {at:,}: document {number} of {length:,} tokens has no such span: spans are pairs "
                "start, end that rise and lie in the document; write them again."
            )
        return limits.reshape(-1, 2)


def check_planned_masks(path: str, planned: str | None, corpus: Corpus) -> None:
    """Raise DistattnError if a corpus's masks have changed since a plan was made from it.

    path: the plan's file. planned: the masks' digest in the plan, or None if the corpus had no masks. Without side files (.xxh3),
    only sizes and indices are compared.
    """
    digest = corpus.masks and corpus.masks.digest
    if digest == planned:
        return
    files = ", ".join(file.prefix for file in corpus.files)
    if planned is None:
        difference = "was made when it had no loss masks or spans; move them away"
    elif digest is None:
        difference = "was made with loss masks or spans, which are gone; bring them back"
    else:
        difference = "was made with other loss masks or spans; bring those back"
    raise DistattnError(f"{path}: corpus {corpus.name} ({files}): {difference}, or make the plan again.")


def _open(file: IndexedFile, kind: str, dtype: type) -> IndexedFile | None:
    """Open PREFIX.kind of a file. Return None if it does not exist."""
    prefix = f"{file.prefix}.{kind}"
    # if only one of .bin and .idx exists, `IndexedFile.open` reports the damage
    if not any(os.path.lexists(prefix + suffix) for suffix in (".bin", ".idx")):
        return None
    masks = IndexedFile.open(prefix, file.check_tokens)
    if masks.dtype != dtype:
        raise DamagedDataError(
            f"{prefix}.idx: byte 17: has {masks.dtype.name}, not {np.dtype(dtype).name}; write it again."
        )
    if masks.documents != file.documents:
        raise DamagedDataError(
            f"{prefix}.idx: byte 26: has {masks.documents:,} documents, but {file.prefix}.idx {file.documents:,}; write it again."
        )
    return masks
