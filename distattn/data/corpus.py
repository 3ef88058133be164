"""A corpus: the documents of several indexed files as one list, in the order in which the files are named."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from distattn.data.block_digests import combined_digest
from distattn.data.indexed_file import IndexedFile
from distattn.data.label_masks import LabelMasks
from distattn.ir.cached import cached_property
from distattn.ir.errors import DistattnError

_MOST_TOKENS = np.iinfo(np.int32).max


class Corpus:
    """Several indexed files, opened in O(1). name: in a blend and in messages. documents, tokens: of all files together."""

    def __init__(self, name: str, files: Sequence[IndexedFile]):
        self.name, self.files = name, list(files)
        # the number of each file's first document
        self._first = [0, *itertools.accumulate(file.documents for file in self.files)]
        self.documents = self._first.pop()
        self.tokens = sum(file.tokens for file in self.files)

    @classmethod
    def open(cls, name: str, paths: Sequence[str], check_tokens: bool = True) -> Corpus:
        """Open the files of these prefixes, as `IndexedFile.open` does. Raises DistattnError where there is no token, too."""
        corpus = cls(name, [IndexedFile.open(path, check_tokens) for path in paths])
        if not corpus.tokens:
            given = ", ".join(paths) or "no files"
            raise DistattnError(f"corpus {name!r}: no tokens in {given}; name indexed files that have some.")
        return corpus

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 (documents,). Reads and checks the index of every file.

        Memory-mapped where there is one file, and each of its documents is one sequence. Raises DamagedDataError where an index
        is wrong, DistattnError for a document of more than 2,147,483,647 tokens.
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
        """A digest of the dtypes, sizes and indices of all files in their order; names and folders do not count.

        With side files it is O(1), and the tokens count, too; without them the indices are read, and of the tokens only the
        sizes are known. So it changes when a side file is removed.
        """
        return self._digest(True)

    def has_digest(self, digest: str) -> bool:
        """Whether these are the files of a digest, or those that had it before side files were written for all of them."""
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
        """What lies beside the files and says which tokens are labels, found at first use; None where there is nothing.

        Raises what `LabelMasks.open` raises.
        """
        return LabelMasks.open(self)

    def read(self, document: int, start: int, count: int, vocabulary: int | None = None) -> np.ndarray:
        """Read tokens [start, start + count) of a document, as `IndexedFile.read` does."""
        file, number = self.file_of(document)
        return file.read(number, start, count, vocabulary)

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of some documents by their numbers, int64 (n,) both, as `IndexedFile.lengths_of`: no index is read whole."""
        if len(self.files) == 1:
            return self.files[0].lengths_of(documents)
        file_of = np.searchsorted(self._first, documents, "right") - 1
        lengths = np.empty(len(documents), np.int64)
        for number in np.unique(file_of).tolist():
            mine = file_of == number
            lengths[mine] = self.files[number].lengths_of(documents[mine] - self._first[number])
        return lengths

    def file_of(self, document: int) -> tuple[IndexedFile, int]:
        """The file that has a document, and the document's number in it. Raises DistattnError where no file has it."""
        if not 0 <= document < self.documents:
            raise DistattnError(f"corpus {self.name!r}: there is no document {document}; it has {self.documents:,}.")
        # the last file that begins at or before it: files without documents begin where the next one does
        at = bisect_right(self._first, document) - 1
        return self.files[at], document - self._first[at]
