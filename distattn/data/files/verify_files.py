"""Read an indexed file from end to end, and check everything that can be checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from distattn.data.files.block_digests import BlockDigestsWriter
from distattn.data.files.indexed_file import IndexedFile, synchronise_folder
from distattn.data.files.manifest import Manifest
from distattn.ir.errors import DamagedDataError, DistattnError

_PART_BYTES = 1 << 23


class VerifiedFile(NamedTuple):
    """A file without faults. bytes: the size of .bin. vocabulary: the limit below which all ids are, or None if it is not known.

    digests: True if there is a side file, which proves that the tokens and document boundaries are as written.
    """

    documents: int
    tokens: int
    bytes: int
    dtype: str
    digests: bool
    vocabulary: int | None


def verify_file(
    prefix: str, vocabulary: int | None, report: Callable[[int], None], write_digests: bool = False
) -> VerifiedFile:
    """Check the sizes, every entry of the index, every id, all digests, and the manifest if there is one.

    vocabulary: ids must be below it; by default the manifest's. report: called with the bytes of .bin read since its last call.
    write_digests: if there are no digests yet and no fault is found, write the digests of the bytes read to PREFIX.xxh3. Raises
    DamagedDataError naming the file and byte of the first fault, and DistattnError if a file is missing or cannot be written.
    """
    file = IndexedFile.open(prefix)
    manifest = Manifest.load(file.prefix)
    if manifest is not None:
        for unit, expected, actual in (
            ("documents", manifest.documents, file.documents),
            ("tokens", manifest.tokens, file.tokens),
        ):
            if expected != actual:
                raise DamagedDataError(
                    f"{file.prefix}.json: {expected:,} {unit}, but {file.prefix}.idx has {actual:,}."
                )
        vocabulary = vocabulary or manifest.vocabulary
    if file.digests is not None:
        file.digests.check_roots()
    file.check_index()
    if file.digests is None and write_digests:
        _write_digests(file, vocabulary, report)
    else:
        for tokens in file.iterate_tokens(vocabulary):
            report(tokens.nbytes)
    has_digests = file.digests is not None or write_digests
    return VerifiedFile(file.documents, file.tokens, file.bin_bytes, file.dtype.name, has_digests, vocabulary)


def _write_digests(file: IndexedFile, vocabulary: int | None, report: Callable[[int], None]) -> None:
    """Read the file once, check the ids, and write the side file atomically."""
    path = f"{file.prefix}.xxh3"
    try:
        try:
            with open(f"{path}.tmp", "w+b") as aside:
                digests = BlockDigestsWriter(aside)
                for tokens in file.iterate_tokens(vocabulary):
                    digests.update(tokens.data)
                    report(tokens.nbytes)
                digests.end_bin()
                with open(f"{file.prefix}.idx", "rb") as index:
                    while part := index.read(_PART_BYTES):
                        digests.update(part)
                digests.finish()
                aside.flush()
                os.fsync(aside.fileno())
            os.rename(f"{path}.tmp", path)
            synchronise_folder(path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(f"{path}.tmp")
            raise
    except OSError as error:
        raise DistattnError(
            f"{path}: cannot be written: {error.strerror}; make room, or allow writing there."
        ) from None
