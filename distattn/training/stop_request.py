"""Asking a run to save and to end: somebody makes a file in its folder, and all ranks hear of it in the same step."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist


class StopRequest:
    """Whether a run is asked to stop. Made and closed by all ranks together.

    files: each asks for it, if it is there. Rank 0 looks for them when a step begins, and tells the others while the step
    computes: nothing waits for it. A group of its own, on the host, keeps the message apart from what the trainer sends.
    """

    def __init__(self, *files: Path):
        self._files, self._group = files, dist.new_group(backend="gloo")
        self._asked = torch.zeros(1, dtype=torch.uint8)
        self._work: dist.Work | None = None

    def look(self) -> None:
        """Begin to tell all ranks whether a file is there. All ranks call it when a step begins."""
        if dist.get_rank() == 0:
            self._asked.fill_(any(file.exists() for file in self._files))
        self._work = dist.broadcast(self._asked, src=0, group=self._group, async_op=True)

    def is_made(self) -> bool:
        """Whether a file was there at the last `look`, the same on all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return bool(self._asked)

    def close(self) -> None:
        """End the group."""
        dist.destroy_process_group(self._group)
