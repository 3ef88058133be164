"""Find the line of a key in a TOML file, for errors that name file and line. tomllib does not report lines."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# the path of a key: keys of tables, and indices of array entries
Key = tuple[str | int, ...]
# a multi-line string may end in up to five quotes, two of which belong to its value
_TOKENS = re.compile(
    r"""(?P<string>\"{3}(?:[^\\]|\\.)*?\"{3,5}|'{3}.*?'{3,5}|"(?:[^"\\]|\\.)*"|'[^']*')"""
    r"""|(?P<skipped>\#[^\n]*|[ \t\r]+)|(?P<mark>[\n\[\]{}=,])|(?P<bare>[^\s\#,\[\]{}="']+)""",
    re.DOTALL,
)


class TomlLines:
    """The line numbers, from 1, of all keys in a text that tomllib can read."""

    def __init__(self, text: str):
        self._lines = _Reader(text).lines

    def of(self, key: Sequence[str | int]) -> int | None:
        """Return the line of a key or entry, such as ("corpus", 1, "weight"); for a missing key, the line of its table.

        If that table is the entire file, return None.
        """
        path = tuple(key)
        return next((self._lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self._lines), None)

    def place(self, file: object, key: Sequence[str | int]) -> str:
        """Return FILE:LINE of a key, or FILE if the key has no line."""
        line = self.of(key)
        return f"{file}" if line is None else f"{file}:{line}"


def syntax_place(file: object, error: tomllib.TOMLDecodeError) -> str:
    """Return FILE:LINE of a syntax error, or FILE if the error has no line."""
    match = re.search(r"at line (\d+)", str(error))
    return f"{file}:{match[1]}" if match else f"{file}"


class _Token(NamedTuple):
    text: str
    kind: str | None
    line: int


class _Reader:
    """A parser that reads a text statement by statement. lines: the line of every key."""

    def __init__(self, text: str):
        self.lines: dict[Key, int] = {}
        # the number of tables read so far in each array of tables
        self._tables: dict[Key, int] = {}
        self._tokens = list(_tokens(text))
        self._at = 0
        table: Key = ()
        while (token := self._next()) is not None:
            if token.text == "[" and token.kind == "mark":
                table = self._header(token.line)
            elif token.text != "\n":
                self._at -= 1
                self._pair(table)

    def _peek(self) -> str:
        return self._tokens[self._at].text if self._at < len(self._tokens) else "\n"

    def _next(self) -> _Token | None:
        self._at += 1
        return self._tokens[self._at - 1] if self._at <= len(self._tokens) else None

    def _header(self, line: int) -> Key:
        """Read a header [key] or [[key]]; return the path of its table."""
        is_array = self._peek() == "["
        self._at += is_array
        *parents, last = self._key("]")
        self._at += is_array
        path: Key = ()
        for part in parents:
            path = self._newest((*path, part))
        path = (*path, last)
        if is_array:
            self.lines.setdefault(path, line)
            self._tables[path] = self._tables.get(path, 0) + 1
        path = self._newest(path)
        self.lines[path] = line
        return path

    def _newest(self, path: Key) -> Key:
        """Return the path of the last table of an array of tables; return other paths unchanged."""
        return (*path, self._tables[path] - 1) if path in self._tables else path

    def _pair(self, table: Key) -> None:
        """Read a key, "=" and a value."""
        line = self._tokens[self._at].line
        path = table
        for part in self._key("="):
            path = (*path, part)
            self.lines.setdefault(path, line)
        self._value(path)

    def _key(self, end: str) -> list[str]:
        """Read a dotted key up to the mark `end`; return its parts."""
        parts = []
        while (token := self._next()) is not None and (token.text != end or token.kind != "mark"):
            if token.kind == "string":
                parts.append(tomllib.loads(f"key = {token.text}")["key"])
            else:
                parts += [part for part in token.text.split(".") if part]
        return parts

    def _value(self, path: Key) -> None:
        """Read a value, including all entries of arrays and inline tables."""
        first = self._next()
        if first is None or first.kind != "mark":
            # dates may contain a space
            while self._at < len(self._tokens) and self._tokens[self._at].kind == "bare":
                self._at += 1
            return
        number = 0
        while (token := self._next()) is not None and token.text not in ("]", "}"):
            if token.kind == "mark" and token.text in (",", "\n"):
                continue
            self._at -= 1
            if first.text == "{":
                self._pair(path)
            else:
                self.lines[(*path, number)] = token.line
                self._value((*path, number))
                number += 1


def _tokens(text: str) -> Iterator[_Token]:
    line = 1
    for match in _TOKENS.finditer(text):
        if match.lastgroup != "skipped":
            yield _Token(match[0], match.lastgroup, line)
        line += match[0].count("\n")
