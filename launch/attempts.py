"""The attempts of a run: a line in attempts/attempts.jsonl for each ended attempt, and a file for the current one."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from typing import Any

from distattn.supervision.culprits import process_state
from distattn.supervision.heartbeats import Heartbeat, HeartbeatBoard
from distattn.training.reporting.json_lines import append_rows, json_text, parse_json, read_rows, write_whole

_BEGUN, _NODE = "begun.json", "trouble-"


class Attempts:
    """The attempts of one run. An attempt lasts from the start of all ranks to their end. folder: `RunFolder.attempts`."""

    def __init__(self, folder: Path):
        self._folder, self._file = folder, folder / "attempts.jsonl"

    def begin(self, **facts: Any) -> int:
        """Record that an attempt begins, and return its number, counted from 1. facts: additional fields, such as its job."""
        number = self.latest
        with contextlib.suppress(OSError):
            self._begun(number).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._begun(number), json_text({"attempt": number, "began": time.time(), **facts}))
        return number

    def end(self, number: int, exit_code: int | None, why: str, **facts: Any) -> None:
        """Record how the current attempt ended. exit_code: None if unknown. A full disk does not stop the run."""
        row = self._open(number) | {"ended": None if exit_code is None else time.time(), "exit_code": exit_code}
        with contextlib.suppress(OSError):
            append_rows(self._file, [row | {"why": why, **facts}])
            self._begun(number).unlink(missing_ok=True)
            # remove the attempt's folder if it is empty
            self._begun(number).parent.rmdir()

    def end_open(self, why: str) -> None:
        """Record the end of an attempt whose job was killed before it could record the end itself."""
        if self.goes_on:
            self.end(self.latest, None, why)

    def rows(self) -> list[dict[str, Any]]:
        """Return all attempts in order, each with attempt, began, ended, exit_code, why and other facts.

        The last attempt may not have ended.
        """
        ended = read_rows(self._file)
        number = 1 + len(ended)
        return [*ended, self._open(number)] if self._begun(number).exists() else ended

    def is_reported(self, report: Path) -> bool:
        """Return whether a run's report was written after the last attempt ended."""
        # these times are comparable, since both files are on the same file system
        return report.exists() and report.stat().st_mtime >= self._file.stat().st_mtime

    @property
    def latest(self) -> int:
        """The number of the current attempt or, if none is running, of the next one."""
        return 1 + len(read_rows(self._file))

    @property
    def goes_on(self) -> bool:
        """True if an attempt has begun and no end has been recorded."""
        return self._begun(self.latest).exists()

    def report_node(self, number: int, node: int, facts: dict[str, Any]) -> None:
        """Report what went wrong on a node to the process that starts attempts, on another machine. A full disk is ignored."""
        with contextlib.suppress(OSError):
            self.folder(number).mkdir(parents=True, exist_ok=True)
            write_whole(self.folder(number) / f"{_NODE}{node}.json", json_text(facts))

    def node_reports(self, number: int) -> dict[int, dict[str, Any]]:
        """Return the reports of an attempt's nodes, by node number."""
        reports = {}
        for file in self.folder(number).glob(f"{_NODE}*.json"):
            with contextlib.suppress(OSError, ValueError):
                reports[int(file.stem.removeprefix(_NODE))] = parse_json(file.read_bytes())
        return reports

    def folder(self, number: int) -> Path:
        """Return the folder for the evidence of an attempt."""
        return self._begun(number).parent

    def beats(self) -> dict[int, Heartbeat] | None:
        """Return the last heartbeats of the current attempt's ranks, by rank; None if no attempt runs on this machine."""
        facts = (self.rows() or [{}])[-1]
        # the heartbeat board is the launcher's shared memory, so it ends with the launcher
        if facts.get("host") != socket.gethostname() or process_state(facts["launcher"]) in "XZ":
            return None
        try:
            board = HeartbeatBoard.open(Path(facts["board"]))
        except (OSError, KeyError):
            # there is no board on this machine if the ranks are on others
            return None
        with contextlib.closing(board):
            beats = {rank: board.read(rank) for rank in range(board.slots)}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def _begun(self, number: int) -> Path:
        return self._folder / f"{number:03d}" / _BEGUN

    def _open(self, number: int) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            facts: dict[str, Any] = parse_json(self._begun(number).read_bytes())
            return facts
        return {"attempt": number}
