"""The findings of the first hour's programs, as JSON lines, so that a program that is stopped leaves its findings so far."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from harness import environment


class Findings:
    """A recorder of checks, planted faults, omissions and speeds. Without a path, it only prints them.

    speaks: True if this process prints and records: with several ranks, only rank 0.
    """

    def __init__(self, path: Path | None, speaks: bool = True):
        self.path, self.speaks = path if speaks else None, speaks
        self.all_right = True

    def check(self, name: str, wrong: str) -> None:
        """Record a check. wrong: what is wrong, or an empty string."""
        self.all_right &= not wrong
        self._keep("check", name, wrong)

    def planted(self, fault: str, message: str) -> None:
        """Record a planted fault. message: the message that named it, or an empty string if it was not found."""
        self.all_right &= bool(message)
        self.print_line(f"planted: {fault} ... " + (f"found: {message}" if message else "NOT FOUND"))
        self._keep("planted", fault, message)

    def left_out(self, name: str, why: str) -> None:
        """Record that something was not checked, and why."""
        self.print_line(f"{name}: left out: {why}")
        self._keep("left out", name, why)

    def speed(self, case: str, contestant: str, note: str, **facts: Any) -> None:
        """Record a contestant's speed in a case, or a note why it was not timed."""
        self._keep("speed", case, note, contestant=contestant, **facts)

    def time(self, case: str, contestant: str, note: str, seconds: float | None) -> None:
        """Record a kernel's seconds for a case of a recurrence, or a note why it was not timed."""
        self._keep("time", case, note, contestant=contestant, seconds=seconds)

    def ended(self) -> int:
        """Record the end of the program and return its exit code. A program without this record counts as failed."""
        self._keep("ended", "", "", **environment())
        return 0 if self.all_right else 1

    def print_line(self, line: str) -> None:
        """Print a line, unless it is empty or another rank prints."""
        if self.speaks and line:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def _keep(self, kind: str, name: str, text: str, **facts: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, "what": name, "text": text, **facts}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the findings in a file, or [] if there is no file. Ignore a line truncated by the end of its program."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
