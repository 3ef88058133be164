"""Ray Train's `TorchTrainer`: a worker group's checkpoints in the run's storage path, reported to Ray Train.

    def loop(config):
        checkpoints = RunCheckpoints()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        for step, batches in enumerate(cp.steps(...), begin := checkpoints.load(state)):
            ...
            checkpoints.report(step + 1, state, {"loss": loss})
        checkpoints.close()

    TorchTrainer(loop, run_config=RunConfig(storage_path=..., failure_config=FailureConfig(max_failures=3)), ...).fit()

`ContextParallel` and `distattn.adapters.pytorch` need nothing from Ray, since Ray Train creates the process group. Each worker
writes its own shards into the storage path, so nothing is gathered or copied. Ray Train gets the checkpoint's path, and removes
checkpoints according to its `CheckpointConfig`. A run continues from the newest complete checkpoint there. After a worker has
been killed, that checkpoint may be newer than the last checkpoint reported to Ray Train's controller.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pyarrow.fs import LocalFileSystem
from ray import train

from distattn.checkpoints.checkpoint_folder import checkpoint_name
from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.retention import KeepRule
from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message

# Ray Train removes checkpoints according to its own policy
_KEEP_ALL = KeepRule(last=sys.maxsize)


class RunCheckpoints:
    """The checkpoints of a Ray Train run. All workers create, use and close them together, inside the training function.

    facts: strings, such as the dataset's name, that are saved with every checkpoint and must match when it is loaded. Raises
    DistattnError if the storage path is not a mounted file system.
    """

    def __init__(self, facts: Mapping[str, str] | None = None):
        storage = train.get_context().get_storage()
        if not isinstance(storage.storage_filesystem, LocalFileSystem):
            raise DistattnError(
                "RunConfig.storage_path: every worker writes its part of a checkpoint there; name a folder of a file system that "
                "all nodes mount, not an object store."
            )
        self._facts = dict(facts or {})
        self._folder = Path(storage.experiment_fs_path, "checkpoints")
        self._checkpoints = Checkpoints(
            self._folder, group=dist.group.WORLD, facts=self._facts, keep=_KEEP_ALL, warn=print_message
        )

    def load(self, state: dict[str, Any]) -> int:
        """Load the newest complete checkpoint into `state`, in place. Return its step, or 0 if no checkpoint exists. Collective.

        Raises DistattnError if the checkpoint's facts differ.
        """
        loaded = self._checkpoints.load_newest(state, required=self._facts)
        return 0 if loaded is None else loaded.step

    def report(self, step: int, state: dict[str, Any], metrics: Mapping[str, Any]) -> None:
        """Save the state after `step` training steps, and report it with `metrics` to Ray Train. Collective.

        This returns once the checkpoint is complete, so Ray Train only ever sees checkpoints that can be loaded. Raises
        the errors of `Checkpoints.save`. If the checkpoint could not be written, for example to a full disk, only the
        metrics are reported.
        """
        self._checkpoints.save(step, state)
        self._checkpoints.wait()
        place = self._folder / checkpoint_name(step)
        is_root = dist.get_rank() == 0
        kept = train.Checkpoint.from_directory(place) if is_root and place.exists() else None
        train.report(
            {"step": step, **metrics}, checkpoint=kept, checkpoint_upload_mode=train.CheckpointUploadMode.NO_UPLOAD
        )

    def close(self) -> None:
        """End the writer thread."""
        self._checkpoints.close()
