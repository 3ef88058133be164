"""The attempts of a run: what is known of each that has ended, and where one that goes on tells what its ranks do."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from distattn.supervision.culprits import process_state
from distattn.supervision.heartbeats import Heartbeat, HeartbeatBoard
from distattn.supervision.rank_watch import Trouble


class Attempts:
    """A folder with a line for each attempt in attempts.jsonl, what was kept of those that failed in folders of their numbers,
    and running.json while one goes on.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file, self._running = folder / "attempts.jsonl", folder / "running.json"

    def begin(self, board: Path) -> Attempt:
        """The next attempt, by this process, whose ranks tell what they do on a board. Raises OSError."""
        number = 1 + len(self.ended())
        folder = self.folder / f"{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"attempt": number, "began": time.time(), "host": socket.gethostname(), "launcher": os.getpid()}
        with contextlib.suppress(OSError):
            self._running.write_text(json.dumps(facts | {"board": str(board)}) + "\n", "utf-8")
        return Attempt(self, number, folder, facts)

    def end(self, facts: Mapping[str, object]) -> None:
        """Write an attempt down that has ended; a full disk must not keep a run from going on."""
        with contextlib.suppress(OSError):
            self._running.unlink(missing_ok=True)
            with open(self._file, "a", encoding="utf-8") as opened:
                opened.write(json.dumps(facts) + "\n")

    def ended(self) -> list[dict[str, object]]:
        """What is known of each attempt that has ended; a line that a kill has torn is left out."""
        found = []
        for line in self._file.read_text("utf-8").splitlines() if self._file.exists() else []:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def running(self) -> dict[int, Heartbeat] | None:
        """What each rank of the attempt that goes on has told last, by rank; None where none goes on on this machine."""
        try:
            facts = json.loads(self._running.read_text("utf-8"))
            if facts["host"] != socket.gethostname() or process_state(facts["launcher"]) in "XZ":
                return None
            board = HeartbeatBoard.open(Path(facts["board"]))
        except (OSError, ValueError, KeyError):
            return None
        try:
            beats = {rank: board.read(rank) for rank in range(board.slots)}
        finally:
            board.close()
        return {rank: beat for rank, beat in beats.items() if beat is not None}


class Attempt(NamedTuple):
    """One that has begun. folder: for what is kept of it."""

    attempts: Attempts
    number: int
    folder: Path
    facts: dict[str, object]

    def end(self, code: int, trouble: Trouble | None) -> None:
        """Write down how it has ended; its folder stays where something is in it."""
        found = self.facts | {"ended": time.time(), "exit_code": code}
        if trouble is not None:
            found |= {"ranks": [one.rank for one in trouble.culprits], "why": str(trouble), "kind": trouble.kind}
            found |= {"steps": trouble.steps, "noticed_seconds": round(trouble.seconds, 3)}
        self.attempts.end(found)
        with contextlib.suppress(OSError):
            # files of stacks that nobody asked for, and a folder that has nothing else
            for file in self.folder.glob("stacks-*.txt"):
                if not file.stat().st_size:
                    file.unlink()
            self.folder.rmdir()
