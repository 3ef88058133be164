"""TensorBoard's files of a run: a disk that is full ends no run, and a new file begins when there is room."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# free bytes that are required before a file is begun
_PROBE_BYTES = 4096


class TensorBoardFiles:
    """Files of one process in a folder. What cannot be written is left out: the same numbers are in the run's JSON lines.

    is_in_place: tells whether the run's folder is still the same one; nothing is made anew elsewhere.
    """

    def __init__(self, folder: Path, is_in_place: Callable[[], bool] = lambda: True):
        self._folder, self._is_in_place = folder, is_in_place
        self._writer: Any = None
        self._warned = False

    def open(self) -> None:
        """Begin a file now, not when something is first written; only the process that writes needs the package."""
        self.write(lambda writer: None)

    def write(self, add: Callable[[Any], None]) -> None:
        """Have `add` add something by the methods of `torch.utils.tensorboard.SummaryWriter`.

        The first time that it cannot be written is warned of. TensorBoard writes in a thread, so what was added just before is
        lost as well, and the thread may tell of the same error.
        """
        if not self._is_in_place():
            return
        try:
            if self._writer is None:
                # on a full disk a writer's thread would print a traceback at each try
                with tempfile.TemporaryFile(dir=self._folder.parent, buffering=0) as probe:
                    probe.write(bytes(_PROBE_BYTES))
                # a second, at the first time
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._folder))
            add(self._writer)
        except OSError as error:
            if not self._warned:
                sys.stderr.write(
                    f"distattn: {self._folder}: cannot be written: {error.strerror}; steps are left out.\n"
                )
            self._warned = True
            # a writer that has failed once fails for ever
            self.close()

    def close(self) -> None:
        """End the file."""
        writer, self._writer = self._writer, None
        with suppress(OSError):
            if writer is not None:
                writer.close()
