"""Text files as documents whose tokens are bytes."""

from __future__ import annotations

import codecs
import glob
import os
import re
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFileWriter
from distattn.ir.errors import DamagedDataError, DistattnError

VOCABULARY = 256
# files are checked in chunks of this size
_PART_BYTES = 1 << 20
# bytes read from the start of a file to tell whether it is binary
_FIRST_BYTES = 4096
_MOST_DOCUMENTS = 5_000_000


class Document(NamedTuple):
    """A document: bytes [start, end) of a file."""

    file: str
    start: int
    end: int

    @property
    def length(self) -> int:
        """The number of tokens, one per byte."""
        return self.end - self.start


@dataclass(frozen=True)
class TextCorpus:
    """The documents of a set of files, in order. Together they cover every byte of the text files."""

    documents: list[Document]
    files: int
    empty_files: int
    binary_files: int


def find_corpus(path: str, *, suffix: str = "", exclude: Sequence[str] = (), max_document_tokens: int) -> TextCorpus:
    """Find the files of `path` (folder, file or glob), and cut them into documents of at most `max_document_tokens` bytes.

    Reads only the size and the first bytes of each file; `check_text` reads them in full. Empty files are skipped and counted,
    and so are binary files if there are several files. Raises DistattnError if there is no text.
    """
    documents: list[Document] = []
    empty = binary = 0
    files = find_files(path, suffix, exclude)
    for file in files:
        size = _size(file)
        empty += not size
        # a folder may also hold other files, such as compiled code or images
        if size and len(files) > 1 and _looks_binary(file):
            binary += 1
            continue
        if len(documents) + size / max_document_tokens > _MOST_DOCUMENTS:
            raise DistattnError(
                f"data.max_document_tokens: more than {_MOST_DOCUMENTS:,} documents of {max_document_tokens} tokens would "
                "result; make them longer, or name fewer (or larger) files."
            )
        documents += [
            Document(file, start, min(start + max_document_tokens, size))
            for start in range(0, size, max_document_tokens)
        ]
    if not documents:
        raise DistattnError(
            f"data.path: {path!r} holds no text ({len(files)} files, all empty or binary); name a folder with UTF-8 text files."
        )
    return TextCorpus(documents, len(files), empty, binary)


def check_text(corpus: TextCorpus) -> None:
    """Read every file of a corpus once, and check that it is UTF-8 and that its size has not changed.

    Raises DamagedDataError naming the first file that fails a check.
    """
    # the last document of a file ends where the file does
    sizes = {document.file: document.end for document in corpus.documents}
    for file, size in sizes.items():
        read = _check_utf8(file)
        if read != size:
            raise DamagedDataError(f"{file}: had {size:,} bytes, now {read:,}; it must not change while a run begins.")


def read_tokens(document: Document) -> np.ndarray:
    """Read the bytes of a document as int64 tokens (end - start,). Raise DamagedDataError if the file has become shorter."""
    try:
        with open(document.file, "rb") as file:
            file.seek(document.start)
            content = file.read(document.length)
    except OSError as error:
        raise DamagedDataError(
            f"{document.file}: was readable when the run began, but is not now: {error.strerror}."
        ) from None
    if len(content) != document.length:
        raise DamagedDataError(f"{document.file}: shorter than when the run began; it must not change meanwhile.")
    return np.frombuffer(content, np.uint8).astype(np.int64)


def byte_corpus(text: TextCorpus, prefix: str, name: str = "text") -> Corpus:
    """Write the documents of text files to PREFIX.bin and PREFIX.idx as byte tokens, and open the result as a corpus.

    Raise DamagedDataError if a file is not UTF-8 text.
    """
    check_text(text)
    with IndexedFileWriter(prefix, np.uint8) as writer:
        for document in text.documents:
            writer.add(read_tokens(document))
    return Corpus.open(name, [prefix])


