"""Read the documents in one piece of a source of any kind. Errors name the file and line of an unreadable document."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO

from distattn.data.extra_packages import import_extra
from distattn.data.tokenizing.document_sources import Piece, Source, open_parquet
from distattn.ir.errors import DamagedDataError, first_line

_PART_BYTES = 1 << 20
# bytes read at a time from a compressed file; they may expand to many times that size
_COMPRESSED_BYTES = 1 << 17
_LARGEST_WINDOW = 1 << 31
_BATCH_ROWS = 512


def read_documents(source: Source, piece: Piece, field: str) -> Iterator[tuple[str, int]]:
    """Yield the documents of a piece: (text, stored bytes of the piece read so far).

    field: the JSON key or Parquet column with the text. Raises DamagedDataError if a document cannot be read, naming the file and
    the line, row or byte, and if the file has changed.
    """
    _check_unchanged(source)
    try:
        yield from _READERS[source.kind](source, piece, field)
    except OSError as error:
        raise DamagedDataError(f"{source.file}: cannot be read: {error.strerror or error}.") from None
    _check_unchanged(source)


def _read_text(source: Source, piece: Piece, field: str) -> Iterator[tuple[str, int]]:
    """Yield the entire file as one document."""
    with open(source.file, "rb") as file:
        content = file.read()
    try:
        yield content.decode(), len(content)
    except UnicodeDecodeError as error:
        raise DamagedDataError(
            f"{source.file}: not UTF-8 text (byte {error.start}); convert it, or leave it out with --exclude."
        ) from None


def _read_lines(source: Source, piece: Piece, field: str) -> Iterator[tuple[str, int]]:
    """Yield the JSON lines that start within bytes [piece.start, piece.stop) of the file."""
    with open(source.file, "rb") as file:
        if piece.start:
            # a line that starts before `start` belongs to the previous piece
            file.seek(piece.start - 1)
            file.readline()
        at = file.tell()
        while at < piece.stop and (line := file.readline()):
            try:
                text = _text_of(line, field)
            except ValueError as error:
                raise DamagedDataError(f"{source.file}:{_line_number(source.file, at)}: {error}") from None
            at += len(line)
            if text is not None:
                yield text, min(at, piece.stop) - piece.start


def _read_compressed_lines(source: Source, piece: Piece, field: str) -> Iterator[tuple[str, int]]:
    """Yield the JSON lines of a .gz or .zst file."""
    if not source.bytes:
        raise DamagedDataError(f"{source.file}: is empty, so not a compressed file; take it from a copy.")
    with open(source.file, "rb") as file:
        lines = _zstd_lines(source.file, file) if source.kind == "zstd" else _gzip_lines(source.file, file)
        for number, line in enumerate(lines, 1):
            try:
                text = _text_of(line, field)
            except ValueError as error:
                raise DamagedDataError(f"{source.file}:{number}: {error}") from None
            if text is not None:
                yield text, file.tell()


def _read_parquet(source: Source, piece: Piece, field: str) -> Iterator[tuple[str, int]]:
    """Yield the rows of row groups [start, stop). Error messages count rows from 0 within the file."""
    opened = open_parquet(source.file)
    arrow = import_extra("pyarrow", f"reading {source.file}")
    schema = opened.schema_arrow
    if field not in schema.names:
        raise DamagedDataError(
            f"{source.file}: no column {field!r}; it has {', '.join(schema.names)}: name one with --field."
        )
    kind = schema.field(field).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise DamagedDataError(f"{source.file}: column {field!r} holds {kind}, not text; name another with --field.")
    groups = [opened.metadata.row_group(group).num_rows for group in range(piece.stop)]
    row, done, rows = sum(groups[: piece.start]), 0, sum(groups[piece.start :])
    batches = opened.iter_batches(_BATCH_ROWS, range(piece.start, piece.stop), [field], use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except (arrow.ArrowException, OSError) as error:
            raise DamagedDataError(f"{source.file}: row {row + done} cannot be read: {first_line(error)}.") from None
        if batch is None:
            break
        for value in batch.column(0):
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                raise DamagedDataError(
                    f"{source.file}: row {row + done}: column {field!r} is not UTF-8 text."
                ) from None
            if text is None:
                raise DamagedDataError(
                    f"{source.file}: row {row + done}: column {field!r} is null; every row needs a text."
                )
            done += 1
            yield text, piece.bytes * done // rows
    opened.close()


_READERS: dict[str, Callable[[Source, Piece, str], Iterator[tuple[str, int]]]] = {
    "text": _read_text,
    "lines": _read_lines,
    "gzip": _read_compressed_lines,
    "zstd": _read_compressed_lines,
    "parquet": _read_parquet,
}


def _check_unchanged(source: Source) -> None:
    try:
        now = os.stat(source.file)
    except OSError as error:
        raise DamagedDataError(
            f"{source.file}: existed when the command began, but not now: {error.strerror}."
        ) from None
    if (now.st_size, now.st_mtime_ns) != (source.bytes, source.modified):
        raise DamagedDataError(
            f"{source.file}: changed since the command began; run it again when the file is complete."
        )


def _text_of(line: bytes, field: str) -> str | None:
    """Return the text of a line, or None if the line is blank. Raise ValueError naming the problem but not the location."""
    if line.isspace():
        return None
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start} of the line); convert the file.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno}); each line holds one object.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON that can be read: {first_line(error)}.") from None
    if not isinstance(row, dict):
        raise ValueError(f"not an object with a field {field!r}, but {_json_type(row)}; each line holds one object.")
    if field not in row:
        others = ", ".join(list(row)[:8]) or "none"
        raise ValueError(f"no field {field!r}; its fields are {others}: name one with --field.")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is {_json_type(text)}, not text.")
    # JSON can express half of a surrogate pair, but UTF-8 cannot
    if b"\\u" in line:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"field {field!r} has half of a surrogate pair (character {error.start}).") from None
    return text


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _line_number(path: str, offset: int) -> int:
    """Return the number, counted from 1, of the line that starts at byte `offset` of a file."""
    number = 1
    with open(path, "rb") as file:
        while offset and (part := file.read(min(offset, _PART_BYTES))):
            number += part.count(b"\n")
            offset -= len(part)
    return number


def _gzip_lines(path: str, file: IO[bytes]) -> Iterator[bytes]:
    number = 0
    try:
        with gzip.GzipFile(fileobj=file) as opened:
            for number, line in enumerate(opened, 1):  # noqa: B007 - for the message
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedDataError(f"{path}: cut or damaged after line {number}: {first_line(error)}.") from None


def _zstd_lines(path: str, file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines in all frames of a file. zstandard's own stream reader would accept a truncated file."""
    zstandard = import_extra("zstandard", f"reading {path}")
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame, begun = decompressor.decompressobj(), False
    number = 0
    # the parts of an unfinished line read so far
    parts: list[bytes] = []
    try:
        while part := file.read(_COMPRESSED_BYTES):
            while part:
                begun = True
                *ends, rest = frame.decompress(part).split(b"\n")
                for end in ends:
                    number += 1
                    yield b"".join([*parts, end, b"\n"])
                    parts = []
                parts.append(rest)
                part = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, begun = decompressor.decompressobj(), False
    except zstandard.ZstdError as error:
        raise DamagedDataError(f"{path}: damaged after line {number}: {first_line(error)}.") from None
    if begun:
        raise DamagedDataError(
            f"{path}: cut after line {number}, in the middle of a frame; restore the file from a copy."
        )
    if any(parts):
        yield b"".join(parts)
