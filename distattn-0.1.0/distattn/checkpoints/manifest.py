"""The manifest of a checkpoint: manifest.json, the last file that is written into its folder.

It has the size of every other file and an xxh3-128 digest (github.com/Cyan4973/xxHash) of each block of it, what the checkpoint
is of, and a digest of its own content. A folder without a manifest that agrees with its files is no checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from distattn.ir.errors import DamagedDataError

MANIFEST_FILE = "manifest.json"
# a problem is named with the bytes of its block; at this size the manifest of a checkpoint of 1 TB has 9 MB
BLOCK_BYTES = 1 << 22
FORMAT_VERSION = 1


class FileDigests(NamedTuple):
    """A file of a checkpoint: its name, its size in bytes, and the xxh3-128 of each block of BLOCK_BYTES, in hexadecimal.

    The last block may be shorter. An empty file has one block, of no bytes.
    """

    name: str
    bytes: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    serial: checkpoints of a folder are numbered in the order in which they were saved, which is not that of their steps where a
    run has gone back. step: training steps done. saved_at: ISO 8601, UTC, for people, since clocks jump. world_size: ranks that
    saved. torch: its version. facts: names to digests or other words about what the state belongs to (configuration, plan,
    corpora). files: all files but the manifest. seconds: for which jobs have saved into the folder so far, by a clock that never
    jumps; None in manifests of earlier versions.
    """

    serial: int
    step: int
    saved_at: str
    world_size: int
    torch: str
    facts: Mapping[str, str]
    files: Sequence[FileDigests]
    seconds: float | None = None

    @property
    def bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(file.bytes for file in self.files)

    def write(self, folder: Path) -> None:
        """Write manifest.json into a folder, and synchronise the file with the disk. Raises OSError."""
        content = {"version": FORMAT_VERSION, "block_bytes": BLOCK_BYTES} | asdict(self)
        content["files"] = [file._asdict() for file in self.files]
        with open(folder / MANIFEST_FILE, "w", encoding="utf-8") as opened:
            json.dump(content | {"digest": _own_digest(content)}, opened, indent=1)
            opened.write("\n")
            opened.flush()
            os.fsync(opened.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint. Raises DamagedDataError where there is none, or one that was altered."""
        file = folder / MANIFEST_FILE
        try:
            content: Any = json.loads(file.read_bytes())
            digest, version, block = content.pop("digest"), content.pop("version"), content.pop("block_bytes")
        except FileNotFoundError:
            raise DamagedDataError(f"{file}: is missing: {folder.name} is no whole checkpoint.") from None
        except OSError as error:
            raise DamagedDataError(f"{file}: cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedDataError(f"{file}: was altered: it is not what was written.") from None
        if digest != _own_digest({"version": version, "block_bytes": block} | content):
            raise DamagedDataError(f"{file}: was altered: its content does not have the digest that stands in it.")
        if (version, block) != (FORMAT_VERSION, BLOCK_BYTES):
            raise DamagedDataError(f"{file}: format version {version}; this distattn reads version {FORMAT_VERSION}.")
        try:
            content["files"] = [FileDigests(f["name"], f["bytes"], tuple(f["blocks"])) for f in content["files"]]
            outside = [one.name for one in content["files"] if Path(one.name).name != one.name]
            manifest = cls(**content)
        except (KeyError, TypeError):
            raise DamagedDataError(
                f"{file}: has other fields than this distattn reads; take the version that wrote it."
            ) from None
        if outside:
            raise DamagedDataError(f"{file}: names {outside[0]}, which is no file of this folder.")
        return manifest


def _own_digest(content: Mapping[str, Any]) -> str:
    """xxh3-128 of the content without the digest, as JSON with sorted keys and without blanks."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_128_hexdigest(text.encode()))
