"""PREFIX.json, the manifest of an indexed file: its tokenizer, its source files, and how much it holds."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from distattn.data.files.indexed_file import synchronise_folder
from distattn.ir.errors import DamagedDataError, DistattnError

_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The manifest that `distattn data tokenize` writes next to an indexed file.

    command: digest of everything that determines the file. tokenizer: its name on the command line. vocabulary: all ids are below
    it. eos: the id that ends every document, or None. field: the JSON key or table column with the text. text_bytes: bytes of all
    documents in UTF-8. sources: for each source file its name, bytes, time of last change (nanoseconds since 1970) and documents,
    in the order in which documents are numbered.
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
        """Write PREFIX.json atomically."""
        write_json(f"{prefix}.json", {"version": _VERSION} | asdict(self))

    @classmethod
    def load(cls, prefix: str) -> Manifest | None:
        """Read PREFIX.json. Return None if it does not exist. Raise DamagedDataError if it is not a manifest."""
        file = f"{prefix}.json"
        if not os.path.lexists(file):
            return None
        content = read_json(file)
        try:
            version = content.pop("version")
            manifest = cls(**content)
        except (KeyError, TypeError, AttributeError):
            raise DamagedDataError(f"{file}: was not written by distattn data tokenize; remove or rename it.") from None
        if version != _VERSION:
            raise DamagedDataError(f"{file}: version {version}; only version {_VERSION} is known.")
        return manifest


def write_json(file: str, content: object) -> None:
    """Write a JSON file atomically: under a temporary name, synced to disk, then renamed. Raise DistattnError if that fails."""
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
    """Read a JSON file. Raise DamagedDataError if it cannot be read or is not JSON."""
    try:
        with open(file, encoding="utf-8") as opened:
            return json.load(opened)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise DamagedDataError(f"{file}: cannot be read: {reason}.") from None
