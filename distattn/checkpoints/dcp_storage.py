"""Files of torch.distributed.checkpoint (DCP), digested while they are written and checked while they are read.

The format is DCP's, so `dcp.load` can also read the files, but without the checks. DCP's metadata and plain values are pickles.
`dcp.load` runs any code that the pickles name. Here they may name only what `pickled_names` lists.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from distattn.checkpoints.digested_files import CheckedFile, DigestingFile
from distattn.checkpoints.manifest import BLOCK_BYTES, FileDigests
from distattn.checkpoints.pickled_names import METADATA_FILE, check_value, load_metadata, unreadable
from distattn.ir.errors import DamagedDataError, DistattnError


class DigestingFileSystem(FileSystem):
    """A file system that only writes new files, and computes their digests."""

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
        """Rename a written file."""
        super().rename(path, new_path)
        self._written[Path(new_path).name] = self._written.pop(Path(path).name)

    @property
    def failure(self) -> OSError | None:
        """The first write error, which torch.save replaces with its own error; None if every write succeeded."""
        return next((file.failure for file in self._written.values() if file.failure is not None), None)

    def digests(self) -> list[FileDigests]:
        """Return the digests of all files written."""
        return [file.digests(name) for name, file in sorted(self._written.items())]


class CheckedFileSystem(FileSystem):
    """A file system that reads files and checks them against known digests."""

    def __init__(self, files: Iterable[FileDigests]):
        self._expected = {file.name: file for file in files}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """Open a file for reading. Raises DistattnError if the manifest does not list the file."""
        assert mode == "rb", mode
        expected = self._expected.get(Path(path).name)
        if expected is None:
            raise DistattnError(f"{path}: is not a file of this checkpoint.")
        # close the file afterwards: DCP opens each file only once and reads all that it needs
        with io.BufferedReader(CheckedFile(path, expected), BLOCK_BYTES) as file:
            yield file


class CheckpointReader(FileSystemReader):
    """DCP's reader of a folder. The metadata may name only DCP's own classes."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._file = folder / METADATA_FILE

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the metadata. Raises DamagedDataError if it names files elsewhere or anything that no checkpoint needs.

        Raises OSError if the file cannot be read.
        """
        with self.fs.create_stream(self._file, "rb") as opened:
            metadata = load_metadata(opened, self._file)
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise unreadable(self._file)
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise DamagedDataError(f"{self._file}: names {info.relative_path}, which is not a file in this folder.")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner, which unpickles non-tensor values only if they are plain."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value. Raises DamagedDataError if its pickle names anything outside `pickled_names.VALUES`."""
        super().load_bytes(read_item, _repickled(value, f"the checkpoint's value {read_item.dest_index.fqn}"))


def _repickled(value: io.BytesIO, label: str) -> io.BytesIO:
    """Return a plain value, pickled anew by this process, since DCP's own planner unpickles anything."""
    repickled = io.BytesIO()
    try:
        check_value(Path(label), value)
        value.seek(0)
        torch.save(torch.load(value, weights_only=True), repickled)
    except (pickle.UnpicklingError, RuntimeError, EOFError, DamagedDataError):
        raise DamagedDataError(
            f"{label} is not plain: it may run code, so it was not unpickled; ask who made the checkpoint."
        ) from None
    repickled.seek(0)
    return repickled


def file_writer(folder: Path) -> tuple[FileSystemWriter, DigestingFileSystem]:
    """Return a DCP writer for a folder, and the file system that digests its files. Files are synced to disk."""
    # the state to write is already in host memory
    writer = FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
    writer.fs = files = DigestingFileSystem()
    return writer, files


def read_state(folder: Path, files: Iterable[FileDigests], state: dict[str, Any]) -> None:
    """Read this rank's part of a checkpoint into `state`, in place, as `dcp.load` does. Not collective.

    Raises DamagedDataError if a file is not as written, OSError if a file cannot be read, and DistattnError if the state's
    shapes differ. Tensors read before the error keep their new values.
    """
    reader, planner = CheckpointReader(folder), PlainLoadPlanner()
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
    try:
        reader.read_data(plan, planner).wait()
    except pickle.UnpicklingError:
        raise DamagedDataError(
            f"{folder}: a tensor names what no tensor of PyTorch's does and which could run code; it was not unpickled: do not "
            "use this folder, and ask who made it."
        ) from None
