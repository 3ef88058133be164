"""The side file PREFIX.xxh3 of an indexed file: a digest of each block of PREFIX.bin and of PREFIX.idx.

The file is little endian. The header has the magic, the block size in bytes, the sizes of both files, a root digest of each table
and a digest of the header itself. Then follow the tables of PREFIX.bin and PREFIX.idx with one xxh3-64
(github.com/Cyan4973/xxHash) per block; the last block of a file may be shorter. A root is the xxh3-64 of its table's bytes. The
side file is optional: without it, indexed files are read as Megatron reads them, and altered tokens are not noticed.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from typing import IO

import numpy as np
import xxhash

from distattn.ir.errors import DamagedDataError

# large enough that checking digests adds little to reading time, and small enough that few unneeded bytes are read
# (benchmarks/LOG.md)
BLOCK_BYTES = 1 << 14
_MAGIC = b"dattnxh3"
_HEADER = struct.Struct("<8s5Q")
_CHECKSUM = struct.Struct("<Q")
_TABLES_OFFSET = _HEADER.size + _CHECKSUM.size
# files are hashed in chunks of this size
_PART_BYTES = 1 << 23
Buffer = bytes | bytearray | memoryview


class BlockDigests:
    """The digests of one indexed file, memory-mapped. bin_root, idx_root: the root digests of the two tables."""

    def __init__(self, file: str, tables: np.ndarray, bin_blocks: int, roots: tuple[int, int]):
        self.file = file
        self.bin_root, self.idx_root = roots
        self.bin_table, self.idx_table = tables[:bin_blocks], tables[bin_blocks:]
        self._digest = xxhash.xxh3_64_intdigest

    @classmethod
    def open(cls, prefix: str, bin_bytes: int, idx_bytes: int) -> BlockDigests | None:
        """Open PREFIX.xxh3 in O(1). Return None if it does not exist.

        Raise DamagedDataError if its header is damaged, or if it was written for files of other sizes.
        """
        file = f"{prefix}.xxh3"
        if not os.path.lexists(file):
            return None
        with open(file, "rb") as opened:
            head = opened.read(_TABLES_OFFSET)
            size = os.fstat(opened.fileno()).st_size
            if len(head) < _TABLES_OFFSET or not head.startswith(_MAGIC):
                raise DamagedDataError(f"{file}: byte 0: has no block digests; remove it, or write {prefix}.bin again.")
            if head[_HEADER.size :] != _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head[: _HEADER.size])):
                raise DamagedDataError(f"{file}: byte 0: the header was altered; write {prefix}.bin again.")
            _, block, bin_size, idx_size, bin_root, idx_root = _HEADER.unpack(head[: _HEADER.size])
            if block != BLOCK_BYTES:
                raise DamagedDataError(f"{file}: byte 8: blocks of {block} bytes; this version has {BLOCK_BYTES}.")
            for name, expected, actual in (
                (f"{prefix}.bin", bin_size, bin_bytes),
                (f"{prefix}.idx", idx_size, idx_bytes),
            ):
                if expected != actual:
                    raise DamagedDataError(
                        f"{name}: byte {min(expected, actual):,}: has {actual:,} bytes, but had {expected:,} when {file} was "
                        "written: one of them was cut, or they do not belong together."
                    )
            bin_blocks, idx_blocks = -(-bin_bytes // block), -(-idx_bytes // block)
            if size != _TABLES_OFFSET + 8 * (bin_blocks + idx_blocks):
                raise DamagedDataError(f"{file}: byte {size:,}: cut or longer than its header says; write it again.")
            mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ)
        tables = np.frombuffer(mapped, "<u8", offset=_TABLES_OFFSET)
        return cls(file, tables, bin_blocks, (bin_root, idx_root))

    def check(self, kind: str, prefix: str, first: int, content: memoryview) -> None:
        """Compare a file's blocks, from block number `first` on, with their digests.

        kind: "bin" or "idx". content: the bytes of these blocks, each complete; only the file's last block may be shorter. Raises
        DamagedDataError naming the file and the bytes of the first block that differs.
        """
        table = self.bin_table if kind == "bin" else self.idx_table
        digest = self._digest
        last = first + -(-len(content) // BLOCK_BYTES)
        for block, expected in enumerate(table[first:last].tolist()):
            start = block * BLOCK_BYTES
            if digest(content[start : start + BLOCK_BYTES]) != expected:
                offset = first * BLOCK_BYTES + start
                end = min(offset + BLOCK_BYTES, first * BLOCK_BYTES + len(content))
                raise DamagedDataError(
                    f"{prefix}.{kind}: bytes {offset:,} to {end:,} are not what was written (digest in {self.file}); "
                    "restore the file from a copy, or write it again."
                )

    def check_roots(self) -> None:
        """Compare both tables with their root digests. Raise DamagedDataError if a table differs."""
        for table, root in ((self.bin_table, self.bin_root), (self.idx_table, self.idx_root)):
            if self._digest(table.data) != root:
                raise DamagedDataError(f"{self.file}: a table of digests was altered; write the file again.")


class CheckedBlocks:
    """The set of a file's blocks that have been compared with their digests.

    It has one bit per block: 8 MB for a terabyte, of which only modified pages take memory.
    """

    def __init__(self, file_bytes: int) -> None:
        blocks = -(-file_bytes // BLOCK_BYTES)
        self._bits = np.zeros(-(-blocks // 8), np.uint8).data

    def __contains__(self, block: int) -> bool:
        return bool(self._bits[block >> 3] >> (block & 7) & 1)

    def first_missing(self, first: int, last: int) -> int:
        """Return the first of the blocks [first, last) that is not in the set, or `last` if the set has all of them."""
        return next((block for block in range(first, last) if block not in self), last)

    def add(self, first: int, last: int) -> None:
        """Add blocks [first, last). If two threads add blocks at the same time, some may be lost; these are compared again."""
        for block in range(first, last):
            self._bits[block >> 3] |= 1 << (block & 7)


class BlockDigestsWriter:
    """A writer of the side file, fed with the bytes of the files as they are written: first all of .bin, then all of .idx."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._new_hash = xxhash.xxh3_64
        self._sizes, self._roots = [0], [self._new_hash()]
        self._block, self._filled = self._new_hash(), 0
        self._file.write(bytes(_TABLES_OFFSET))

    def update(self, content: Buffer) -> None:
        """Hash the next bytes of the current file."""
        view = memoryview(content).cast("B")
        self._sizes[-1] += len(view)
        at = 0
        while at < len(view):
            part = view[at : at + BLOCK_BYTES - self._filled]
            self._block.update(part)
            self._filled += len(part)
            if self._filled == BLOCK_BYTES:
                self._end_block()
            at += len(part)

    def end_bin(self) -> None:
        """End the table of .bin. The bytes passed to `update` from now on are those of .idx."""
        self._end_block()
        self._sizes.append(0)
        self._roots.append(self._new_hash())

    def finish(self) -> None:
        """End the table of .idx, and write the header."""
        self._end_block()
        header = _HEADER.pack(_MAGIC, BLOCK_BYTES, *self._sizes, *(root.intdigest() for root in self._roots))
        self._file.seek(0)
        self._file.write(header + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header)))

    def _end_block(self) -> None:
        if self._filled:
            entry = struct.pack("<Q", self._block.intdigest())
            self._file.write(entry)
            self._roots[-1].update(entry)
            self._block.reset()
            self._filled = 0


def root_digest(file: str) -> int:
    """Return the root digest that a side file would have for a file. Reads the entire file."""
    digest, root = xxhash.xxh3_64_digest, xxhash.xxh3_64()
    with open(file, "rb") as opened:
        while part := opened.read(_PART_BYTES):
            view = memoryview(part)
            for start in range(0, len(part), BLOCK_BYTES):
                # xxh3_64_digest is big endian, and the table is little endian
                root.update(digest(view[start : start + BLOCK_BYTES])[::-1])
    return int(root.intdigest())


def combined_digest(*facts: object) -> str:
    """Return the xxh3-128 of `facts` (numbers, strings, and lists of these) serialized as JSON, as 32 hexadecimal digits."""
    return str(xxhash.xxh3_128_hexdigest(json.dumps(facts, separators=(",", ":")).encode()))
