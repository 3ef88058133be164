"""documents.jsonl of a run: which pieces of documents each step was trained on, and finding those of one step in a long file.

A row is a piece, and says its step. Within an attempt (a run from its begin, from a checkpoint, or after going back to one)
steps rise, so a step is found by bisection over bytes. A later attempt is added behind, and `attempt` of each of its rows is the
byte at which it begins: so from the last row one gets from attempt to attempt, and the last one that trained a step counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.training.json_lines import Row, append_lines, json_text

# bytes read at once; a row has about 250
_PART_BYTES = 4096


def append_documents(path: Path, rows: Sequence[Row]) -> None:
    """Add the rows of one step behind the others. A row that a killed run left unfinished is ended first.

    Raises DamagedDataError where the last row is none, OSError where the rows cannot be written; then none is.
    """
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        ended = not end or os.pread(file.fileno(), 1, end - 1) == b"\n"
        last = _Rows(path, file, end).last()
        # where steps do not go on, an attempt begins
        goes_on = ended and last is not None and last["step"] < rows[0]["step"]
        attempt = last["attempt"] if last and goes_on else end + (not ended)
        lines = "".join(f"{json_text(row | {'attempt': attempt})}\n" for row in rows)
    # at once, so that who reads meanwhile sees whole steps
    append_lines(path, lines.encode())


def documents_of_step(path: Path, step: int) -> list[Row]:
    """The rows of a step as it was trained last. Reads some parts of the file, however long it is; a run may be writing it.

    Raises DistattnError where there is no file, or no such step in it, DamagedDataError where a row is none.
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
            if found := attempt.of_step(begin, step):
                return found
            end = begin
    trained = "there is no row yet" if newest is None else f"the last row is of step {newest:,}"
    raise DistattnError(f"{path}: has no step {step:,}, counted from 0; {trained}.")


class _Rows:
    """The rows before a byte, which is the end of the file or that of an attempt."""

    def __init__(self, path: Path, file: BinaryIO, end: int):
        self._path, self._file, self._end = path, file, end

    def last(self) -> Row | None:
        """The last row; None where there is none."""
        size = _PART_BYTES
        while True:
            begin = max(0, self._end - size)
            rows = [row for _, row in self._from(self._line_after(begin))]
            if rows or not begin:
                return rows[-1] if rows else None
            size *= 2

    def of_step(self, begin: int, step: int) -> list[Row]:
        """The rows of a step, where a row begins at a byte, and steps rise from there on."""
        # rows that begin before `low` are of earlier steps, those that begin at `high` or behind it are not
        low, high = begin, self._end
        while high - low > _PART_BYTES:
            middle = (low + high) // 2
            place, row = next(self._from(self._line_after(middle)), (self._end, None))
            if row is None or row["step"] >= step:
                high = middle
            else:
                low = place
        found = []
        for _, row in self._from(low):
            if row["step"] > step:
                break
            if row["step"] == step:
                found.append(row)
        return found

    def _from(self, at: int) -> Iterator[tuple[int, Row]]:
        """(Byte, row) of each row from a byte on at which one begins. Those that killed runs left unfinished are left out.

        Raises DamagedDataError for one that is neither the last nor before the begin of an attempt.
        """
        content, unfinished = b"", None
        while part := self._read(at + len(content)):
            *lines, content = (content + part).split(b"\n")
            for line in lines:
                row = _row(line)
                if unfinished is not None and (row is None or row["attempt"] != at):
                    raise DamagedDataError(
                        f"{self._path}: byte {unfinished:,}: is no row of a step's documents; take the file from a copy."
                    )
                unfinished = at if row is None else None
                if row is not None:
                    yield at, row
                at += len(line) + 1

    def _line_after(self, place: int) -> int:
        """The first byte from `place` on at which a line begins; the end where none does."""
        at = max(0, place - 1)
        while place and (part := self._read(at)):
            if (found := part.find(b"\n")) >= 0:
                return at + found + 1
            at += len(part)
        return at

    def _read(self, offset: int) -> bytes:
        return os.pread(self._file.fileno(), min(_PART_BYTES, max(0, self._end - offset)), offset)


def _row(line: bytes) -> Row | None:
    """The row of a line; None where it is none."""
    try:
        row = json.loads(line)
        return (
            dict(row)
            if isinstance(row["step"], int) and isinstance(row["attempt"], int) and row["attempt"] >= 0
            else None
        )
    except (ValueError, TypeError, KeyError):
        return None
