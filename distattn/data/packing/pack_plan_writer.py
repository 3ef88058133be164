"""Write a pack plan's file window by window. `distattn.data.packing.pack_plan_format` describes its layout."""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from distattn.data.files.indexed_file import synchronise_folder
from distattn.data.packing.pack_plan import PlannedSource
from distattn.data.packing.pack_plan_format import BLOCK_BYTES, PIECE_BYTES, RECORDS_BEGIN, preamble_of, stored_pieces
from distattn.data.packing.pack_rule import PackRule
from distattn.data.packing.pack_windows import PackedWindow
from distattn.ir.errors import DistattnError

_WRITE_BUFFER = 1 << 22


class PackPlanWriter:
    """A writer of a plan's file, which has a temporary name until it is complete.

    Use it as a context manager, which removes an unfinished file on exit. Raises DistattnError if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = os.fspath(path)
        self._aside = f"{self.path}.tmp"
        self._offsets = array("Q", [RECORDS_BEGIN])
        self._checksums = array("Q")
        self._packs = self._pieces = self._tokens = 0
        self._blocks: list[str] = []
        self._block = xxhash.xxh3_128()
        self._block_bytes = 0

    @property
    def steps(self) -> int:
        """The number of steps written so far."""
        return len(self._checksums)

    def __enter__(self) -> PackPlanWriter:
        try:
            # closed by __exit__
            self._file = open(self._aside, "wb", buffering=_WRITE_BUFFER)  # noqa: SIM115
        except OSError as error:
            raise self._refused(error) from None
        self._file.write(bytes(RECORDS_BEGIN))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # on a full disk, closing fails again, just as writing did
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._aside)
        if isinstance(error, OSError):
            raise self._refused(error) from None

    def add(self, window: PackedWindow) -> None:
        """Write the steps of a window."""
        pack_ends = np.cumsum(window.packs).tolist()
        row_ends = [0, *np.cumsum(window.pieces).tolist()]
        counts = window.pieces.astype("<u4")
        rows = stored_pieces(window.rows)
        first = 0
        for end in pack_ends:
            record = b"".join(
                (
                    (end - first).to_bytes(4, "little"),
                    counts[first:end].tobytes(),
                    rows[row_ends[first] * PIECE_BYTES : row_ends[end] * PIECE_BYTES].tobytes(),
                )
            )
            self._checksums.append(xxhash.xxh3_64_intdigest(record, seed=self.steps))
            self._offsets.append(self._offsets[-1] + len(record))
            self._write(record)
            first = end
        self._packs += len(window.pieces)
        self._pieces += len(window.rows)
        self._tokens += int(window.rows["length"].sum(dtype=np.int64))

    def finish(
        self, *, seed: int, rule: PackRule, sources: list[PlannedSource], longest_wait: int, ends_with_corpora: bool
    ) -> str:
        """Write the index and the header, and give the file its final name. Return the plan's digest."""
        index = self._offsets[-1]
        for numbers in (self._offsets, self._checksums):
            self._write(np.array(numbers, "<u8").tobytes())
        if self._block_bytes:
            self._blocks.append(self._block.hexdigest())
        facts = {
            "seed": seed,
            "rule": rule.as_dict(),
            "sources": [asdict(source) for source in sources],
            "steps": self.steps,
            "packs": self._packs,
            "pieces": self._pieces,
            "tokens": self._tokens,
            "longest_wait": longest_wait,
            "ends_with_corpora": ends_with_corpora,
            "index": index,
            "blocks": self._blocks,
        }
        header = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
        preamble = preamble_of(header, self._file.tell())
        self._file.write(header)
        self._file.seek(0)
        self._file.write(preamble)
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._aside, self.path)
        synchronise_folder(self.path)
        return xxhash.xxh3_128_hexdigest(header)

    def _write(self, content: bytes) -> None:
        """Write bytes of the records or the index, and update the digests of their blocks."""
        self._file.write(content)
        while content:
            part = content[: BLOCK_BYTES - self._block_bytes]
            self._block.update(part)
            self._block_bytes += len(part)
            if self._block_bytes == BLOCK_BYTES:
                self._blocks.append(self._block.hexdigest())
                self._block.reset()
                self._block_bytes = 0
            content = content[len(part) :]

    def _refused(self, error: OSError) -> DistattnError:
        return DistattnError(f"{self.path}: cannot be written: {error.strerror}; free space, or name another file.")
