"""Show the progress of a data command on stderr: as a bar on a terminal, otherwise as a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distattn.launch.command_line import print_to_stderr

# seconds between two lines in a log file
_LINE_SECONDS = 10.0


class ProgressReporter:
    """A context manager that shows progress, reported with `advance`. total: the total amount of work, for example in bytes."""

    def __init__(self, name: str, total: int):
        self.name, self.total = name, total
        self.done = self.before = 0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._began = self._last_line = time.monotonic()
        if sys.stderr.isatty():
            columns = (
                TextColumn(self.name),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.add_task(self.name, total=self.total, rates="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def begin_at(self, done: int) -> None:
        """Set the amount done by an earlier command, which does not count toward the rate."""
        self.done = self.before = done
        if self._bar:
            self._bar.reset(self._bar.task_ids[0], completed=done, rates="")

    @property
    def seconds(self) -> float:
        """The seconds since the context was entered."""
        return max(time.monotonic() - self._began, 1e-9)

    def advance(self, amount: int, rates: str = "") -> None:
        """Add `amount` to the amount done. rates: text to show with the progress, such as tokens per second."""
        self.done += amount
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done, rates=rates)
        elif now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            seconds_left = (self.total - self.done) * self.seconds / max(self.done - self.before, 1)
            suffix = f"  {rates}" if rates else ""
            print_to_stderr(
                f"{self.name}: {self.done / max(self.total, 1):.1%}{suffix}  about {seconds_left:,.0f} s left"
            )
