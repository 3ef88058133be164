"""PREFIX.json beside an indexed file: which tokenizer made it, of which files, and how much there is."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from distattn.data.indexed_file import synchronise_folder
from distattn.ir.errors import DamagedDataError, DistattnError

_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What `distattn data tokenize` knows of the file that it wrote.

    command: digest of everything the file is a function of. tokenizer: as it was named. vocabulary: ids are below it. eos: the id
    that ends every document, or None. field: of JSON objects and tables. text_bytes: of all documents in UTF-8. sources: for
    each file in order its name, bytes, time of last change (nanoseconds since 1970) and documents; documents are numbered in
    this order.
    """

    command: str
    tokenizer: str
    tokenizer_digest: str
    vocabulary: int
    eos: int | None
    field: str
    documents: int
    tokens: int
    text_bytes: int
    sources: list[dict[str, Any]]

    def save(self, prefix: str) -> None:
        """Write PREFIX.json, whole or not at all."""
        write_json(f"{prefix}.json", {"version": _VERSION} | asdict(self))

    @classmethod
    def load(cls, prefix: str) -> Manifest | None:
        """Read PREFIX.json; None where there is none. Raises DamagedDataError where it is no manifest."""
        file = f"{prefix}.json"
        if not os.path.lexists(file):
            return None
        found = read_json(file)
        try:
            version = found.pop("version")
            manifest = cls(**found)
        except (KeyError, TypeError, AttributeError):
            raise DamagedDataError(f"{file}: is not what distattn data tokenize writes; remove or rename it.") from None
        if version != _VERSION:
            raise DamagedDataError(f"{file}: version {version}; only version {_VERSION} is known.")
        return manifest


def write_json(file: str, content: object) -> None:
    """Write a JSON file aside, synchronise and rename it. Raises DistattnError where that fails."""
    try:
        with open(f"{file}.tmp", "w", encoding="utf-8") as opened:
            json.dump(content, opened, indent=1)
            opened.write("\n")
            opened.flush()
            os.fsync(opened.fileno())
        os.rename(f"{file}.tmp", file)
        synchronise_folder(file)
    except OSError as error:
        raise DistattnError(f"{file}: cannot be written: {error.strerror}; make room, or write elsewhere.") from None


def read_json(file: str) -> Any:
    """Read a JSON file. Raises DamagedDataError where it is none."""
    try:
        with open(file, encoding="utf-8") as opened:
            return json.load(opened)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise DamagedDataError(f"{file}: cannot be read: {reason}.") from None
