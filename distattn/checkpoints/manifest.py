"""The manifest of a checkpoint: manifest.json, the last file written into its folder.

It contains the size of every other file, an xxh3-128 digest (github.com/Cyan4973/xxHash) of each block of each file, facts about
the checkpoint, and a digest of its own content. A folder whose manifest is missing or does not match is not a checkpoint.
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
# errors name the bytes of the damaged block; with this block size, the manifest of a 1 TB checkpoint has 9 MB
BLOCK_BYTES = 1 << 22
FORMAT_VERSION = 1


class FileDigests(NamedTuple):
    """A file of a checkpoint: its name, its size in bytes, and the hexadecimal xxh3-128 digest of each block of BLOCK_BYTES.

    The last block may be shorter. An empty file has one block of 0 bytes.
    """

    name: str
    bytes: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The facts of a checkpoint.

    serial: the number of the save in its folder; unlike the step, it also increases when a run goes back. step: training steps
    done. saved_at: ISO 8601, UTC; only for people, since clocks jump. world_size: the number of ranks that saved. torch: its
    version. facts: digests and other texts, by name, that identify the run's configuration, plan and corpora. files: all files
    except the manifest. seconds: how long jobs have used the folder so far, by a monotonic clock; None in manifests of earlier
    versions.
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
        """The total size of all files except the manifest."""
        return sum(file.bytes for file in self.files)

    def write(self, folder: Path) -> None:
        """Write manifest.json into a folder and sync it to disk. Raises OSError on failure."""
        content = {"version": FORMAT_VERSION, "block_bytes": BLOCK_BYTES} | asdict(self)
        content["files"] = [file._asdict() for file in self.files]
        with open(folder / MANIFEST_FILE, "w", encoding="utf-8") as opened:
            json.dump(content | {"digest": _own_digest(content)}, opened, indent=1)
            opened.write("\n")
            opened.flush()
            os.fsync(opened.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Return the manifest of a checkpoint. Raises DamagedDataError if it is missing or was altered."""
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
            raise DamagedDataError(f"{file}: was altered: its content does not match the digest in it.")
        if (version, block) != (FORMAT_VERSION, BLOCK_BYTES):
            raise DamagedDataError(f"{file}: format version {version}; this distattn reads version {FORMAT_VERSION}.")
        try:
            content["files"] = [FileDigests(f["name"], f["bytes"], tuple(f["blocks"])) for f in content["files"]]
            outside = [entry.name for entry in content["files"] if Path(entry.name).name != entry.name]
            manifest = cls(**content)
        except (KeyError, TypeError):
            raise DamagedDataError(
                f"{file}: has other fields than this distattn reads; take the version that wrote it."
            ) from None
        if outside:
            raise DamagedDataError(f"{file}: names {outside[0]}, which is no file of this folder.")
        return manifest


def _own_digest(content: Mapping[str, Any]) -> str:
    """Return the xxh3-128 digest of the content, without its digest field, as JSON with sorted keys and no blanks."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_128_hexdigest(text.encode()))
