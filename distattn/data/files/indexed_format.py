"""The layout of an index in Megatron's indexed format, and the checks made when it is opened.

The index is little endian. The header (34 bytes) has the magic, the version, the code of the dtype, the number S of sequences and
the number D + 1 of document limits. Then follow the tokens per sequence, int32 (S,); the byte of PREFIX.bin at which each
sequence begins, int64 (S,); the first sequence of each document, and S, int64 (D + 1,); and in multimodal files the mode of each
sequence, int8 (S,). There are no gaps between sequences. The format is megatron-core's
(megatron/core/datasets/indexed_dataset.py).
"""

from __future__ import annotations

import mmap
import os
import struct

import numpy as np

from distattn.ir.errors import DamagedDataError, DistattnError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# dtype by its code in the header
DTYPES = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), 1)
}


def section_offsets(sequences: int, limits: int) -> tuple[int, int, int, int, int]:
    """Return the offsets of lengths, pointers, document limits and modes in an index, and the offset at which the modes end."""
    pointers = HEADER.size + 4 * sequences
    ends = pointers + 8 * sequences
    modes = ends + 8 * limits
    return HEADER.size, pointers, ends, modes, modes + sequences


def map_index(path: str) -> np.ndarray:
    """Check the header and the size of an index, and memory-map it. Return uint8 (bytes,)."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
            if len(head) < HEADER.size or not head.startswith(MAGIC):
                raise DamagedDataError(
                    f"{path}: byte 0: not an index in Megatron's indexed format, or cut in its header."
                )
            _, version, code, sequences, limits = HEADER.unpack(head)
            if version != VERSION:
                raise DamagedDataError(f"{path}: byte 9: version {version}; only version {VERSION} is known.")
            if code not in DTYPES:
                raise DamagedDataError(f"{path}: byte 17: dtype code {code}; there are 1 to {len(DTYPES)}.")
            *_, without, with_modes = section_offsets(sequences, limits)
            if not limits or size not in (without, with_modes):
                raise DamagedDataError(
                    f"{path}: byte {min(size, without):,}: {size:,} bytes, but {sequences:,} sequences and {limits:,} limits of "
                    f"documents take {without:,}, or {with_modes:,} with modes; the index was cut or altered."
                )
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DistattnError(
            f"{path}: cannot be read: {error.strerror}; name the prefix of a .bin and .idx file."
        ) from None
    return np.frombuffer(mapped, np.uint8)
