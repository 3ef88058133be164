"""A folder of text files as documents of byte tokens."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distattn.errors import DamagedDataError, DistattnError

VOCABULARY = 256


class Document(NamedTuple):
    """Bytes [start, end) of a file."""

    file: str
    start: int
    end: int


@dataclass(frozen=True)
class Corpus:
    """All documents of a set of files, in order; together they cover every byte of every file."""

    documents: list[Document]
    files: int
    empty_files: int


def read_corpus(path: str, *, suffix: str = "", exclude: Sequence[str] = (), max_document: int) -> Corpus:
    """Find the files of `path` (folder, file or glob) and cut them into documents of at most `max_document` bytes.

    Empty files are skipped and counted. Raises DistattnError when there is no text, DamagedDataError naming the first
    file that is not UTF-8.
    """
    documents, empty = [], 0
    files = _find_files(path, suffix, exclude)
    for file in files:
        content = _read(file)
        empty += not content
        documents += [
            Document(file, start, min(start + max_document, len(content)))
            for start in range(0, len(content), max_document)
        ]
    if not documents:
        raise DistattnError(
            f"data.path: {path!r} holds no text ({len(files)} files, all empty); name a folder with UTF-8 text files."
        )
    return Corpus(documents, len(files), empty)


def read_tokens(document: Document) -> np.ndarray:
    """The document's bytes as int64 tokens. Raises DamagedDataError when the file has become shorter."""
    with open(document.file, "rb") as file:
        file.seek(document.start)
        content = file.read(document.end - document.start)
    if len(content) != document.end - document.start:
        raise DamagedDataError(f"{document.file}: shorter than when the run began; it must not change meanwhile.")
    return np.frombuffer(content, np.uint8).astype(np.int64)


def _find_files(path: str, suffix: str, exclude: Sequence[str]) -> list[str]:
    pattern = path.replace("{stdlib}", glob.escape(sysconfig.get_path("stdlib")))
    roots = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if os.path.exists(pattern) else [])
    if not roots:
        raise DistattnError(
            f"data.path: there is no file or folder {path!r}; name a folder, a file or a glob of text files."
        )
    found = set()
    for root in roots:
        for folder, subfolders, names in os.walk(root) if os.path.isdir(root) else [("", [], [root])]:
            # in place: os.walk does not enter what is taken out
            subfolders[:] = sorted(name for name in subfolders if not _excluded(name, exclude))
            found |= {os.path.join(folder, name) for name in names if name.endswith(suffix)}
    # a glob may name files inside an excluded folder directly
    anchor = Path(os.path.commonpath(roots)) if len(roots) > 1 else Path(roots[0])
    kept = [f for f in found if os.path.isfile(f) and not any(_excluded(part, exclude) for part in _parts(f, anchor))]
    if not kept:
        raise DistattnError(
            f"data.path: {path!r} holds no files"
            + (f" ending in {suffix!r}" if suffix else "")
            + (f" outside {', '.join(exclude)}" if exclude else "")
            + "; name a folder with UTF-8 text files."
        )
    return sorted(kept)


def _parts(file: str, anchor: Path) -> tuple[str, ...]:
    """The folders and the name below the anchor."""
    return Path(file).relative_to(anchor).parts or (Path(file).name,)


def _excluded(name: str, exclude: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in exclude)


def _read(file: str) -> bytes:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise DistattnError(f"data.path: {file} cannot be read: {error.strerror}.") from None
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise DamagedDataError(
            f"{file}: not UTF-8 text (byte {error.start}); convert it, or leave it out with data.exclude."
        ) from None
    return content
