"""Run files that survive a full disk or a kill intact: JSON lines to append to, and text files replaced atomically.

JSON has no NaN or infinity. They are written as the strings "NaN", "Infinity" and "-Infinity", and read back as
numbers.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distattn.ir.text_format import print_message

Row = dict[str, Any]
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as standard JSON that any parser accepts."""
    return json.dumps(_encodable(value), indent=indent, allow_nan=False)


def parse_json(text: str | bytes) -> Any:
    """Return the value that `json_text` wrote. Raises ValueError if the text is not JSON."""
    return _decoded(json.loads(text))


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append either all rows or none to a file. Raises OSError."""
    append_lines(path, "".join(f"{json_text(row)}\n" for row in rows).encode())


def append_lines(path: Path, lines: bytes) -> None:
    """Append complete lines to a file in one write, after terminating any partial line. Raises OSError.

    If not all bytes can be written, the file is left unchanged.
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
    """Replace a file atomically. Raises OSError."""
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
    """Return a file's rows, or no rows if the file does not exist. Partial rows left by killed processes are skipped."""
    rows = []
    with suppress(FileNotFoundError):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                rows.append(parse_json(line))
    return rows


class JsonLines:
    """A run's JSON-lines file. If the disk is full, it warns, keeps the rows, and appends them when there is room.

    append: a function that appends all rows to the file, or appends none and raises OSError. is_in_place: a function
    that returns whether the file's folder is still in its place. If it is not, nothing is written.
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
        """Add the rows returned by `rows`, which is called when they can be written, possibly several times."""
        was_waiting = bool(self._waiting)
        self._waiting.append(rows)
        error = self._write()
        # a moved or deleted folder is reported by the run, in more detail
        if error is not None and not was_waiting and self._is_in_place():
            print_message(f"{self._path}: cannot be written: {error.strerror}; its lines are kept and added later.")

    def move_to(self, folder: Path) -> None:
        """Continue in `folder`, the new path of the file's folder."""
        self._path, self._is_in_place = folder / self._path.name, lambda: True

    def close(self) -> None:
        """Write the rows still waiting. If that fails, print how many are lost."""
        error = self._write()
        if error is not None and self._is_in_place():
            lost = sum(len(rows()) for rows in self._waiting)
            print_message(f"{self._path}: cannot be written: {error.strerror}; its last {lost:,} lines are lost.")

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
