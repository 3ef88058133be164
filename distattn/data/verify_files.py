"""Reading an indexed file from end to end, and checking all that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from distattn.data.indexed_file import IndexedFile
from distattn.data.manifest import Manifest
from distattn.ir.errors import DamagedDataError


class VerifiedFile(NamedTuple):
    """A file that is right. bytes: of .bin. vocabulary: what ids were compared with, or None where that is not known.

    digests: whether there is a side file, so that tokens and borders of documents are known to be what was written.
    """

    documents: int
    tokens: int
    bytes: int
    dtype: str
    digests: bool
    vocabulary: int | None


def verify_file(prefix: str, vocabulary: int | None, report: Callable[[int], None]) -> VerifiedFile:
    """Check the sizes, every entry of the index, every id, all digests, and the manifest where there is one.

    vocabulary: ids must be below it; by default the manifest's. report: is told how many bytes of .bin were read. Raises
    DamagedDataError naming the file and byte of the first fault, DistattnError where a file is missing.
    """
    file = IndexedFile.open(prefix)
    manifest = Manifest.load(file.prefix)
    if manifest is not None:
        for what, was, found in (
            ("documents", manifest.documents, file.documents),
            ("tokens", manifest.tokens, file.tokens),
        ):
            if was != found:
                raise DamagedDataError(f"{file.prefix}.json: {was:,} {what}, but {file.prefix}.idx has {found:,}.")
        vocabulary = vocabulary or manifest.vocabulary
    if file.digests is not None:
        file.digests.check_roots()
    file.check_index()
    for tokens in file.iterate_tokens(vocabulary):
        report(tokens.nbytes)
    return VerifiedFile(
        file.documents, file.tokens, file.bin_bytes, file.dtype.name, file.digests is not None, vocabulary
    )
