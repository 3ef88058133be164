"""Read and write a model's tensors in a checkpoint of torch.distributed.checkpoint, one at a time in one process.

Checkpoints of `distattn train` name parameters `model.<name in transformers>`, and have the model's config.json next to them. One
process can read a checkpoint of many ranks, and the other way round.
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
    """Yield the model's whole tensors of a checkpoint by name, one after another.

    Raises DistattnError if the checkpoint has no model, DamagedDataError if a tensor cannot be read, or a pickle contains a name
    that no checkpoint has.
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
    """Write a checkpoint of a model without an optimizer, one tensor at a time, into an existing folder.

    tensors: by name, on the meta device, with the shapes and dtypes to write. read: returns a tensor's values when it is written.
    Return the digests of the files, which are on the disk. Raises DistattnError if the folder cannot be written, and passes on
    DistattnErrors of `read`.
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
    """Return the folder with a checkpoint's model configuration: its own, or one above.

    Raises DistattnError without such a folder.
    """
    checkpoint = Path(checkpoint).absolute()
    # a state may be in a step's folder, inside a folder of checkpoints, inside that of a run
    for folder in (checkpoint, *checkpoint.parents[:3]):
        if (folder / "config.json").is_file():
            return folder
    raise DistattnError(f"{checkpoint}: there is no config.json of the model in it or in the three folders above.")


@contextmanager
def _without_group_warning() -> Iterator[None]:
    """Ignore DCP's warning about a missing process group while the context is open: a single process is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """A planner that plans by the shapes of meta tensors, and reads values when they are written."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return the data of an item for the writer: the whole tensor, since one process writes everything."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._read(write_item.index.fqn.removeprefix(PREFIX))


def _cause(error: dcp.CheckpointException) -> BaseException:
    """Return the error of the only rank."""
    return next(iter(error.failures.values()))[0]
