"""Files of torch.distributed.checkpoint (DCP), digested while they are written and checked while they are read.

They are DCP's own: `dcp.load` reads them, too, without the checks.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from distattn.checkpoints.digested_files import CheckedFile, DigestingFile
from distattn.checkpoints.manifest import BLOCK_BYTES, FileDigests
from distattn.ir.errors import DistattnError


class DigestingFileSystem(FileSystem):
    """Writes new files and keeps their digests."""

    def __init__(self) -> None:
        self._written: dict[str, DigestingFile] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """Open a new file for writing."""
        assert mode == "wb", mode
        with DigestingFile(path) as file:
            self._written[Path(path).name] = file
            yield file

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a written file another name."""
        super().rename(path, new_path)
        self._written[Path(new_path).name] = self._written.pop(Path(path).name)

    @property
    def failure(self) -> OSError | None:
        """Why a file could not be written: torch.save raises an error of its own that does not say so."""
        return next((file.failure for file in self._written.values() if file.failure is not None), None)

    def digests(self) -> list[FileDigests]:
        """Of all files that were written."""
        return [file.digests(name) for name, file in sorted(self._written.items())]


class CheckedFileSystem(FileSystem):
    """Reads files whose digests are known."""

    def __init__(self, files: Iterable[FileDigests]):
        self._expected = {file.name: file for file in files}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """Open a file for reading. Raises DistattnError for one that the manifest does not have."""
        assert mode == "rb", mode
        expected = self._expected.get(Path(path).name)
        if expected is None:
            raise DistattnError(f"{path}: is no file of this checkpoint.")
        # not kept open: DCP opens each file once for all that it reads of it
        with io.BufferedReader(CheckedFile(path, expected), BLOCK_BYTES) as file:
            yield file


def file_writer(folder: Path) -> tuple[FileSystemWriter, DigestingFileSystem]:
    """A DCP writer into a folder, and the digests of what it writes. Files are synchronised with the disk."""
    # what it writes lies in host memory already
    writer = FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
    writer.fs = files = DigestingFileSystem()
    return writer, files


def read_state(folder: Path, files: Iterable[FileDigests], state: dict[str, Any]) -> None:
    """Read this rank's part of a checkpoint into a state, in place, as `dcp.load` does. Not collective.

    Raises DamagedDataError where a file is not what was written, OSError where one cannot be read, DistattnError where the state
    is of another shape. Tensors that were read before the error have their new values.
    """
    reader, planner = FileSystemReader(folder), DefaultLoadPlanner()
    reader.fs = CheckedFileSystem(files)
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    try:
        plan = planner.create_local_plan()
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().rstrip(".")
        raise DistattnError(
            f"{folder}: is of another model or optimizer than this run: {why}; load it with the configuration that saved it."
        ) from None
    plan = planner.finish_plan(planner.create_global_plan([reader.prepare_local_plan(plan)])[0])
    reader.read_data(plan, planner).wait()
