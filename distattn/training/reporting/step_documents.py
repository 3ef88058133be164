"""A run's documents.jsonl: the document pieces of each step, and a fast lookup of one step in a long file.

Each row is one piece, with its step. Step numbers increase within an attempt (a run from its start, from a checkpoint,
or after a rollback), so bisection over byte offsets finds a step. Later attempts are appended; the field `attempt` of
their rows is the byte offset at which the attempt begins. The search goes from the last attempt backwards and returns
the first match.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.training.reporting.json_lines import Row, append_lines, json_text

# bytes per read; a row has about 250 bytes
_PART_BYTES = 4096


def append_documents(path: Path, rows: Sequence[Row]) -> None:
    """Append the rows of one step, after ending a row that a killed run left unfinished.

    Raises DamagedDataError if the last line is not a row, and OSError, without writing any row, if not all of them can
    be written.
    """
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        ended = not end or os.pread(file.fileno(), 1, end - 1) == b"\n"
        last = _Rows(path, file, end).last()
        # a new attempt begins where the step number does not increase
        goes_on = ended and last is not None and last["step"] < rows[0]["step"]
        attempt = last["attempt"] if last and goes_on else end + (not ended)
        lines = "".join(f"{json_text(row | {'attempt': attempt})}\n" for row in rows)
    # in one write, so that concurrent readers never see part of a step
    append_lines(path, lines.encode())


def documents_of_step(path: Path, step: int) -> list[Row]:
    """Return a step's rows from the last attempt that trained it. Reads only parts of the file, which may be growing.

    Raises DistattnError if the file or the step is missing, and DamagedDataError if a line is not a row.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DistattnError(
            f"{path}: cannot be read: {error.strerror}; name the folder of a run that has begun."
        ) from None
    newest = None
    with file:
        end = file.seek(0, os.SEEK_END)
        while (last := (attempt := _Rows(path, file, end)).last()) is not None:
            newest = last["step"] if newest is None else newest
            begin = last["attempt"]
            if begin >= end:
                raise DamagedDataError(f"{path}: byte {end:,}: the row before says that its attempt begins after it.")
            if rows := attempt.of_step(begin, step):
                return rows
            end = begin
    trained = "there is no row yet" if newest is None else f"the last row is of step {newest:,}"
    raise DistattnError(f"{path}: has no step {step:,}, counted from 0; {trained}.")


class _Rows:
    """The rows before a byte offset, which is the end of the file or of an attempt."""

    def __init__(self, path: Path, file: BinaryIO, end: int):
        self._path, self._file, self._end = path, file, end

    def last(self) -> Row | None:
        """Return the last row, or None if there are no rows."""
        size = _PART_BYTES
        while True:
            begin = max(0, self._end - size)
            rows = [row for _, row in self._from(self._line_after(begin))]
            if rows or not begin:
                return rows[-1] if rows else None
            size *= 2

    def of_step(self, begin: int, step: int) -> list[Row]:
        """Return the rows of a step. begin: byte offset of a row after which step numbers never decrease."""
        # invariant: rows before `low` belong to earlier steps, rows at or after `high` do not
        low, high = begin, self._end
        while high - low > _PART_BYTES:
            middle = (low + high) // 2
            place, row = next(self._from(self._line_after(middle)), (self._end, None))
            if row is None or row["step"] >= step:
                high = middle
            else:
                low = place
        rows = []
        for _, row in self._from(low):
            if row["step"] > step:
                break
            if row["step"] == step:
                rows.append(row)
        return rows

    def _from(self, at: int) -> Iterator[tuple[int, Row]]:
        """Yield (byte offset, row) for each row from offset `at`, where a row begins, skipping unfinished rows.

        Killed runs leave unfinished rows. Raises DamagedDataError if an unfinished row is neither the last row nor
        directly before a new attempt.
        """
        content, unfinished = b"", None
        while part := self._read(at + len(content)):
            *lines, content = (content + part).split(b"\n")
            for line in lines:
                row = _row(line)
                if unfinished is not None and (row is None or row["attempt"] != at):
                    raise DamagedDataError(
                        f"{self._path}: byte {unfinished:,}: not a row of a step's documents; restore the file from a copy."
                    )
                unfinished = at if row is None else None
                if row is not None:
                    yield at, row
                at += len(line) + 1

    def _line_after(self, place: int) -> int:
        """Return the first byte offset at or after `place` where a line begins, or the end."""
        at = max(0, place - 1)
        while place and (part := self._read(at)):
            if (newline := part.find(b"\n")) >= 0:
                return at + newline + 1
            at += len(part)
        return at

    def _read(self, offset: int) -> bytes:
        return os.pread(self._file.fileno(), min(_PART_BYTES, max(0, self._end - offset)), offset)


def _row(line: bytes) -> Row | None:
    """Return the row in a line, or None if the line is not a row."""
    try:
        row = json.loads(line)
        return (
            dict(row)
            if isinstance(row["step"], int) and isinstance(row["attempt"], int) and row["attempt"] >= 0
            else None
        )
    except (ValueError, TypeError, KeyError):
        return None
