"""The findings of the first hour's programs, as JSON lines: a stopped program leaves its findings until then."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from harness import environment


class Findings:
    """Checks, planted faults, omissions, and speeds; without a path they are only printed.

    speaks: whether this process prints and keeps them: rank 0, if there are several.
    """

    def __init__(self, path: Path | None, speaks: bool = True):
        self.path, self.speaks = path if speaks else None, speaks
        self.all_right = True

    def check(self, name: str, wrong: str) -> None:
        """Record one of our checks, and what is wrong; an empty text if it is right."""
        self.all_right &= not wrong
        self._keep("check", name, wrong)

    def planted(self, fault: str, message: str) -> None:
        """Record a planted fault, and the message by which it was found; an empty text if it was not."""
        self.all_right &= bool(message)
        self.print_line(f"planted: {fault} ... " + (f"found: {message}" if message else "NOT FOUND"))
        self._keep("planted", fault, message)

    def left_out(self, name: str, why: str) -> None:
        """Record what was not checked."""
        self.print_line(f"{name}: left out: {why}")
        self._keep("left out", name, why)

    def speed(self, case: str, contestant: str, note: str, **facts: Any) -> None:
        """Record the speed of a contestant of the benchmark in a case, or the note why it was not timed."""
        self._keep("speed", case, note, contestant=contestant, **facts)

    def time(self, case: str, contestant: str, note: str, seconds: float | None) -> None:
        """Record the seconds of a kernel for a task of a recurrence, or the note why it was not timed."""
        self._keep("time", case, note, contestant=contestant, seconds=seconds)

    def ended(self) -> int:
        """Record the end of the program, and return its exit code. A program that does not call this has failed."""
        self._keep("ended", "", "", **environment())
        return 0 if self.all_right else 1

    def print_line(self, line: str) -> None:
        """Print one line for people."""
        if self.speaks and line:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def _keep(self, kind: str, name: str, text: str, **facts: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, "what": name, "text": text, **facts}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the findings in a file, or none without a file. A line that was cut off by the end of its program does not count."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
