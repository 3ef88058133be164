"""Files of a run that a full disk or a kill leaves whole: JSON lines, to which rows are added, and texts that are
replaced.

JSON has no NaN and no infinity. They are written as the texts "NaN", "Infinity" and "-Infinity", and read as numbers
again.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as standard JSON, which every reader accepts."""
    return json.dumps(_encodable(value), indent=indent, allow_nan=False)


def parse_json(text: str | bytes) -> Any:
    """Return the value that `json_text` wrote. Raises ValueError."""
    return _decoded(json.loads(text))


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a file, all or none. Raises OSError."""
    append_lines(path, "".join(f"{json_text(row)}\n" for row in rows).encode())


def append_lines(path: Path, lines: bytes) -> None:
    """Append whole lines to a file in one write, after ending a partial line that was left there. Raises OSError.

    If not all bytes can be written, none are.
    """
    with open(path, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            lines = b"\n" + lines
        try:
            if file.write(lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a file in place of the old one, whole or not at all. Raises OSError."""
    new_file = path.with_name(f"{path.name}.tmp")
    try:
        with open(new_file, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new_file, path)
    except OSError:
        with suppress(OSError):
            new_file.unlink()
        raise


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, none without a file; a partial row, as a killed process may leave it, is skipped."""
    rows = []
    with suppress(FileNotFoundError):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                rows.append(parse_json(line))
    return rows


class JsonLines:
    """JSON lines of a run. On a full disk the run goes on with a warning; rows are kept and added when there is room.

    append: adds the rows of one call to the file, all or none, or raises OSError. is_in_place: returns whether the
    file's folder is still the same one; nothing is written into another.
    """

    def __init__(
        self,
        path: Path,
        append: Callable[[Path, Sequence[Row]], None] = append_rows,
        is_in_place: Callable[[], bool] = lambda: True,
    ):
        self._path, self._append, self._is_in_place = path, append, is_in_place
        self._waiting: list[Callable[[], Sequence[Row]]] = []

    def add(self, rows: Callable[[], Sequence[Row]]) -> None:
        """Add the rows that a function returns; it is called when they can be written, perhaps several times."""
        was_waiting = bool(self._waiting)
        self._waiting.append(rows)
        error = self._write()
        # the run reports a moved or deleted folder in a longer sentence
        if error is not None and not was_waiting and self._is_in_place():
            _warn(f"{self._path}: cannot be written: {error.strerror}; its lines are kept and added later.")

    def move_to(self, folder: Path) -> None:
        """Continue at the folder's new path."""
        self._path, self._is_in_place = folder / self._path.name, lambda: True

    def close(self) -> None:
        """Add the rows that still wait; if that fails, print how many are lost."""
        error = self._write()
        if error is not None and self._is_in_place():
            lost = sum(len(rows()) for rows in self._waiting)
            _warn(f"{self._path}: cannot be written: {error.strerror}; its last {lost:,} lines are lost.")

    def _write(self) -> OSError | None:
        if self._waiting and not self._is_in_place():
            return FileNotFoundError(errno.ENOENT, "its folder was moved or deleted")
        try:
            while self._waiting:
                self._append(self._path, self._waiting[0]())
                del self._waiting[0]
        except OSError as error:
            return error
        return None


def _warn(text: str) -> None:
    sys.stderr.write(f"distattn: {text}\n")


def _encodable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {name: _encodable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encodable(item) for item in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value
