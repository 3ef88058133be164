"""A run's TensorBoard files. A full disk does not end the run: a new file is started when there is room again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from distattn.ir.text_format import print_message

# free bytes required before a new file is started
_PROBE_BYTES = 4096


class TensorBoardFiles:
    """TensorBoard files of one process. Rows that cannot be written are dropped: the run's JSON-lines files also have them.

    is_in_place: returns whether the run's folder is still in its place. If it is not, nothing is written.
    """

    def __init__(self, folder: Path, is_in_place: Callable[[], bool] = lambda: True):
        self._folder, self._is_in_place = folder, is_in_place
        self._writer: Any = None
        self._warned = False

    def open(self) -> None:
        """Start a file now instead of at the first row. Only a process that calls this or `write` needs the package."""
        self.write(lambda writer: None)

    def write(self, add: Callable[[Any], None]) -> None:
        """Call `add` with the `torch.utils.tensorboard.SummaryWriter`.

        Warns at the first failure. TensorBoard writes in a thread, so rows added shortly before the failure are also
        lost, and the thread may report the same error.
        """
        if not self._is_in_place():
            return
        try:
            if self._writer is None:
                # probe first: on a full disk the writer's thread would print a traceback at each attempt
                with tempfile.TemporaryFile(dir=self._folder.parent, buffering=0) as probe:
                    probe.write(bytes(_PROBE_BYTES))
                # the import takes a second
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._folder))
            add(self._writer)
        except OSError as error:
            if not self._warned:
                print_message(f"{self._folder}: cannot be written: {error.strerror}; steps are left out.")
            self._warned = True
            # a writer that has failed once never works again
            self.close()

    def close(self) -> None:
        """Close the file."""
        writer, self._writer = self._writer, None
        with suppress(OSError):
            if writer is not None:
                writer.close()
