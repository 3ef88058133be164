"""Files of a run that a full disk or a kill leaves whole: JSON lines, which rows are added to, and texts that are replaced.

JSON knows no NaN and no infinity. They are written as the texts "NaN", "Infinity" and "-Infinity", and read as numbers again.
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
    """A value as JSON that every reader takes."""
    return json.dumps(_encodable(value), indent=indent, allow_nan=False)


def parse_json(text: str | bytes) -> Any:
    """The value of `json_text`. Raises ValueError."""
    return _decoded(json.loads(text))


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file, all or none. Raises OSError."""
    append_lines(path, "".join(f"{json_text(row)}\n" for row in rows).encode())


def append_lines(path: Path, lines: bytes) -> None:
    """Add whole lines to a file, in one piece; a part of a line that was left there is ended first. Raises OSError.

    What cannot be written whole is not written at all.
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
    """Write a file in place of what was there, whole or not at all. Raises OSError."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file; a part of one, as a killed process may leave it, is passed over."""
    rows = []
    with suppress(FileNotFoundError):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                rows.append(parse_json(line))
    return rows


class JsonLines:
    """A file of a run. A full disk ends no run: it is warned of, and rows are kept and added when there is room.

    append: adds the rows of one call to the file, all or none, and raises OSError where it cannot. is_in_place: tells whether
    the file's folder is still the same one; in another one nothing is written.
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
        """Add the rows that a function returns; it is called when they can be written, and may be called again."""
        was_waiting = bool(self._waiting)
        self._waiting.append(rows)
        error = self._write()
        # for a moved or deleted folder the run has a longer sentence
        if error is not None and not was_waiting and self._is_in_place():
            _warn(f"{self._path}: cannot be written: {error.strerror}; its lines are kept and added later.")

    def move_to(self, folder: Path) -> None:
        """Go on in the folder's new place."""
        self._path, self._is_in_place = folder / self._path.name, lambda: True

    def close(self) -> None:
        """Add what still waits; says how many rows are lost where that cannot be."""
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
        return {name: _encodable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encodable(one) for one in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _decoded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    return value
