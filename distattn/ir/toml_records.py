"""Read TOML files into dataclasses. All mistakes in a file are reported at once, each in a sentence with file, line and key.

Run files, clusters and pack plans are such dataclasses. Types and limits of keys are declared with their fields (see `limits`).
pydantic is imported only when a file is read, because planning must not need it.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args, get_type_hints

from distattn.ir.errors import DistattnError, SettingError
from distattn.ir.limits import SettingProblem
from distattn.ir.toml_lines import Key, TomlLines, syntax_place

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

Record = TypeVar("Record")
# a description of the correct type, and an example for keys without a default, keyed by pydantic's name for a type error
_EXPECTED = {
    "int_type": ("a whole number", "1"),
    "int_from_float": ("a whole number", "1"),
    "float_type": ("a number", "0.1"),
    "finite_number": ("a finite number", "0.1"),
    "bool_type": ("true or false", ""),
    "string_type": ("text in quotes", '"name"'),
    "tuple_type": ("a list", '["a", "b"]'),
    "dataclass_type": ("a table", ""),
}
# pydantic's names for the error about an unknown key
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


class TomlFile(NamedTuple):
    """A TOML file: its path, its content, and the lines of its keys."""

    path: str
    content: dict[str, Any]
    lines: TomlLines

    @staticmethod
    def read(path: str | Path, remedy: str) -> TomlFile:
        """Read a file. Raise DistattnError if it cannot be read or is not TOML. remedy: advice for a file that cannot be read."""
        try:
            text = Path(path).read_text("utf-8")
            return TomlFile(str(path), tomllib.loads(text), TomlLines(text))
        except OSError as error:
            raise DistattnError(f"{path}: cannot be read: {error.strerror}; {remedy}.") from None
        except tomllib.TOMLDecodeError as error:
            raise DistattnError(f"{syntax_place(path, error)}: cannot be read as TOML: {error}.") from None
        except UnicodeDecodeError as error:
            raise DistattnError(f"{path}: cannot be read as TOML: byte {error.start:,} is not UTF-8.") from None

    def place(self, key: Key) -> str:
        """Return FILE:LINE of a key, or FILE if the key has no line."""
        return self.lines.place(self.path, key)


def parse_record(kind: type[Record], content: Mapping[str, Any], place: Callable[[Key], str]) -> Record:
    """Return the dataclass that a nested dict describes: its keys are fields, and arrays of tables are tuples of dataclasses.

    place: returns where a key was set, such as a file and line. Raise DistattnError with one line for each unknown or missing key
    and each value of the wrong type. Limits are not checked (see `limits.nested_problems`).
    """
    from pydantic import ValidationError

    # read as JSON, so that types are strict but arrays become tuples; a TOML date becomes a table, which fits no key
    text = json.dumps(content, default=lambda value: {type(value).__name__: str(value)})
    hashable: Any = kind
    try:
        record: Record = _adapter(hashable).validate_json(text, strict=True)
        return record
    except ValidationError as error:
        errors = error.errors()
    misspelled = {row["loc"][:-1] for row in errors if row["type"] in _UNKNOWN}
    # leave out missing keys of tables with a misspelled key, because pydantic reports a misspelled required key as missing, too
    reported = [row for row in errors if row["type"] != "missing" or row["loc"][:-1] not in misspelled]
    raise_problems([_problem(kind, row) for row in reported], place)
    raise AssertionError("a validation error has rows")


def raise_problems(problems: Iterable[SettingProblem], place: Callable[[Key], str]) -> None:
    """Raise DistattnError with a line for each problem, which starts with its key's place. Do nothing if there is no problem."""
    lines = [f"{place(key_of(problem.key))}: {problem}" for problem in problems]
    if lines:
        raise DistattnError("\n".join(lines))


def key_of(dotted: str) -> Key:
    """Split a dotted key into its parts; numbers of list entries become integers."""
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))


