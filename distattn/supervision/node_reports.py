"""What the nodes of an attempt tell each other where ranks stand still: files in the folder of the attempt, which all have.

Which rank is to blame is seen from all ranks alone. A node whose ranks are silent asks, and all nodes answer with what their
ranks have told last.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distattn.supervision.heartbeats import Heartbeat
from distattn.supervision.node_links import CutLink, NodeLinks, merged_links

# how long an answer is waited for: network file systems show files late
ANSWER_SECONDS = 15.0


class NodeReport(NamedTuple):
    """What a node says of its ranks. beats: None of those that have told nothing. silent: for how many seconds none has,
    less the time in which nobody ran. cut: links to other nodes that were whole, and are cut.
    """

    beats: dict[int, Heartbeat | None]
    states: dict[int, str]
    in_collective: list[int]
    silent: float
    cut: Sequence[CutLink] = ()


class NodeReports:
    """The questions and answers of one node. folder: of the attempt; node: its number of `nodes`; links: to the others."""

    def __init__(self, folder: Path, node: int, nodes: int, links: NodeLinks | None = None):
        self._folder, self.node, self.nodes, self._links = folder, node, nodes, links
        # one moment by the file system's clock, and by this process's
        self._moment = time.time(), time.monotonic()
        # network file systems remember for a while that a file was not there
        for file in (self._asked_by(node), self._told_by(node)):
            with contextlib.suppress(OSError):
                file.write_text("", "utf-8")

    def cut_links(self) -> list[CutLink]:
        """Return the links to other nodes that are cut now; takes some seconds where one is."""
        return self._links.cut() if self._links is not None else []

    def ask(self) -> float:
        """Want to know from all nodes what their ranks do. Returns when, by the file system's clock. Raises OSError."""
        file = self._asked_by(self.node)
        file.write_text("what do your ranks do?\n", "utf-8")
        self._moment = file.stat().st_mtime, time.monotonic()
        return self._moment[0]

    def asked(self) -> float:
        """When another node has last asked, by the file system's clock; 0 where none has."""
        return max((_read(self._asked_by(node))[0] for node in self._others()), default=0.0)

    def answer(self, report: NodeReport) -> None:
        """Tell the others. Raises OSError.

        Times are told as seconds before the answer, and the file says when that was: clocks of hosts need not agree.
        """
        beats = {
            rank: None if beat is None else beat._asdict() | {"at": beat.at - time.monotonic()}
            for rank, beat in report.beats.items()
        }
        text = json.dumps(report._replace(beats={})._asdict() | {"beats": beats})
        self._told_by(self.node).write_text(text, "utf-8")

    def answers(self, since: float) -> dict[int, NodeReport]:
        """What other nodes have told since a time that `ask` has returned, by node."""
        found = {}
        for node in self._others():
            at, text = _read(self._told_by(node))
            # while it writes, an answer is not whole
            with contextlib.suppress(ValueError, KeyError):
                if text and at >= since:
                    found[node] = _report(json.loads(text), self._moment[1] + at - self._moment[0])
        return found

    def _others(self) -> list[int]:
        return [node for node in range(self.nodes) if node != self.node]

    def _asked_by(self, node: int) -> Path:
        return self._folder / f"asked-{node}"

    def _told_by(self, node: int) -> Path:
        return self._folder / f"beats-{node}.json"


def _read(file: Path) -> tuple[float, str]:
    """When a file was last written, and its text; 0 and nothing where it is empty, or not there."""
    # a network file system looks at the server when a file is opened, and may show an old time before
    with contextlib.suppress(OSError), open(file, encoding="utf-8") as opened:
        if text := opened.read():
            return os.fstat(opened.fileno()).st_mtime, text
    return 0.0, ""


def merged(reports: Mapping[int, NodeReport]) -> NodeReport:
    """Of several nodes one, of the node whose ranks have been silent for the shortest time."""
    beats = {rank: beat for report in reports.values() for rank, beat in report.beats.items()}
    states = {rank: state for report in reports.values() for rank, state in report.states.items()}
    collective = [rank for report in reports.values() for rank in report.in_collective]
    cut = merged_links(report.cut for report in reports.values())
    return NodeReport(beats, states, collective, min(report.silent for report in reports.values()), cut)


def _report(told: dict[str, Any], answered: float) -> NodeReport:
    """Return what a node has told. answered: when, by this process's clock."""
    beats = {
        int(rank): None if beat is None else Heartbeat(**beat | {"at": beat["at"] + answered})
        for rank, beat in told["beats"].items()
    }
    states = {int(rank): state for rank, state in told["states"].items()}
    cut = [CutLink(*link) for link in told["cut"]]
    return NodeReport(beats, states, told["in_collective"], told["silent"], cut)
