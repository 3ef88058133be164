"""Read and write a model's tensors in a torch.distributed.checkpoint checkpoint, one at a time, in one process.

Checkpoints of `distattn train` name parameters `model.<name in transformers>` and have the model's config.json next to them. One
process can read a checkpoint written by many ranks, and vice versa.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from distattn.checkpoints.dcp_storage import CheckpointReader, PlainLoadPlanner, file_writer
from distattn.checkpoints.manifest import FileDigests
from distattn.ir.errors import DamagedDataError, DistattnError, first_line

PREFIX = "model."


def checkpoint_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and full tensors of a checkpoint's model, one at a time.

    Raises DistattnError if the checkpoint has no model, and DamagedDataError if a tensor cannot be read or a pickle contains a
    name that no checkpoint needs.
    """
    reader = CheckpointReader(Path(folder))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    names = [key for key in tensors if key.startswith(PREFIX)]
    if not names:
        raise DistattnError(f"{folder}: the checkpoint has no tensor named {PREFIX}...; it holds no model.")
    for key in names:
        entry: Any = tensors[key]
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            with _without_group_warning():
                dcp.load(state, storage_reader=reader, planner=PlainLoadPlanner(), no_dist=True)
        except dcp.CheckpointException as error:
            if isinstance(cause := _cause(error), DistattnError):
                raise cause from None
            raise DamagedDataError(f"{folder}: {key} cannot be read: {first_line(_cause(error))}.") from error
        yield key.removeprefix(PREFIX), state[key]


def write_checkpoint(
    folder: str | Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> list[FileDigests]:
    """Write a model's checkpoint, without an optimizer, into an existing folder, one tensor at a time.

    tensors: tensors on the meta device, keyed by name, with the shapes and dtypes to write. read: returns a tensor's values; it
    is called when the tensor is written. Return the digests of the files, which are then on disk. Raises DistattnError if the
    folder cannot be written, and the DistattnErrors that `read` raises.
    """
    writer, files = file_writer(Path(folder))
    state = {PREFIX + name: tensor for name, tensor in tensors.items()}
    try:
        with _without_group_warning():
            dcp.save(state, storage_writer=writer, planner=_ReadWhenWritten(read), no_dist=True)
    except dcp.CheckpointException as error:
        cause = _cause(error)
        if isinstance(cause, DistattnError):
            raise cause from None
        raise DistattnError(f"{folder}: could not be written: {first_line(cause)}.") from error
    return files.digests()


def config_folder(checkpoint: str | Path) -> Path:
    """Return the folder that contains a checkpoint's model configuration: the checkpoint's own or one of the three above it.

    Raises DistattnError if there is no such folder.
    """
    checkpoint = Path(checkpoint).absolute()
    # a state may be in a step's folder, inside a checkpoint folder, inside a run's folder
    for folder in (checkpoint, *checkpoint.parents[:3]):
        if (folder / "config.json").is_file():
            return folder
    raise DistattnError(f"{checkpoint}: there is no config.json of the model in it or in the three folders above.")


@contextmanager
def _without_group_warning() -> Iterator[None]:
    """Ignore DCP's warning about a missing process group while the context is open, since a single process is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """A save planner that plans with the shapes of meta tensors and reads each tensor's values only when they are written."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return an item's data for the writer. This is the full tensor, since one process writes everything."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._read(write_item.index.fqn.removeprefix(PREFIX))


def _cause(error: dcp.CheckpointException) -> BaseException:
    """Return the error that DCP has wrapped. There is only one, since no other rank took part."""
    return next(iter(error.failures.values()))[0]
