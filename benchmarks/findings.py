"""What the programs of the first hour find, as JSON lines: one that is stopped leaves what it had found until then."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from harness import environment


class Findings:
    """Checks, planted faults, what was left out, and speeds; without a path they are only said.

    speaks: whether this process is the one that says and keeps them: rank 0, of several.
    """

    def __init__(self, path: Path | None, speaks: bool = True):
        self.path, self.speaks = path if speaks else None, speaks
        self.all_right = True

    def check(self, what: str, wrong: str) -> None:
        """A check of ours, and what is wrong; an empty text where nothing is."""
        self.all_right &= not wrong
        self._keep("check", what, wrong)

    def planted(self, what: str, found: str) -> None:
        """A fault that was made on purpose, and by which message it was found; an empty text where it was not."""
        self.all_right &= bool(found)
        self.print_line(f"planted: {what} ... " + (f"found: {found}" if found else "NOT FOUND"))
        self._keep("planted", what, found)

    def left_out(self, what: str, why: str) -> None:
        """What was not looked at."""
        self.print_line(f"{what}: left out: {why}")
        self._keep("left out", what, why)

    def speed(self, case: str, contestant: str, note: str, **facts: Any) -> None:
        """How fast a contestant of the benchmark was in a case, or the note that says why it was not timed."""
        self._keep("speed", case, note, contestant=contestant, **facts)

    def time(self, case: str, contestant: str, note: str, seconds: float | None) -> None:
        """How long a kernel needed for a task of a recurrence, or the note that says why it was not timed."""
        self._keep("time", case, note, contestant=contestant, seconds=seconds)

    def ended(self) -> int:
        """To be called at the very end: a program that does not come to it has failed. Returns its exit code."""
        self._keep("ended", "", "", **environment())
        return 0 if self.all_right else 1

    def print_line(self, line: str) -> None:
        """One line for people."""
        if self.speaks and line:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def _keep(self, kind: str, what: str, text: str, **facts: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, "what": what, "text": text, **facts}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The findings in a file; none where there is no file. A line that was being written when its program ended is no finding."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
