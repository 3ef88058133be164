"""A folder of text files as documents of byte tokens."""

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

from distattn.ir.errors import DamagedDataError, DistattnError

VOCABULARY = 256
# files are checked in parts of this size
_PART_BYTES = 1 << 20
# and told from binary ones by these
_FIRST_BYTES = 4096
_MOST_DOCUMENTS = 5_000_000


class Document(NamedTuple):
    """Bytes [start, end) of a file."""

    file: str
    start: int
    end: int

    @property
    def length(self) -> int:
        """Tokens of the document: one for each byte."""
        return self.end - self.start


@dataclass(frozen=True)
class TextCorpus:
    """All documents of a set of files, in order; together they cover every byte of every file."""

    documents: list[Document]
    files: int
    empty_files: int
    binary_files: int


def find_corpus(path: str, *, suffix: str = "", exclude: Sequence[str] = (), max_document_tokens: int) -> TextCorpus:
    """Find the files of `path` (folder, file or glob) and cut them into documents of at most so many tokens (bytes).

    Of each file the size and the first bytes are looked up; `check_text` reads them. Empty files, and among several files
    binary ones, are skipped and counted. Raises DistattnError when there is no text.
    """
    documents: list[Document] = []
    empty = binary = 0
    files = find_files(path, suffix, exclude)
    for file in files:
        size = _size(file)
        empty += not size
        # where many files are named at once, some are none of ours: compiled ones, pictures
        if size and len(files) > 1 and _looks_binary(file):
            binary += 1
            continue
        if len(documents) + size / max_document_tokens > _MOST_DOCUMENTS:
            raise DistattnError(
                f"data.max_document_tokens: documents of {max_document_tokens} tokens would be more than {_MOST_DOCUMENTS:,}; "
                "make them longer, or name fewer (or larger) files."
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
    """Read every file of a corpus once, a part at a time, and check that it is UTF-8 of the size that was found.

    Raises DamagedDataError naming the first file that is not.
    """
    # the last document of a file ends where the file does
    sizes = {document.file: document.end for document in corpus.documents}
    for file, size in sizes.items():
        read = _check_utf8(file)
        if read != size:
            raise DamagedDataError(f"{file}: had {size:,} bytes, now {read:,}; it must not change while a run begins.")


def read_tokens(document: Document) -> np.ndarray:
    """Read the document's bytes, and only those, as int64 tokens (end - start,).

    Raises DamagedDataError when the file is no longer what it was.
    """
    try:
        with open(document.file, "rb") as file:
            file.seek(document.start)
            content = file.read(document.length)
    except OSError as error:
        raise DamagedDataError(
            f"{document.file}: could be read when the run began, but not now: {error.strerror}."
        ) from None
    if len(content) != document.length:
        raise DamagedDataError(f"{document.file}: shorter than when the run began; it must not change meanwhile.")
    return np.frombuffer(content, np.uint8).astype(np.int64)


def find_files(
    path: str, suffix: str, exclude: Sequence[str], options: tuple[str, str] = ("data.path", "data.exclude")
) -> list[str]:
    """The files of a folder, a file or a glob, by name. Raises DistattnError where there are none.

    options: what `path` and `exclude` are called where a person gives them.
    """
    literal = path.replace("{stdlib}", sysconfig.get_path("stdlib"))
    if os.path.exists(literal):
        roots, anchor = [literal], literal
    else:
        pattern = path.replace("{stdlib}", glob.escape(sysconfig.get_path("stdlib")))
        roots = sorted(glob.glob(pattern, recursive=True))
        # exclusions are about what the wildcards matched, not about where the user's data lies
        anchor = os.path.dirname(pattern[: re.search(r"[*?[]|$", pattern).start()])  # type: ignore[union-attr]
    if not roots:
        raise DistattnError(
            f"{options[0]}: there is no file or folder {path!r}; name a folder, a file or a glob of text files."
        )
    found = {
        os.path.join(root, name)
        for root in roots
        if not _excluded(os.path.relpath(root, anchor or "."), exclude)
        for name in (_walk(root, exclude, options) if os.path.isdir(root) else [""])
    }
    kept = sorted(file.rstrip(os.sep) for file in found if file.rstrip(os.sep).endswith(suffix))
    if not kept:
        raise DistattnError(
            f"{options[0]}: {path!r} holds no files"
            + (f" ending in {suffix!r}" if suffix else "")
            + (f" outside {', '.join(exclude)}" if exclude else "")
            + "; name a folder with UTF-8 text files."
        )
    return kept


def _walk(root: str, exclude: Sequence[str], options: tuple[str, str]) -> Iterator[str]:
    """Paths of all files below root, relative to it; links are followed, each folder entered once."""

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
        # in place: os.walk enters what is left
        subfolders[:] = fresh
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in names if not _excluded(name, exclude))


def _excluded(path: str, exclude: Sequence[str]) -> bool:
    return any(fnmatch(part, pattern) for part in Path(path).parts for pattern in exclude)


def _size(file: str) -> int:
    try:
        found = os.stat(file)
    except OSError as error:
        raise DistattnError(f"data.path: {file} cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise DistattnError(f"data.path: {file} is no regular file; leave it out with data.exclude.")
    return found.st_size


def _looks_binary(file: str) -> bool:
    """Whether a file begins with bytes that no text has, whatever its encoding: text in another one than UTF-8 is refused."""
    try:
        with open(file, "rb") as opened:
            first = opened.read(_FIRST_BYTES)
            return b"\0" in first and not first.startswith(
                (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
            )
    except OSError as error:
        raise DistattnError(f"data.path: {file} cannot be read: {error.strerror}.") from None


def _check_utf8(file: str) -> int:
    """Decode a file part by part. Returns its bytes; raises DamagedDataError naming the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        with open(file, "rb") as opened:
            while part := opened.read(_PART_BYTES):
                # of a character that the last part cut
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
