"""The format of a pack plan's file: its layout, and functions that read and check the header and other bytes.

All numbers are little endian. The file is

    bytes 0 .. 63   magic (8 bytes), version (u32), 0 (u32), offset of the header (u64), its bytes (u64), its xxh3_128 digest
                    (16 bytes, big endian), 0 (u64), xxh3_64 of the 56 bytes before (u64)
    step records    for each step: packs P (u32), pieces per pack (u32 x P), and the pieces, 16 bytes each: document (u32), first
                    token (u32), tokens (u32; the highest bit, 2^31, is set if the document ends with this piece), corpus (u16),
                    epoch (u16)
    index           the offset of each step's record and the end of the last one (u64 x (steps + 1)), and the xxh3_64 of each
                    record with the step as seed (u64 x steps)
    header          JSON: rule, seed, corpora, totals, and the xxh3_128 of each 64 MiB of records and index (`blocks`)

Each record is compared with its checksum whenever it is read, so a damaged record is found before any of it is used. The header's
digest covers all other digests, and is the digest of the plan. Files are read with pread and not memory-mapped, because a process
is killed if a mapped file becomes shorter while it reads.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any, BinaryIO

import numpy as np
import xxhash

from distattn.data.packing.pack_windows import PIECE
from distattn.ir.errors import DamagedDataError, DistattnError

VERSION = 1
BLOCK_BYTES = 1 << 26
OFFSET_BYTES = CHECKSUM_BYTES = 8
_MAGIC = b"DAPACKS\n"
# magic, version, 0, header offset, header bytes, header digest, 0; a checksum follows
_PREAMBLE = struct.Struct("<8sIIQQ16sQ")
RECORDS_BEGIN = _PREAMBLE.size + CHECKSUM_BYTES
# a piece as stored in the file; no document is long enough to need the bit of _ENDS_DOCUMENT in its length
_STORED_PIECE = np.dtype(
    [("document", "<u4"), ("start", "<u4"), ("length", "<u4"), ("corpus", "<u2"), ("epoch", "<u2")]
)
PIECE_BYTES = _STORED_PIECE.itemsize
_ENDS_DOCUMENT = np.uint32(1 << 31)


def preamble_of(header: bytes, offset: int) -> bytes:
    """Return the first 64 bytes of a file whose header starts at `offset`."""
    preamble = _PREAMBLE.pack(_MAGIC, VERSION, 0, offset, len(header), xxhash.xxh3_128_digest(header), 0)
    return preamble + xxhash.xxh3_64_intdigest(preamble).to_bytes(CHECKSUM_BYTES, "little")


def stored_pieces(rows: np.ndarray) -> np.ndarray:
    """Convert pieces, PIECE (N,), to the form stored in the file, uint8 (N x 16,)."""
    stored = np.empty(len(rows), _STORED_PIECE)
    for name in _STORED_PIECE.names or ():
        stored[name] = rows[name]
    stored["length"] |= rows["ends_document"] * _ENDS_DOCUMENT
    return stored.view(np.uint8)


def loaded_pieces(record: bytes, offset: int) -> np.ndarray:
    """Return the pieces stored in a record from `offset` on, PIECE (N,)."""
    stored = np.frombuffer(record, _STORED_PIECE, offset=offset)
    rows = np.empty(len(stored), PIECE)
    for name in _STORED_PIECE.names or ():
        rows[name] = stored[name]
    rows["length"] &= ~_ENDS_DOCUMENT
    rows["ends_document"] = stored["length"] >= _ENDS_DOCUMENT
    return rows


def read_header(path: str, file: BinaryIO) -> tuple[str, dict[str, Any]]:
    """Return (digest, header) of an open plan file. Raise DamagedDataError if it is not a plan or is damaged."""
    size = os.fstat(file.fileno()).st_size
    if size < RECORDS_BEGIN:
        raise DamagedDataError(f"{path}: {size} bytes are not a pack plan; make one with make_pack_plan.")
    preamble = read_bytes(path, file, 0, RECORDS_BEGIN)
    magic, version, _, offset, header_bytes, digest, _ = _PREAMBLE.unpack_from(preamble)
    if magic != _MAGIC:
        raise DamagedDataError(f"{path}: is not a pack plan (byte 0); make one with make_pack_plan.")
    if xxhash.xxh3_64_intdigest(preamble[: _PREAMBLE.size]) != int.from_bytes(preamble[_PREAMBLE.size :], "little"):
        raise DamagedDataError(f"{path}: the first {RECORDS_BEGIN} bytes are damaged (byte 0); copy the file again.")
    if version != VERSION:
        raise DamagedDataError(
            f"{path}: is a pack plan of version {version}, and this distattn reads version {VERSION}; make the plan again."
        )
    if size != offset + header_bytes:
        raise DamagedDataError(
            f"{path}: has {size:,} bytes and should have {offset + header_bytes:,} (byte {min(size, offset + header_bytes):,}); "
            "copy the file again."
        )
    header = read_bytes(path, file, offset, header_bytes)
    if xxhash.xxh3_128_digest(header) != digest:
        raise DamagedDataError(f"{path}: the header is damaged (byte {offset:,}); copy the file again.")
    return digest.hex(), json.loads(header)


def read_bytes(path: str, file: BinaryIO, offset: int, size: int) -> bytes:
    """Read `size` bytes. Raise DamagedDataError if the file is too short, and DistattnError if it cannot be read."""
    parts = []
    while size:
        try:
            part = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DistattnError(f"{path}: cannot be read any more (byte {offset:,}): {error.strerror}.") from None
        if not part:
            raise DamagedDataError(f"{path}: ends at byte {offset:,}, before it should; copy the file again.")
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
