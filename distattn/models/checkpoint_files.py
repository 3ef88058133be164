"""A model's tensors in a checkpoint of torch.distributed.checkpoint, read and written one at a time by one process.

Checkpoints of `distattn train` name parameters `model.<name in transformers>`, and have the model's config.json beside them. One
process reads what many ranks wrote, and the other way round.
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
from distattn.ir.errors import DamagedDataError, DistattnError

PREFIX = "model."
_METADATA = ".metadata"


def checkpoint_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors of a checkpoint by name, whole, one after the other.

    Raises DistattnError where the folder has no model in it, DamagedDataError where a tensor cannot be read, or a pickle names
    what no checkpoint does.
    """
    reader = CheckpointReader(Path(folder))
    stored = reader.read_metadata().state_dict_metadata
    names = [key for key, what in stored.items() if key.startswith(PREFIX) and isinstance(what, TensorStorageMetadata)]
    if not names:
        raise DistattnError(f"{folder}: the checkpoint has no tensor named {PREFIX}...; it holds no model.")
    for key in names:
        what: Any = stored[key]
        state = {key: torch.empty(what.size, dtype=what.properties.dtype)}
        try:
            with _one_process_on_purpose():
                dcp.load(state, storage_reader=reader, planner=PlainLoadPlanner(), no_dist=True)
        except dcp.CheckpointException as error:
            if isinstance(cause := _cause(error), DistattnError):
                raise cause from None
            raise DamagedDataError(f"{folder}: {key} cannot be read: {_first_line(_cause(error))}.") from error
        yield key.removeprefix(PREFIX), state[key]


def write_checkpoint(
    folder: str | Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> list[FileDigests]:
    """Write a checkpoint of a model alone, without an optimizer, one tensor at a time, into a folder that is there.

    tensors: by name, of the meta device, with the shapes and dtypes to write. read: gives a tensor's values when it is its turn.
    Returns the digests of the files, which are on the disk. Raises DistattnError where the folder cannot be written, and what
    read raises of this kind.
    """
    writer, files = file_writer(Path(folder))
    state = {PREFIX + name: tensor for name, tensor in tensors.items()}
    try:
        with _one_process_on_purpose():
            dcp.save(state, storage_writer=writer, planner=_ReadWhenWritten(read), no_dist=True)
    except dcp.CheckpointException as error:
        cause = _cause(error)
        if isinstance(cause, DistattnError):
            raise cause from None
        raise DistattnError(f"{folder}: could not be written: {_first_line(cause)}.") from error
    return files.digests()


def config_folder(checkpoint: str | Path) -> Path:
    """The folder with a checkpoint's model configuration: its own, or one above.

    Raises DistattnError where there is none.
    """
    checkpoint = Path(checkpoint).absolute()
    # a state may lie in a step's folder, in a folder of checkpoints, in that of a run
    for folder in (checkpoint, *checkpoint.parents[:3]):
        if (folder / "config.json").is_file():
            return folder
    raise DistattnError(f"{checkpoint}: there is no config.json of the model in it or in the three folders above.")


@contextmanager
def _one_process_on_purpose() -> Iterator[None]:
    """Meanwhile DCP does not warn that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """Plans by the shapes of meta tensors, and reads values as they are written."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Any:
        """As the writer asks for an item's data: the whole tensor, since one process writes all."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._read(write_item.index.fqn.removeprefix(PREFIX))


def _cause(error: dcp.CheckpointException) -> BaseException:
    """What happened, on the only rank there is."""
    return next(iter(error.failures.values()))[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
