"""Find files of documents (text, plain or compressed JSON lines, Parquet), and cut them into shards.

A shard is the unit of work of a tokenizing process. The cuts depend only on the files, so finished shards can be reused whatever
the number of processes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from distattn.data.extra_packages import import_extra
from distattn.data.files.text import find_files
from distattn.ir.errors import DamagedDataError, DistattnError, first_line

# bytes of text in a shard: small corpora get smaller shards so that all cores have work, but a shard must be large enough that
# syncing its files to disk costs little
_LARGEST_SHARD, _SMALLEST_SHARD = 1 << 26, 1 << 22
# approximate bytes of text per stored byte
_COMPRESSION = {"gzip": 4, "zstd": 4, "parquet": 3, "lines": 1, "text": 1}
# the kind of a file by its suffix
SUFFIXES = {".parquet": "parquet", ".txt": "text", ".text": "text", ".md": "text", ".rst": "text"}
for _lines in (".jsonl", ".ndjson", ".json"):
    SUFFIXES |= {_lines: "lines", f"{_lines}.gz": "gzip", f"{_lines}.zst": "zstd"}


class Source(NamedTuple):
    """A file of documents. kind: a value of SUFFIXES. modified: time of the last change, in nanoseconds since 1970."""

    file: str
    kind: str
    bytes: int
    modified: int


class Piece(NamedTuple):
    """A part of a source. source: the source's number. start, stop: range of bytes or Parquet row groups. bytes: stored size."""

    source: int
    start: int
    stop: int
    bytes: int


def find_sources(paths: Sequence[str], suffix: str = "", exclude: Sequence[str] = ()) -> list[Source]:
    """Return the files that `paths` (folders, files or globs) name, in the order of `paths`, sorted by name within each.

    suffix: use only files whose names end in this, and read files of unknown kinds as text. Raises DistattnError for files
    of unknown kinds (if no suffix is given) and for files named twice.
    """
    sources: list[Source] = []
    named: dict[str, str] = {}
    for path in paths:
        for file in find_files(path, suffix, exclude, options=("tokenize", "--exclude")):
            real = os.path.realpath(file)
            if real in named:
                raise DistattnError(f"{file} is {named[real]} again; its documents would be in the data twice.")
            named[real] = file
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                raise DistattnError(f"{file}: not a regular file; leave it out with --exclude.")
            sources.append(Source(file, _kind(file, suffix), status.st_size, status.st_mtime_ns))
    return sources


def cut_shards(sources: Sequence[Source]) -> list[list[Piece]]:
    """Cut the sources, in order, into shards of 4 to 64 MiB of text each. Reads nothing but the footers of Parquet files."""
    shards: list[list[Piece]] = []
    size, room = _shard_bytes(sources), 0
    for number, source in enumerate(sources):
        for piece in _pieces(number, source, size):
            if room <= 0:
                shards.append([])
                room = size
            shards[-1].append(piece)
            # count at least 1 KiB, because opening even a small file takes time
            room -= max(piece.bytes * _COMPRESSION[source.kind], 1024)
    return shards


def open_parquet(file: str) -> Any:
    """Open a Parquet file. Raise DamagedDataError if it is damaged or of another kind."""
    arrow = import_extra("pyarrow", f"reading {file}")
    parquet = import_extra("pyarrow.parquet", f"reading {file}")
    try:
        return parquet.ParquetFile(file)
    except (arrow.ArrowException, OSError) as error:
        raise DamagedDataError(f"{file}: not a Parquet file, or damaged: {first_line(error)}.") from None


def _shard_bytes(sources: Sequence[Source]) -> int:
    """Return the shard size in bytes. It is a power of two, so an added or changed file rarely changes how the others are cut."""
    text = sum(source.bytes * _COMPRESSION[source.kind] for source in sources)
    return max(_SMALLEST_SHARD, min(_LARGEST_SHARD, 1 << text.bit_length() >> 6))


def _pieces(number: int, source: Source, shard_bytes: int) -> Iterator[Piece]:
    """Yield the pieces of a source, each about `shard_bytes` of text. A source that cannot be cut is a single piece."""
    if source.kind == "parquet":
        metadata = open_parquet(source.file).metadata
        start = size = 0
        for group in range(metadata.num_row_groups):
            columns = metadata.row_group(group)
            size += sum(columns.column(column).total_compressed_size for column in range(columns.num_columns))
            if size * _COMPRESSION["parquet"] >= shard_bytes or group + 1 == metadata.num_row_groups:
                yield Piece(number, start, group + 1, size)
                start, size = group + 1, 0
    elif source.kind == "lines":
        for start in range(0, source.bytes, shard_bytes):
            stop = min(start + shard_bytes, source.bytes)
            yield Piece(number, start, stop, stop - start)
    else:
        yield Piece(number, 0, source.bytes, source.bytes)


def _kind(file: str, suffix: str) -> str:
    name = os.path.basename(file).lower()
    for known_suffix, kind in SUFFIXES.items():
        if name.endswith(known_suffix):
            return kind
    if suffix:
        return "text"
    ending = os.path.splitext(name)[1] or name
    raise DistattnError(
        f"{file}: unknown suffix {ending!r}; known are {', '.join(sorted(SUFFIXES))}. With --suffix {ending} such files are "
        "read as text; --exclude leaves files out."
    )
