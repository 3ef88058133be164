"""Requests to save and stop a run. A file in the run's folder is the request; all ranks notice it in the same step.

In the same way all ranks learn that the run's folder was moved or deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist

from distattn.training.watch.module_observer import gather_values


class Stop(IntEnum):
    """The reason why a run stops.

    FOLDER_MOVED: the run's folder has a new path, and the run can save there. FOLDER_LOST: the folder is gone.
    """

    NO = 0
    ASKED = 1
    FOLDER_MOVED = 2
    FOLDER_LOST = 3


class StopRequest:
    """The request to stop a run. All ranks create and close it together.

    files: the run stops if any of them exists. of_folder: called on rank 0; returns FOLDER_MOVED, FOLDER_LOST or NO. Rank 0
    looks for the files when a step begins and broadcasts the result while the step computes, so no rank waits for it. A
    separate gloo group keeps this message apart from the trainer's messages.
    """

    def __init__(self, *files: Path, of_folder: Callable[[], Stop] = lambda: Stop.NO):
        self._files, self._of_folder = files, of_folder
        self._group = dist.new_group(backend="gloo")
        self._asked = torch.zeros(1, dtype=torch.uint8)
        self._work: dist.Work | None = None

    def look(self) -> None:
        """Start broadcasting whether the run should stop. All ranks call it when a step begins."""
        if dist.get_rank() == 0:
            self._asked.fill_(
                self._of_folder() or (Stop.ASKED if any(file.exists() for file in self._files) else Stop.NO)
            )
        self._work = dist.broadcast(self._asked, src=0, group=self._group, async_op=True)

    def reason(self) -> Stop:
        """Return the reason to stop that the last `look` broadcast. It is the same on all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return Stop(int(self._asked))

    def text_of_rank_0(self, text: str) -> str:
        """Return rank 0's text on every rank, so that all ranks end with the same message. A collective call."""
        texts: list[str] = gather_values(self._group, text)
        return texts[0]

    def close(self) -> None:
        """Close the process group."""
        dist.destroy_process_group(self._group)
