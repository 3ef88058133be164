"""Which tokens of a corpus may be labels, from files beside those with the tokens.

PREFIX.loss.bin and .idx: an indexed file of uint8 with the documents and lengths of PREFIX, 0 where a token is not to be learnt
(prompts of supervised fine-tuning). PREFIX.spans.bin and .idx: an indexed file of int32 with the documents of PREFIX; each has
pairs start, end, rising: tokens [start, end) stand for something that is no text, such as an image. They are not learnt either,
and a document that is longer than a pack is never cut between them.
Each is optional, for each file of a corpus.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distattn.data.block_digests import combined_digest
from distattn.data.indexed_file import IndexedFile
from distattn.ir.errors import DamagedDataError, DistattnError

if TYPE_CHECKING:
    from distattn.data.corpus import Corpus


class FileMasks(NamedTuple):
    """What lies beside one file of a corpus."""

    loss: IndexedFile | None
    spans: IndexedFile | None


class LabelMasks:
    """The masks of a corpus. files: of each file of the corpus. digest: of all of them, as `Corpus.digest`.

    has_spans: whether any file has spans beside it.
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
        """Open what lies beside a corpus's files, and check it as they are; None where there is nothing.

        Raises what `IndexedFile.open` raises, and DamagedDataError where a mask has other documents than the file it lies beside.
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
        """Which of the tokens [start, start + count) of a document may be labels, bool (count,).

        Reads a byte for each of them where there is a loss mask, and all spans of the document. Raises DamagedDataError where
        a mask does not fit the document.
        """
        file, number = self._corpus.file_of(document)
        loss, spans = self._of_file[file.prefix]
        if loss:
            has, should = (int(one.lengths_of(np.array([number]))[0]) for one in (loss, file))
            if has != should:
                raise DamagedDataError(
                    f"{loss.prefix}.idx: document {number} has masks of {has:,} tokens, but in {file.prefix}.idx {should:,} "
                    "tokens; write the masks again."
                )
        allowed = loss.read(number, start, count) != 0 if loss else np.ones(count, np.bool_)
        for begin, end in self.spans_of(document).tolist() if spans else ():
            allowed[max(begin - start, 0) : max(end - start, 0)] = False
        return allowed

    def spans_of(self, document: int) -> np.ndarray:
        """The spans (start, end) of a document, in their order, int64 (S, 2). Raises DamagedDataError where they cannot be."""
        file, number = self._corpus.file_of(document)
        spans = self._of_file[file.prefix].spans
        if not spans:
            return np.empty((0, 2), np.int64)
        numbers, length = (int(one.lengths_of(np.array([number]))[0]) for one in (spans, file))
        limits = spans.read(number, 0, numbers).astype(np.int64)
        # each begins where the one before ends, or later, and has tokens
        wrong = np.flatnonzero((np.diff(limits, prepend=0) < (np.arange(numbers) % 2)) | (limits > length))
        if numbers % 2 or len(wrong):
            at = int(spans.pointers[spans.document_ends[number]]) + 4 * int(wrong[0] if len(wrong) else numbers - 1)
            raise DamagedDataError(
                f"{spans.prefix}.bin: byte {at:,}: document {number} of {length:,} tokens has no such span: spans are pairs "
                "start, end that rise and lie in the document; write them again."
            )
        return limits.reshape(-1, 2)


def check_planned_masks(path: str, planned: str | None, corpus: Corpus) -> None:
    """Compare what lies beside a corpus with what did when a plan was made of it. planned: the digest then, or None.

    path: of the plan. Raises DistattnError where they differ. Without side files (.xxh3) only sizes and indices are compared.
    """
    found = corpus.masks and corpus.masks.digest
    if found == planned:
        return
    files = ", ".join(file.prefix for file in corpus.files)
    if planned is None:
        what = "was made when there were no loss masks or spans beside it; move them away"
    elif found is None:
        what = "was made with loss masks or spans beside it, which are gone; bring them back"
    else:
        what = "was made with other loss masks or spans beside it; bring those back"
    raise DistattnError(f"{path}: corpus {corpus.name} ({files}): {what}, or make the plan anew.")


def _open(file: IndexedFile, kind: str, dtype: type) -> IndexedFile | None:
    """PREFIX.kind of a file, or None where there is none."""
    prefix = f"{file.prefix}.{kind}"
    # a half of it is damage, not absence
    if not any(os.path.lexists(prefix + suffix) for suffix in (".bin", ".idx")):
        return None
    found = IndexedFile.open(prefix, file.check_tokens)
    if found.dtype != dtype:
        raise DamagedDataError(
            f"{prefix}.idx: byte 17: has {found.dtype.name}, not {np.dtype(dtype).name}; write it again."
        )
    if found.documents != file.documents:
        raise DamagedDataError(
            f"{prefix}.idx: byte 26: has {found.documents:,} documents, but {file.prefix}.idx {file.documents:,}; write it again."
        )
    return found
