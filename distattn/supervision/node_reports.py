"""What the nodes of an attempt tell each other where ranks stand still: files in the folder of the attempt, which all have.

Which rank is to blame is seen from all ranks alone. A node whose ranks are silent asks, and all nodes answer with what their
ranks have told last.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distattn.supervision.heartbeats import Heartbeat

# how long an answer is waited for: network file systems show files late
ANSWER_SECONDS = 15.0


class NodeReport(NamedTuple):
    """What a node says of its ranks. beats: None of those that have told nothing. silent: for how many seconds none has."""

    beats: dict[int, Heartbeat | None]
    states: dict[int, str]
    in_collective: list[int]
    silent: float


class NodeReports:
    """The questions and answers of one node. folder: of the attempt; node: its place among so many."""

    def __init__(self, folder: Path, node: int, nodes: int):
        self._folder, self.node, self.nodes = folder, node, nodes

    def ask(self) -> float:
        """Want to know from all nodes what their ranks do. Returns when, by the file system's clock. Raises OSError."""
        file = self._folder / f"asked-{self.node}"
        file.write_text("what do your ranks do?\n", "utf-8")
        return file.stat().st_mtime

    def asked(self) -> float:
        """When another node has last asked, by the file system's clock; 0 where none has."""
        found = [0.0]
        for file in self._folder.glob("asked-*"):
            # of a node that is about to be ended
            with contextlib.suppress(OSError):
                if file.name != f"asked-{self.node}":
                    found.append(file.stat().st_mtime)
        return max(found)

    def answer(self, report: NodeReport) -> None:
        """Tell the others. Clocks of hosts agree to less than ranks differ. Raises OSError."""
        beats = {
            rank: None if beat is None else beat._asdict() | {"at": time.time() - time.monotonic() + beat.at}
            for rank, beat in report.beats.items()
        }
        text = json.dumps(report._replace(beats={})._asdict() | {"beats": beats})
        aside = self._folder / f".beats-{self.node}"
        aside.write_text(text, "utf-8")
        os.replace(aside, self._folder / f"beats-{self.node}.json")

    def answers(self, since: float) -> dict[int, NodeReport]:
        """What other nodes have told since a time that `ask` has returned, by node."""
        found = {}
        for node in set(range(self.nodes)) - {self.node}:
            file = self._folder / f"beats-{node}.json"
            with contextlib.suppress(OSError, ValueError, KeyError):
                if file.stat().st_mtime >= since:
                    found[node] = _report(json.loads(file.read_text("utf-8")))
        return found


def merged(reports: Mapping[int, NodeReport]) -> NodeReport:
    """Of several nodes one, of the node whose ranks have been silent for the shortest time."""
    beats = {rank: beat for report in reports.values() for rank, beat in report.beats.items()}
    states = {rank: state for report in reports.values() for rank, state in report.states.items()}
    collective = [rank for report in reports.values() for rank in report.in_collective]
    return NodeReport(beats, states, collective, min(report.silent for report in reports.values()))


def _report(told: dict[str, Any]) -> NodeReport:
    here = time.monotonic() - time.time()
    beats = {
        int(rank): None if beat is None else Heartbeat(**beat | {"at": beat["at"] + here})
        for rank, beat in told["beats"].items()
    }
    states = {int(rank): state for rank, state in told["states"].items()}
    return NodeReport(beats, states, told["in_collective"], told["silent"])
