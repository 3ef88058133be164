"""The attempts of a run: a line in attempts/attempts.jsonl for each that ended, with why, and a file for the one that goes on."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from typing import Any

from distattn.supervision.culprits import process_state
from distattn.supervision.heartbeats import Heartbeat, HeartbeatBoard
from distattn.training.json_lines import append_rows, json_text, parse_json, read_rows, write_whole

_BEGUN, _NODE = "begun.json", "trouble-"


class Attempts:
    """Of one run. folder: `RunFolder.attempts`. An attempt is all ranks from their start to their end."""

    def __init__(self, folder: Path):
        self._folder, self._file = folder, folder / "attempts.jsonl"

    def begin(self, **facts: Any) -> int:
        """Note that an attempt begins; returns its number, from 1. facts: what is known of it, such as its job and hosts."""
        number = self.latest
        with contextlib.suppress(OSError):
            self._begun(number).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._begun(number), json_text({"attempt": number, "began": time.time(), **facts}))
        return number

    def end(self, number: int, exit_code: int | None, why: str, **facts: Any) -> None:
        """Note how the attempt that goes on has ended, None for nobody knows. A full disk must not keep a run from going on."""
        row = self._open(number) | {"ended": None if exit_code is None else time.time(), "exit_code": exit_code}
        with contextlib.suppress(OSError):
            append_rows(self._file, [row | {"why": why, **facts}])
            self._begun(number).unlink(missing_ok=True)
            # where nothing else is kept of it
            self._begun(number).parent.rmdir()

    def end_open(self, why: str) -> None:
        """Note the end of an attempt that nobody could note, since its job was killed."""
        if self.goes_on:
            self.end(self.latest, None, why)

    def rows(self) -> list[dict[str, Any]]:
        """All attempts in their order: attempt, began, ended, exit_code, why, and their facts; the last may have no end yet."""
        ended = read_rows(self._file)
        number = 1 + len(ended)
        return [*ended, self._open(number)] if self._begun(number).exists() else ended

    def is_reported(self, report: Path) -> bool:
        """Return whether a run's report was written after the last attempt had ended."""
        # one file system has one clock
        return report.exists() and report.stat().st_mtime >= self._file.stat().st_mtime

    @property
    def latest(self) -> int:
        """The number of the attempt that goes on, or that is next."""
        return 1 + len(read_rows(self._file))

    @property
    def goes_on(self) -> bool:
        """Whether an attempt has begun and nobody has noted its end."""
        return self._begun(self.latest).exists()

    def tell(self, number: int, node: int, facts: dict[str, Any]) -> None:
        """Say what went wrong on a node: for who starts its attempts, on another machine. Full disks stop nobody."""
        with contextlib.suppress(OSError):
            self.folder(number).mkdir(parents=True, exist_ok=True)
            write_whole(self.folder(number) / f"{_NODE}{node}.json", json_text(facts))

    def told(self, number: int) -> dict[int, dict[str, Any]]:
        """What nodes have said of an attempt, by node."""
        found = {}
        for file in self.folder(number).glob(f"{_NODE}*.json"):
            with contextlib.suppress(OSError, ValueError):
                found[int(file.stem.removeprefix(_NODE))] = parse_json(file.read_bytes())
        return found

    def folder(self, number: int) -> Path:
        """Where evidence of an attempt is kept."""
        return self._begun(number).parent

    def beats(self) -> dict[int, Heartbeat] | None:
        """What each rank of the attempt that goes on has told last, by rank; None where none goes on on this machine."""
        facts = (self.rows() or [{}])[-1]
        # the launcher's memory is gone with it, whatever is left in the folder
        if facts.get("host") != socket.gethostname() or process_state(facts["launcher"]) in "XZ":
            return None
        try:
            board = HeartbeatBoard.open(Path(facts["board"]))
        except (OSError, KeyError):
            # or the ranks are on other machines
            return None
        with contextlib.closing(board):
            beats = {rank: board.read(rank) for rank in range(board.slots)}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def _begun(self, number: int) -> Path:
        return self._folder / f"{number:03d}" / _BEGUN

    def _open(self, number: int) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = parse_json(self._begun(number).read_bytes())
            return found
        return {"attempt": number}
