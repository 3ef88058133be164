"""Ask a run to save and to end: a file in its folder asks for it, and all ranks learn of it in the same step.

In the same way all ranks learn that the folder is not where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist

from distattn.training.module_observer import gathered


class Stop(IntEnum):
    """Why a run stops. FOLDER_MOVED: its folder has another name, where it can be saved. FOLDER_LOST: it has none."""

    NO = 0
    ASKED = 1
    FOLDER_MOVED = 2
    FOLDER_LOST = 3


class StopRequest:
    """The request to stop a run. All ranks make and close it together.

    files: each asks for it, if it is there. of_folder: on rank 0, tells what became of the run's folder. Rank 0 looks for them
    when a step begins, and tells the others while the step computes: nothing waits for it. A group of its own, on the host,
    keeps the message apart from what the trainer sends.
    """

    def __init__(self, *files: Path, of_folder: Callable[[], Stop] = lambda: Stop.NO):
        self._files, self._of_folder = files, of_folder
        self._group = dist.new_group(backend="gloo")
        self._asked = torch.zeros(1, dtype=torch.uint8)
        self._work: dist.Work | None = None

    def look(self) -> None:
        """Begin to tell all ranks whether a file is there. All ranks call it when a step begins."""
        if dist.get_rank() == 0:
            self._asked.fill_(
                self._of_folder() or (Stop.ASKED if any(file.exists() for file in self._files) else Stop.NO)
            )
        self._work = dist.broadcast(self._asked, src=0, group=self._group, async_op=True)

    def made(self) -> Stop:
        """Return whether, and why, the run is to stop since the last `look`, the same on all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return Stop(int(self._asked))

    def words_of_first(self, text: str) -> str:
        """Return rank 0's text on all ranks, which call it together: they end with one sentence."""
        words: list[str] = gathered(self._group, text)
        return words[0]

    def close(self) -> None:
        """End the group."""
        dist.destroy_process_group(self._group)