def unknown_key(kind: Any, key: str, arrays: bool = True) -> SettingProblem:
    """Describe an unknown key as a problem, with similar keys, otherwise with all keys of its table.

    arrays: also suggest keys in arrays of tables.
    """
    keys = list(_keys(kind, arrays))
    if similar := _similar_keys(keys, key):
        *others, last = (name if "." in name or "." not in key else f"{name}, above all tables" for name in similar)
        return SettingProblem(key, f"unknown key. Did you mean {', '.join(others)}{' or ' if others else ''}{last}?")
    table = _without_numbers(key).rpartition(".")[0] + "."
    return SettingProblem(
        key, f"unknown key. There are {', '.join([name for name in keys if name.startswith(table)] or keys)}."
    )


def wrong_type(kind: Any, key: str, value: Any, error: str) -> SettingProblem:
    """Describe a value of the wrong type as a problem, with a correct example. error: pydantic's name for the error."""
    expected, example = _EXPECTED.get(error, ("a value of this key", ""))
    hint, default = _field_of(kind, key_of(key))
    if isinstance(default, (int, float, str)) and default and not isinstance(default, bool):
        example = json.dumps(default)
    entries = get_args(hint)
    if error == "tuple_type" and entries and is_dataclass(entries[0]):
        example = f"[[{key}]]"
    if error == "dataclass_type":
        # leave out the number with which the key of a table in a list ends
        list_of_tables, _, number = key.rpartition(".")
        example = f"[[{list_of_tables}]]" if number.isdecimal() else f"[{key}]"
    if error == "too_long":
        expected, example = f"a list of {len(entries)} entries", ""
    shown = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) or (isinstance(value, dict) and set(value) <= {"date", "time", "datetime"}):
        # show nan, inf, dates and times as TOML writes them, because JSON has no types for them
        shown = str(value if isinstance(value, float) else next(iter(value.values()), value))
    return SettingProblem(key, f"{shown} is not {expected}{f'; give one such as {example}' if example else ''}.")


def _problem(kind: Any, error: ErrorDetails) -> SettingProblem:
    key = ".".join(map(str, error["loc"]))
    if error["type"] in _UNKNOWN:
        return unknown_key(kind, key)
    if error["type"] in ("missing", "missing_argument"):
        return SettingProblem(key, "is missing.")
    if error["type"] == "value_error":
        # a dataclass that checks its own fields raises a SettingError, whose key is a field's name
        fault: SettingError = error["ctx"]["error"]
        return SettingProblem(f"{key}.{fault.key}", str(fault).removeprefix(f"{fault.key}: "))
    return wrong_type(kind, key, error["input"], error["type"])


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _keys(kind: Any, arrays: bool, table: str = "") -> Iterator[str]:
    """Yield all dotted keys of a dataclass and its tables; entries of arrays of tables have no indices."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        yield table + field.name
        inner = _table_of(hints[field.name])
        if inner is not None and (arrays or inner not in get_args(hints[field.name])):
            yield from _keys(inner, arrays, f"{table}{field.name}.")


def _table_of(hint: Any) -> Any:
    """Return the dataclass of a field that is a table, an optional table or an array of tables; None for other fields."""
    return next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)


def _field_of(kind: Any, key: Sequence[str | int]) -> tuple[Any, Any]:
    """Return the type and the default value of a key; None for either if it is unknown."""
    hint, default = kind, None
    for part in key:
        if isinstance(part, int):
            hint, default = next(iter(get_args(hint)), None), None
            continue
        table = _table_of(hint)
        field = next(field for field in fields(table) if field.name == part)
        hint, default = get_type_hints(table)[part], None if field.default is MISSING else field.default
    return hint, default


def _without_numbers(key: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", "", key)


def _similar_keys(keys: Sequence[str], key: str) -> list[str]:
    """Return the known keys that an unknown key may be a misspelling of."""
    table, dot, name = _without_numbers(key).rpartition(".")
    if dot and table not in keys:
        return difflib.get_close_matches(key, keys, 1, 0.6)
    # the key's table exists or is missing, so the key's name is wrong or belongs to another table
    names = {other.removeprefix(table + dot): other for other in keys if other.startswith(table + dot)}
    near = difflib.get_close_matches(name, names, 1, 0.6)
    if not near and dot and len(name) > 3:
        near = [other for other in names if name in other][:1]
    elsewhere = [other for other in keys if other.endswith(f".{name}")]
    if near and (dot or not elsewhere):
        return [names[near[0]]]
    return elsewhere or [other for other in (f"{name}.name", name) if other in keys][:1]