def find_files(
    path: str, suffix: str, exclude: Sequence[str], options: tuple[str, str] = ("data.path", "data.exclude")
) -> list[str]:
    """Return the files that `path` (a folder, a file or a glob) names, sorted. Raise DistattnError if there are no files.

    options: the names of the user's options for `path` and `exclude`, used in errors.
    """
    literal = path.replace("{stdlib}", sysconfig.get_path("stdlib"))
    if os.path.exists(literal):
        roots, anchor = [literal], literal
    else:
        pattern = path.replace("{stdlib}", glob.escape(sysconfig.get_path("stdlib")))
        roots = sorted(glob.glob(pattern, recursive=True))
        # exclusions apply to the path components matched by wildcards, not to the folders above them
        anchor = os.path.dirname(pattern[: re.search(r"[*?[]|$", pattern).start()])  # type: ignore[union-attr]
    if not roots:
        raise DistattnError(
            f"{options[0]}: there is no file or folder {path!r}; name a folder, a file or a glob of text files."
        )
    files = {
        os.path.join(root, name)
        for root in roots
        if not _excluded(os.path.relpath(root, anchor or "."), exclude)
        for name in (_walk(root, exclude, options) if os.path.isdir(root) else [""])
    }
    kept = sorted(file.rstrip(os.sep) for file in files if file.rstrip(os.sep).endswith(suffix))
    if not kept:
        raise DistattnError(
            f"{options[0]}: {path!r} holds no files"
            + (f" ending in {suffix!r}" if suffix else "")
            + (f" outside {', '.join(exclude)}" if exclude else "")
            + "; name a folder with UTF-8 text files."
        )
    return kept


def _walk(root: str, exclude: Sequence[str], options: tuple[str, str]) -> Iterator[str]:
    """Yield the paths of all files below `root`, relative to it. Links are followed, and each folder is visited once."""

    def refuse(error: OSError) -> None:
        raise DistattnError(
            f"{options[0]}: {error.filename} cannot be read: {error.strerror}; leave it out with {options[1]}."
        )

    entered = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        fresh = []
        for name in sorted(subfolders):
            real = os.path.realpath(os.path.join(folder, name))
            if not _excluded(name, exclude) and real not in entered:
                entered.add(real)
                fresh.append(name)
        # change the list in place: os.walk visits the folders left in it
        subfolders[:] = fresh
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in names if not _excluded(name, exclude))


def _excluded(path: str, exclude: Sequence[str]) -> bool:
    return any(fnmatch(part, pattern) for part in Path(path).parts for pattern in exclude)


def _size(file: str) -> int:
    try:
        status = os.stat(file)
    except OSError as error:
        raise DistattnError(f"data.path: {file} cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise DistattnError(f"data.path: {file} is not a regular file; leave it out with data.exclude.")
    return status.st_size


def _looks_binary(file: str) -> bool:
    """Return True if a file's first bytes cannot be text in any encoding. Text other than UTF-8 is refused later."""
    try:
        with open(file, "rb") as opened:
            first = opened.read(_FIRST_BYTES)
            return b"\0" in first and not first.startswith(
                (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
            )
    except OSError as error:
        raise DistattnError(f"data.path: {file} cannot be read: {error.strerror}.") from None


def _check_utf8(file: str) -> int:
    """Decode a file in chunks, and return its size in bytes. Raise DamagedDataError naming the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        with open(file, "rb") as opened:
            while part := opened.read(_PART_BYTES):
                # the number of bytes held back because the previous part ended within a character
                held = len(decoder.getstate()[0])
                decoder.decode(part)
                size += len(part)
        held, part = len(decoder.getstate()[0]), b""
        decoder.decode(b"", final=True)
    except OSError as error:
        raise DistattnError(f"data.path: {file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DamagedDataError(
            f"{file}: not UTF-8 text (byte {size - held + error.start}); convert it, or leave it out with data.exclude."
        ) from None
    return size
