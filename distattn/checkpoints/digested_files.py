"""Files whose blocks are digested while they are written, and checked against the digests while they are read."""

from __future__ import annotations

import io
import os
from typing import Any

import xxhash

from distattn.checkpoints.manifest import BLOCK_BYTES, FileDigests
from distattn.ir.errors import DamagedDataError
from distattn.supervision.heartbeats import repeat_heartbeat

# small writes are buffered up to this size; larger ones go to the operating system directly
_BUFFER_BYTES = 1 << 20


class DigestingFile(io.RawIOBase):
    """A new file. Its bytes are digested in memory, so a disk fault does not affect the digests."""

    def __init__(self, path: os.PathLike[str] | str):
        self._file = open(path, "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115
        self._block, self._filled = xxhash.xxh3_128(), 0
        self._digests: list[str] = []
        self._bytes = 0
        # the first write error
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, content: Any) -> int:
        """Append bytes. Raises OSError on failure."""
        view = memoryview(content).cast("B")
        offset = 0
        while offset < len(view):
            part = view[offset : offset + BLOCK_BYTES - self._filled]
            self._block.update(part)
            try:
                self._file.write(part)
                repeat_heartbeat()
            except OSError as error:
                self.failure = self.failure or error
                raise
            self._filled += len(part)
            offset += len(part)
            if self._filled == BLOCK_BYTES:
                self._end_block()
        self._bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._bytes

    def flush(self) -> None:
        """Write all buffered bytes to the operating system. Raises OSError on failure."""
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        """Flush the buffer and return the descriptor, for fsync."""
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        """Close the file. Raises OSError if buffered bytes cannot be written."""
        try:
            self._file.close()
        finally:
            super().close()

    def digests(self, name: str) -> FileDigests:
        """Return the digests of the file's content. Call this after the last write."""
        if self._filled or not self._digests:
            self._end_block()
        return FileDigests(name, self._bytes, tuple(self._digests))

    def _end_block(self) -> None:
        self._digests.append(self._block.hexdigest())
        self._block.reset()
        self._filled = 0


class CheckedFile(io.RawIOBase):
    """A file opened for reading. Every block is compared with its digest before any byte of it is returned.

    Opening may raise OSError. Reading may raise OSError, or DamagedDataError naming the bytes that are not as written.
    """

    def __init__(self, path: os.PathLike[str] | str, expected: FileDigests):
        self._path, self._expected = path, expected
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._position = 0
        self._block, self._content = -1, b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a position and return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._expected.bytes}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, at most to the end of a block. Return the number of bytes read: 0 at the end of the file."""
        block, start = divmod(self._position, BLOCK_BYTES)
        if self._position >= self._expected.bytes:
            return 0
        if block != self._block:
            self._content = read_block(self._file.fileno(), self._path, self._expected, block)
            self._block = block
        view = memoryview(buffer).cast("B")
        part = memoryview(self._content)[start : start + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def read_block(descriptor: int, path: os.PathLike[str] | str, expected: FileDigests, block: int) -> bytes:
    """Read a block of a file. Raises DamagedDataError if it does not match its digest, and OSError if it cannot be read."""
    start = block * BLOCK_BYTES
    size = min(BLOCK_BYTES, expected.bytes - start)
    parts, missing = [], size
    # the system may return less than was requested
    while missing and (part := os.pread(descriptor, missing, start + size - missing)):
        parts.append(part)
        missing -= len(part)
    content = parts[0] if len(parts) == 1 else b"".join(parts)
    repeat_heartbeat()
    if xxhash.xxh3_128_hexdigest(content) != expected.blocks[block]:
        raise DamagedDataError(f"{path}: bytes {start:,} to {start + size:,} are not what was written.")
    return content
