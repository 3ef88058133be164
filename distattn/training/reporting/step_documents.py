"""documents.jsonl of a run: the pieces of documents of each step, and a fast search for one step in a long file.

A row is a piece and has its step. Within an attempt (a run from its start, from a checkpoint, or after going back to
one) steps rise, so bisection over bytes finds a step. A later attempt is appended, and `attempt` in each of its rows is
the byte at which it begins: the search goes back from attempt to attempt, and the last one that trained a step counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.training.reporting.json_lines import Row, append_lines, json_text

# bytes read at once; a row has about 250
_PART_BYTES = 4096


def append_documents(path: Path, rows: Sequence[Row]) -> None:
    """Append the rows of one step. A row that a killed run left unfinished is ended first.

    Raises DamagedDataError where the last line is not a row, OSError where the rows cannot be written; then none is.
    """
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        ended = not end or os.pread(file.fileno(), 1, end - 1) == b"\n"
        last = _Rows(path, file, end).last()
        # an attempt begins where step numbers do not rise
        goes_on = ended and last is not None and last["step"] < rows[0]["step"]
        attempt = last["attempt"] if last and goes_on else end + (not ended)
        lines = "".join(f"{json_text(row | {'attempt': attempt})}\n" for row in rows)
    # in one write, so that concurrent readers see whole steps
    append_lines(path, lines.encode())


def documents_of_step(path: Path, step: int) -> list[Row]:
    """Return the rows of a step as it was trained last. Reads only parts of the file, which a run may be writing.

    Raises DistattnError where the file or the step is missing, DamagedDataError where a line is not a row.
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
                raise DamagedDataError(f"{path}: byte {end:,}: the row before says that its attempt begins behind it.")
            if rows := attempt.of_step(begin, step):
                return rows
            end = begin
    trained = "there is no row yet" if newest is None else f"the last row is of step {newest:,}"
    raise DistattnError(f"{path}: has no step {step:,}, counted from 0; {trained}.")


class _Rows:
    """The rows before a byte, which is the end of the file or of an attempt."""

    def __init__(self, path: Path, file: BinaryIO, end: int):
        self._path, self._file, self._end = path, file, end

    def last(self) -> Row | None:
        """Return the last row; None without rows."""
        size = _PART_BYTES
        while True:
            begin = max(0, self._end - size)
            rows = [row for _, row in self._from(self._line_after(begin))]
            if rows or not begin:
                return rows[-1] if rows else None
            size *= 2

    def of_step(self, begin: int, step: int) -> list[Row]:
        """Return the rows of a step, given a byte at which a row begins and from which steps rise."""
        # rows that begin before `low` are of earlier steps; those that begin at or after `high` are not
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
        """Yield (byte, row) of each row from a byte on at which a row begins, without those that killed runs left
        unfinished.

        Raises DamagedDataError for an unfinished row that is neither the last one nor just before an attempt.
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
        """Return the first byte from `place` on at which a line begins, or the end."""
        at = max(0, place - 1)
        while place and (part := self._read(at)):
            if (newline := part.find(b"\n")) >= 0:
                return at + newline + 1
            at += len(part)
        return at

    def _read(self, offset: int) -> bytes:
        return os.pread(self._file.fileno(), min(_PART_BYTES, max(0, self._end - offset)), offset)


def _row(line: bytes) -> Row | None:
    """Return the row of a line; None where the line is not a row."""
    try:
        row = json.loads(line)
        return (
            dict(row)
            if isinstance(row["step"], int) and isinstance(row["attempt"], int) and row["attempt"] >= 0
            else None
        )
    except (ValueError, TypeError, KeyError):
        return None
