"""A corpus: the documents of several indexed files as one list, in the order of the files."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from distattn.data.files.block_digests import combined_digest
from distattn.data.files.indexed_file import IndexedFile
from distattn.data.files.label_masks import LabelMasks
from distattn.ir.cached import cached_property
from distattn.ir.errors import DistattnError

_MOST_TOKENS = np.iinfo(np.int32).max


class Corpus:
    """The documents of several indexed files, opened in O(1).

    name: the corpus's name in blends and messages. documents, tokens: totals over all files.
    """

    def __init__(self, name: str, files: Sequence[IndexedFile]):
        self.name, self.files = name, list(files)
        # the index of each file's first document in the corpus
        self._first = [0, *itertools.accumulate(file.documents for file in self.files)]
        self.documents = self._first.pop()
        self.tokens = sum(file.tokens for file in self.files)

    @classmethod
    def open(cls, name: str, paths: Sequence[str], check_tokens: bool = True) -> Corpus:
        """Open the files `paths`. Raises the same errors as `IndexedFile.open`, and DistattnError if all files are empty."""
        corpus = cls(name, [IndexedFile.open(path, check_tokens) for path in paths])
        if not corpus.tokens:
            files = ", ".join(paths) or "no files"
            raise DistattnError(f"corpus {name!r}: no tokens in {files}; name indexed files that have some.")
        return corpus

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens in each document, int32 (documents,). The first use reads and checks the index of every file.

        The array is memory-mapped if there is a single file with one sequence per document. Raises DamagedDataError if an index
        is damaged, and DistattnError for a document of more than 2,147,483,647 tokens.
        """
        for file in self.files:
            file.check_index()
        if len(self.files) == 1 and self.files[0].one_sequence_each:
            return self.files[0].sequence_lengths
        lengths = np.empty(self.documents, np.int32)
        start = 0
        for file in self.files:
            for part in file.iterate_lengths():
                if part.max() > _MOST_TOKENS:
                    longest = int(part.argmax())
                    raise DistattnError(
                        f"{file.prefix}.idx: a document of {part[longest]:,} tokens; at most {_MOST_TOKENS:,} can be packed."
                    )
                lengths[start : start + len(part)] = part
                start += len(part)
        return lengths

    @cached_property
    def digest(self) -> str:
        """A digest of the dtypes, sizes and indices of all files in order. It does not depend on their names or folders.

        With side files it takes O(1) time and also covers the tokens. Without them, it reads the indices and covers only the
        number of tokens. So the digest changes when a side file is removed.
        """
        return self._digest(True)

    def has_digest(self, digest: str) -> bool:
        """Return True if `digest` is the digest of these files, computed with or without their side files."""
        return digest in (self.digest, self._digest(False))

    def _digest(self, of_tokens: bool) -> str:
        return combined_digest(
            [
                [
                    file.dtype.name,
                    file.bin_bytes,
                    file.index_digest,
                    file.digests.bin_root if file.digests and of_tokens else None,
                ]
                for file in self.files
            ]
        )

    @cached_property
    def masks(self) -> LabelMasks | None:
        """The masks of tokens that may be labels, or None if there are no mask files. They are opened on first use.

        Raises the same errors as `LabelMasks.open`.
        """
        return LabelMasks.open(self)

    def read(self, document: int, start: int, count: int, vocabulary: int | None = None) -> np.ndarray:
        """Read tokens [start, start + count) of a document. See `IndexedFile.read`."""
        file, number = self.file_of(document)
        return file.read(number, start, count, vocabulary)

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """Return the lengths in tokens of the documents with indices `documents`. Both arrays are int64 (n,).

        Like `IndexedFile.lengths_of`, it reads only the entries needed from each file's index.
        """
        if len(self.files) == 1:
            return self.files[0].lengths_of(documents)
        file_of = np.searchsorted(self._first, documents, "right") - 1
        lengths = np.empty(len(documents), np.int64)
        for number in np.unique(file_of).tolist():
            in_file = file_of == number
            lengths[in_file] = self.files[number].lengths_of(documents[in_file] - self._first[number])
        return lengths

    def file_of(self, document: int) -> tuple[IndexedFile, int]:
        """Return (the document's file, its index in the file). Raise DistattnError if there is no such document."""
        if not 0 <= document < self.documents:
            raise DistattnError(f"corpus {self.name!r}: there is no document {document}; it has {self.documents:,}.")
        # choose the last file that begins at or before the document, because an empty file begins where the next one does
        at = bisect_right(self._first, document) - 1
        return self.files[at], document - self._first[at]
