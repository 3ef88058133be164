"""Megatron's indexed format: PREFIX.bin has the tokens of all documents, PREFIX.idx the place of each document.

`indexed_format.py` describes the layout of the index. A document is a range of sequences, usually one. Files written by distattn
have a side file with the digests of all blocks (`block_digests.py`); files of other programs are read without digests.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO

import numpy as np

from distattn.data.files.block_digests import BLOCK_BYTES, BlockDigests, BlockDigestsWriter, CheckedBlocks, root_digest
from distattn.data.files.indexed_format import DTYPES, HEADER, MAGIC, VERSION, map_index, section_offsets
from distattn.ir.cached import cached_property
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.supervision.heartbeats import thread_activity

# the sizes of the chunks in which documents are checked and bytes are copied
_PART_DOCUMENTS = 1 << 20
_PART_BYTES = 1 << 23
# in the order in which the files are renamed
_SUFFIXES = (".bin", ".xxh3", ".idx")
_NAMES = [dtype.name for dtype in DTYPES.values()]


class IndexedFile:
    """An indexed file, opened for reading in O(1): the index is memory-mapped, and tokens are read on request.

    prefix: the path of PREFIX.bin and PREFIX.idx without suffix. dtype: the stored dtype of tokens. documents, sequences, tokens:
    how many there are. sequence_lengths: tokens per sequence, int32 (S,). pointers: each sequence's first byte in PREFIX.bin,
    int64 (S,). document_ends: int64 (D + 1,), from 0 to S; document d has sequences document_ends[d] to document_ends[d + 1].
    modes: int8 (S,), or None. digests: the content of PREFIX.xxh3, or None if it does not exist. check_tokens: True if tokens are
    compared with their digests.

    Data is checked when it is read. The index entries of a document are compared with each other. A block with a digest is
    compared with it the first time it is read; later reads of the block read only the requested bytes. So if a bit flips on the
    disk later, the next process that opens the file notices, but this one does not: it usually gets the right bytes from the page
    cache, and wrong bytes if the cache has dropped them. Tokens are read with `pread`, not from a mapping, so the process
    survives even if the file is truncated while it is open.
    """

    def __init__(self, prefix: str, index: np.ndarray, bin_file: int, check_tokens: bool):
        # set it first: `__del__` closes it even if this method fails
        self._bin_file = bin_file
        bin_bytes = os.fstat(bin_file).st_size
        _, _, code, sequences, limits = HEADER.unpack(index[: HEADER.size].tobytes())
        self.prefix, self.dtype = prefix, DTYPES[code]
        self.sequences, self.documents, self.bin_bytes = sequences, limits - 1, bin_bytes
        self.tokens = bin_bytes // self.dtype.itemsize
        self._index = index
        self._offsets = section_offsets(sequences, limits)
        lengths, pointers, ends, modes, end = self._offsets
        self.sequence_lengths = index[lengths:pointers].view("<i4")
        self.pointers = index[pointers:ends].view("<i8")
        self.document_ends = index[ends:modes].view("<i8")
        self.modes = index[modes:end].view("i1") if len(index) == end else None
        self.digests = BlockDigests.open(prefix, bin_bytes, len(index))
        self.check_tokens = check_tokens
        self._checked_index, self._checked_bin = CheckedBlocks(len(index)), CheckedBlocks(bin_bytes)

    @classmethod
    def open(cls, prefix: str, check_tokens: bool = True) -> IndexedFile:
        """Open PREFIX.bin and PREFIX.idx. `prefix` may end in either suffix.

        check_tokens: compare what is read from PREFIX.bin with its digests, if there are any. Without this check, reading takes
        about two thirds of the time (benchmarks/indexed_reading.py), and only `distattn data verify` detects altered tokens.
        Raises DistattnError if a file is missing, and DamagedDataError if the headers and the file sizes contradict each other.
        """
        prefix = prefix.removesuffix(".idx").removesuffix(".bin")
        index = map_index(f"{prefix}.idx")
        try:
            bin_file = os.open(f"{prefix}.bin", os.O_RDONLY)
        except OSError as error:
            raise DistattnError(f"{prefix}.bin: cannot be read: {error.strerror}; {prefix}.idx is there.") from None
        file = cls(prefix, index, bin_file, check_tokens)
        file._check_limits()
        return file

    def __del__(self) -> None:
        os.close(self._bin_file)

    def __reduce__(self) -> tuple[object, ...]:
        # the receiving process opens the files itself
        return IndexedFile.open, (self.prefix, self.check_tokens)

    def __len__(self) -> int:
        return self.documents

    @cached_property
    def document_lengths(self) -> np.ndarray:
        """The number of tokens in each document, int64 (D,). The first use reads and checks the entire index (`check_index`)."""
        self.check_index()
        return np.concatenate([np.zeros(0, np.int64), *self.iterate_lengths()])

    @cached_property
    def index_digest(self) -> int:
        """The root digest of the index. It comes from the side file if there is one; otherwise the entire index is read."""
        return self.digests.idx_root if self.digests else root_digest(f"{self.prefix}.idx")

    def read(self, document: int, start: int, count: int, vocabulary: int | None = None) -> np.ndarray:
        """Read tokens [start, start + count) of a document. Return an array (count,) of the stored dtype.

        vocabulary: check that all ids are in [0, vocabulary); by default they are not checked. Raises DistattnError if the range
        extends outside the document, and DamagedDataError naming the file and byte if the file is damaged or an id is out of
        range.
        """
        first, length = self._located(document)
        if start < 0 or count < 0 or start + count > length:
            raise DistattnError(
                f"{self.prefix}.idx: document {document} has {length:,} tokens, not {start:,} to {start + count:,}."
            )
        offset = first + start * self.dtype.itemsize
        tokens = self._read_bytes(offset, count * self.dtype.itemsize).view(self.dtype)
        if vocabulary is not None and count:
            self._check_ids(tokens, offset, vocabulary)
        return tokens

    def first_byte(self, document: int) -> int:
        """Return the offset in PREFIX.bin at which a document begins. Raises the same errors as `read`."""
        return self._located(document)[0]

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """Return the lengths in tokens of the documents with indices `documents`. Both arrays are int64 (n,).

        Only their index entries are read and checked. Raises DistattnError if a document does not exist, and DamagedDataError if
        an entry is wrong.
        """
        outside = (documents < 0) | (documents >= self.documents)
        if outside.any():
            raise DistattnError(
                f"{self.prefix}.idx: there is no document {documents[outside][0]}; it has {self.documents:,}."
            )
        lengths_begin, _, ends_begin = self._offsets[:3]
        self._check_entries(ends_begin + 8 * documents, 16)
        first, last = self.document_ends[documents], self.document_ends[documents + 1]
        # a fast path, since most documents are a single sequence
        simple = (last - first == 1) & (first >= 0) & (last <= self.sequences)
        self._check_entries(lengths_begin + 4 * first[simple], 4)
        lengths = np.full(len(documents), -1)
        lengths[simple] = self.sequence_lengths[first[simple]]
        for at in np.flatnonzero(lengths < 0).tolist():
            lengths[at] = self._locate(int(documents[at]))[1]
        return lengths

    def iterate_tokens(self, vocabulary: int | None = None) -> Iterator[np.ndarray]:
        """Read all tokens in order, in chunks of at most 8 MiB, with the checks of `read`."""
        for offset in range(0, self.bin_bytes, _PART_BYTES):
            tokens = self._read_bytes(offset, min(_PART_BYTES, self.bin_bytes - offset)).view(self.dtype)
            if vocabulary is not None:
                self._check_ids(tokens, offset, vocabulary)
            yield tokens

    def iterate_lengths(self) -> Iterator[np.ndarray]:
        """Yield the lengths of all documents in order, in int64 arrays of about a million entries. Call `check_index` first."""
        for start in range(0, self.documents, _PART_DOCUMENTS):
            ends = self.document_ends[start : start + _PART_DOCUMENTS + 1]
            first, last = int(ends[0]), int(ends[-1])
            # use the running sum of lengths, so that documents without sequences get length 0
            total = np.concatenate([[0], np.cumsum(self.sequence_lengths[first:last], dtype=np.int64)])
            yield np.diff(total[ends - first])

    def check_index(self) -> None:
        """Check every entry of the index. Raise DamagedDataError naming the byte at which the first wrong entry begins."""
        for offset in range(0, len(self._index), _PART_BYTES):
            self._check_index_bytes(offset, min(_PART_BYTES, len(self._index) - offset))
        for start in range(0, self.sequences, _PART_DOCUMENTS):
            self._check_sequences(start, min(start + _PART_DOCUMENTS, self.sequences))
        for start in range(0, self.documents, _PART_DOCUMENTS):
            falls = np.diff(self.document_ends[start : start + _PART_DOCUMENTS + 1]) < 0
            if falls.any():
                self._refuse(2, start + int(falls.argmax()) + 1, "a document ends before it begins")

    @cached_property
    def one_sequence_each(self) -> bool:
        """True if every document is one sequence, so that `sequence_lengths` are the documents' lengths."""
        if self.documents != self.sequences:
            return False
        parts = range(0, self.documents, _PART_DOCUMENTS)
        ends = (self.document_ends[start : start + _PART_DOCUMENTS] for start in parts)
        return all((part == np.arange(start, start + len(part))).all() for start, part in zip(parts, ends, strict=True))

    def _check_limits(self) -> None:
        """Check the first and the last entries of the sections, which determine the sizes of both files."""
        limits, sequences = self.document_ends, self.sequences
        self._check_index_bytes(0, HEADER.size)
        if limits[0] != 0:
            self._refuse(2, 0, f"the first document begins at sequence {limits[0]:,}, not 0")
        if limits[-1] != sequences:
            self._refuse(2, self.documents, f"the last document ends at sequence {limits[-1]:,} of {sequences:,}")
        if sequences:
            self._check_sequences(sequences - 1, sequences)
        elif self.bin_bytes:
            raise DamagedDataError(f"{self.prefix}.bin: has {self.bin_bytes:,} bytes, but its index no sequence.")

    def _located(self, document: int) -> tuple[int, int]:
        """Return (offset in PREFIX.bin, number of tokens) of a document. Raise DistattnError if it does not exist."""
        if not 0 <= document < self.documents:
            raise DistattnError(f"{self.prefix}.idx: there is no document {document}; it has {self.documents:,}.")
        return self._locate(document)

    def _locate(self, document: int) -> tuple[int, int]:
        """Return (offset in PREFIX.bin, number of tokens) of an existing document, after checking its index entries."""
        lengths, pointers, ends = self._offsets[:3]
        self._check_index_bytes(ends + 8 * document, 16)
        first, last = self.document_ends.item(document), self.document_ends.item(document + 1)
        if not 0 <= first <= last <= self.sequences:
            self._refuse(2, document + 1, f"document {document} has sequences {first:,} to {last:,}")
        if first == last:
            return 0, 0
        self._check_index_bytes(lengths + 4 * first, 4 * (last - first))
        self._check_index_bytes(pointers + 8 * first, 8 * min(last - first + 1, self.sequences - first))
        if last - first > 1:
            self._check_sequences(first, last)
            return self.pointers.item(first), int(self.sequence_lengths[first:last].sum(dtype=np.int64))
        length, pointer = self.sequence_lengths.item(first), self.pointers.item(first)
        end = self.pointers.item(last) if last < self.sequences else self.bin_bytes
        if length < 0 or pointer < 0 or pointer + length * self.dtype.itemsize != end or end > self.bin_bytes:
            self._check_sequences(first, last)
        return pointer, length

    def _check_sequences(self, first: int, last: int) -> None:
        """Check that the lengths and pointers of sequences [first, last) agree with each other, and stay within PREFIX.bin."""
        lengths = self.sequence_lengths[first:last]
        pointers = self.pointers[first : last + 1]
        if last == self.sequences:
            pointers = np.append(pointers, self.bin_bytes)
        outside = (lengths < 0) | (pointers[:-1] < 0) | (pointers[1:] > self.bin_bytes)
        wrong = outside | (np.diff(pointers) != lengths.astype(np.int64) * self.dtype.itemsize)
        if first == 0 and pointers[0] != 0:
            self._refuse(1, 0, f"the first sequence begins at byte {pointers[0]:,} of {self.prefix}.bin, not 0")
        if wrong.any():
            at = int(wrong.argmax())
            size, begin, end = lengths[at], pointers[at], pointers[at + 1]
            self._refuse(
                0,
                first + at,
                f"sequence {first + at:,} has {size:,} tokens of {self.dtype.itemsize} bytes, but bytes {begin:,} to {end:,} of "
                f"{self.prefix}.bin, which has {self.bin_bytes:,}",
            )

    def _check_entries(self, offsets: np.ndarray, size: int) -> None:
        """Check the digests of the index blocks that hold the entries of `size` bytes at `offsets`, unless checked before."""
        if self.digests is not None:
            for block in np.unique(np.stack([offsets, offsets + size - 1]) // BLOCK_BYTES).tolist():
                self._check_index_bytes(block * BLOCK_BYTES, 1)

    def _check_index_bytes(self, offset: int, size: int) -> None:
        """Check the digests of the index blocks that hold bytes [offset, offset + size), unless checked before."""
        if self.digests is None or not size:
            return
        first, last = offset // BLOCK_BYTES, -(-(offset + size) // BLOCK_BYTES)
        if self._checked_index.first_missing(first, last) == last:
            return
        content = self._index.data[first * BLOCK_BYTES : last * BLOCK_BYTES]
        self.digests.check("idx", self.prefix, first, content)
        self._checked_index.add(first, last)

    def _read_bytes(self, offset: int, size: int) -> np.ndarray:
        """Read bytes [offset, offset + size) of PREFIX.bin, uint8 (size,).

        A block with a digest is read in full, and checked, the first time any of its bytes are read.
        """
        if self.digests is None or not self.check_tokens or not size:
            return self._pread(offset, size)
        first, last = offset // BLOCK_BYTES, -(-(offset + size) // BLOCK_BYTES)
        missing = self._checked_bin.first_missing(first, last)
        if missing == last:
            return self._pread(offset, size)
        # read entire blocks from the first to the last unchecked block, and only the requested bytes before and after
        # these blocks
        while last - 1 in self._checked_bin:
            last -= 1
        checked_begin, checked_end = missing * BLOCK_BYTES, min(last * BLOCK_BYTES, self.bin_bytes)
        begin, end = min(offset, checked_begin), max(offset + size, checked_end)
        content = self._pread(begin, end - begin)
        self.digests.check("bin", self.prefix, missing, content[checked_begin - begin : checked_end - begin].data)
        self._checked_bin.add(missing, last)
        return content[offset - begin : offset - begin + size]

    def _pread(self, offset: int, size: int) -> np.ndarray:
        with thread_activity(f"reading {self.prefix}.bin"):
            return self._read_at(offset, size)

    def _read_at(self, offset: int, size: int) -> np.ndarray:
        content = np.empty(size, np.uint8)
        done = 0
        while done < size:
            try:
                # preadv reads at most 2 GiB per call
                got = os.preadv(self._bin_file, [content[done:].data], offset + done)
            except OSError as error:
                raise DamagedDataError(
                    f"{self.prefix}.bin: byte {offset + done:,} cannot be read: {error.strerror}."
                ) from None
            if not got:
                raise DamagedDataError(
                    f"{self.prefix}.bin: byte {offset + done:,}: ends here, but had {self.bin_bytes:,} bytes when it was opened; "
                    "it must not change while it is read."
                )
            done += got
        return content

    def _check_ids(self, tokens: np.ndarray, offset: int, vocabulary: int) -> None:
        # test that the ids are valid, not that they are invalid, because comparisons with NaN are always false
        if tokens.min() >= 0 and tokens.max() < vocabulary:
            return
        at = int(np.argmin((tokens >= 0) & (tokens < vocabulary)))
        raise DamagedDataError(
            f"{self.prefix}.bin: byte {offset + at * self.dtype.itemsize:,}: token id {tokens[at]} is not below {vocabulary:,}, "
            "the size of the vocabulary; the file was altered, or made with another tokenizer."
        )

    def _refuse(self, section: int, entry: int, problem: str) -> None:
        """Raise DamagedDataError for an entry of a section (0: lengths, 1: pointers, 2: document ends)."""
        offset = self._offsets[section] + entry * (4, 8, 8)[section]
        raise DamagedDataError(
            f"{self.prefix}.idx: byte {offset:,}: {problem}; restore the file from a copy, or write it again."
        )


class IndexedFileWriter:
    """A writer of an indexed file with one sequence per document, and of its digests. Use it as a context manager.

    prefix: the path of the files without suffix; no file with it may exist yet. dtype: the stored dtype of tokens, one of the
    format's eight. The files are written under temporary names (.tmp). If the context ends without an error, they are synced to
    disk and renamed; otherwise they are removed. Memory use is small, regardless of the number of documents. Raises DistattnError
    for tokens that the dtype cannot hold, and if a file cannot be written.
    """

    def __init__(self, prefix: str, dtype: np.typing.DTypeLike):
        self.prefix, self.dtype = prefix, np.dtype(dtype).newbyteorder("<")
        self.documents = self.tokens = 0
        codes = [code for code, dtype_of_code in DTYPES.items() if dtype_of_code == self.dtype]
        if not codes:
            raise DistattnError(f"{prefix}: the indexed format has no {self.dtype}; it has {', '.join(_NAMES)}.")
        self._code = codes[0]
        for name in _SUFFIXES:
            if os.path.lexists(prefix + name):
                raise DistattnError(f"{prefix}{name}: exists already; remove it, or choose another name.")

    def __enter__(self) -> IndexedFileWriter:
        with self._writing():
            self._files: dict[str, IO[bytes]] = {}
            for name in _SUFFIXES:
                self._files[name] = open(f"{self.prefix}{name}.tmp", "w+b")
            self._bin, self._idx = self._files[".bin"], self._files[".idx"]
            self._idx.write(bytes(HEADER.size))
            self._digests = BlockDigestsWriter(self._files[".xxh3"])
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            with self._writing():
                self._write_index()
                self._publish()
        else:
            self._discard()

    def add(self, tokens: np.typing.ArrayLike) -> None:
        """Add one document: tokens (n,)."""
        tokens = np.asarray(tokens)
        self.add_many(tokens, [len(tokens)])

    def add_many(self, tokens: np.typing.ArrayLike, lengths: np.typing.ArrayLike) -> None:
        """Add k documents. tokens: all documents, concatenated, (sum of lengths,). lengths: tokens per document, (k,)."""
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, np.int64)
        if tokens.ndim != 1 or len(lengths) and lengths.min() < 0 or lengths.sum() != len(tokens):
            raise DistattnError(
                f"{self.prefix}: {tokens.shape} tokens are not documents of {int(lengths.sum()):,} tokens together."
            )
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise DistattnError(
                f"{self.prefix}: a document of {lengths.max():,} tokens; the format has at most 2,147,483,647."
            )
        stored = tokens.astype(self.dtype)
        if stored.dtype != tokens.dtype and (stored != tokens).any():
            at = int((stored != tokens).argmax())
            raise DistattnError(
                f"{self.prefix}: token {tokens[at]} cannot be stored as {self.dtype.name}; use a wider dtype."
            )
        with self._writing():
            self._bin.write(stored.data)
            self._idx.write(lengths.astype("<i4").data)
            self._digests.update(stored.data)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def append(self, file: IndexedFile) -> None:
        """Add all documents of another indexed file with the same dtype. If that file has digests, they are checked."""
        if file.dtype != self.dtype:
            raise DistattnError(f"{file.prefix}: has {file.dtype.name} tokens, {self.prefix} has {self.dtype.name}.")
        file.check_index()
        for tokens in file.iterate_tokens():
            with self._writing():
                self._bin.write(tokens.data)
                self._digests.update(tokens.data)
        for lengths in file.iterate_lengths():
            with self._writing():
                self._idx.write(lengths.astype("<i4").data)
        self.documents += file.documents
        self.tokens += file.tokens

    def _write_index(self) -> None:
        """Write the header and the sections after the lengths, which are already in the file. Then hash the entire index."""
        total = 0
        for start in range(0, self.documents, _PART_DOCUMENTS):
            self._idx.seek(HEADER.size + 4 * start)
            count = min(_PART_DOCUMENTS, self.documents - start)
            ends = total + np.cumsum(np.frombuffer(self._idx.read(4 * count), "<i4"), dtype="<i8") * self.dtype.itemsize
            self._idx.seek(HEADER.size + 4 * self.documents + 8 * start)
            self._idx.write(np.concatenate([[total], ends[:-1]]).astype("<i8").data)
            total = int(ends[-1])
        self._idx.seek(0, os.SEEK_END)
        for start in range(0, self.documents + 1, _PART_DOCUMENTS):
            self._idx.write(np.arange(start, min(start + _PART_DOCUMENTS, self.documents + 1), dtype="<i8").data)
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, self._code, self.documents, self.documents + 1))
        self._digests.end_bin()
        self._idx.seek(0)
        while part := self._idx.read(_PART_BYTES):
            self._digests.update(part)
        self._digests.finish()

    def _publish(self) -> None:
        """Rename the files to their final names, the index last, so that all files exist if the index does."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        done = []
        try:
            for name in _SUFFIXES:
                os.rename(f"{self.prefix}{name}.tmp", self.prefix + name)
                done.append(name)
            synchronise_folder(self.prefix)
        except OSError:
            for name in done:
                os.unlink(self.prefix + name)
            raise

    def _discard(self) -> None:
        for name, file in self._files.items():
            # closing also fails if the buffered bytes do not fit on the disk
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.prefix}{name}.tmp")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Remove all files if the block fails, and turn an OSError into a DistattnError."""
        try:
            yield
        except BaseException as error:
            self._discard()
            if not isinstance(error, OSError):
                raise
            raise DistattnError(
                f"{self.prefix}: cannot be written after {self.tokens:,} tokens: {error.strerror}; make room, or write elsewhere."
            ) from None


def synchronise_folder(path: str) -> None:
    """Synchronize the folder of `path` to disk, so that renamed files survive a power failure."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
