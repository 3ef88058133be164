"""Exchange reports between an attempt's nodes when ranks make no progress, through files in the attempt's shared folder.

Finding the rank to blame takes the heartbeats of all ranks. A node whose ranks are silent asks, and all nodes answer with the
last heartbeats of their ranks.
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

# maximum seconds to wait for answers; network file systems show new files late
ANSWER_SECONDS = 15.0


class NodeReport(NamedTuple):
    """A node's report about its ranks.

    beats: last heartbeats by rank, None for a rank that has sent no heartbeat. states: process states by rank. in_collective:
    ranks whose stacks show a collective. silent: seconds since the last heartbeat of any rank, without pauses of the machine.
    cut: links to other nodes that once worked and are now cut.
    """

    beats: dict[int, Heartbeat | None]
    states: dict[int, str]
    in_collective: list[int]
    silent: float
    cut: Sequence[CutLink] = ()


class NodeReports:
    """The questions and answers of a node. folder: the attempt's folder. node: the node's number. links: links to other nodes."""

    def __init__(self, folder: Path, node: int, nodes: int, links: NodeLinks | None = None):
        self._folder, self.node, self.nodes, self._links = folder, node, nodes, links
        # the same moment on the file system's clock and on this process's clock
        self._moment = time.time(), time.monotonic()
        # create the files now, because network file systems cache for a while that a file did not exist
        for file in (self._question_of(node), self._answer_of(node)):
            with contextlib.suppress(OSError):
                file.write_text("", "utf-8")

    def cut_links(self) -> list[CutLink]:
        """Return the links to other nodes that are cut now. This takes a few seconds if a link is cut."""
        return self._links.cut() if self._links is not None else []

    def ask(self) -> float:
        """Ask all nodes about their ranks, or raise OSError. Return the time of the question on the file system's clock."""
        file = self._question_of(self.node)
        file.write_text("what do your ranks do?\n", "utf-8")
        self._moment = file.stat().st_mtime, time.monotonic()
        return self._moment[0]

    def asked(self) -> float:
        """Return when another node last asked, on the file system's clock, or 0 if no node has."""
        return max((_read(self._question_of(node))[0] for node in self._others()), default=0.0)

    def answer(self, report: NodeReport) -> None:
        """Write this node's report for the others. Raise OSError if that fails.

        Times are stored relative to the answer, which the file's modification time dates, because hosts' clocks may differ.
        """
        beats = {
            rank: None if beat is None else beat._asdict() | {"at": beat.at - time.monotonic()}
            for rank, beat in report.beats.items()
        }
        text = json.dumps(report._replace(beats={})._asdict() | {"beats": beats})
        self._answer_of(self.node).write_text(text, "utf-8")

    def answers(self, since: float) -> dict[int, NodeReport]:
        """Return the other nodes' reports that were written since a time returned by `ask`, indexed by node."""
        reports = {}
        for node in self._others():
            at, text = _read(self._answer_of(node))
            # skip an answer that is still being written
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if text and at >= since:
                    reports[node] = _report(json.loads(text), self._moment[1] + at - self._moment[0])
        return reports

    def _others(self) -> list[int]:
        return [node for node in range(self.nodes) if node != self.node]

    def _question_of(self, node: int) -> Path:
        return self._folder / f"asked-{node}"

    def _answer_of(self, node: int) -> Path:
        return self._folder / f"beats-{node}.json"


def _read(file: Path) -> tuple[float, str]:
    """Return (the modification time of a file, its text), or (0, "") if it is empty or missing."""
    # open the file before reading its time: only then does a network file system ask the server
    with contextlib.suppress(OSError), open(file, encoding="utf-8") as opened:
        if text := opened.read():
            return os.fstat(opened.fileno()).st_mtime, text
    return 0.0, ""


def merged(reports: Mapping[int, NodeReport]) -> NodeReport:
    """Merge the reports of several nodes. `silent` is the minimum over all nodes."""
    beats = {rank: beat for report in reports.values() for rank, beat in report.beats.items()}
    states = {rank: state for report in reports.values() for rank, state in report.states.items()}
    collective = [rank for report in reports.values() for rank in report.in_collective]
    cut = merged_links(report.cut for report in reports.values())
    return NodeReport(beats, states, collective, min(report.silent for report in reports.values()), cut)


def _report(fields: dict[str, Any], answered: float) -> NodeReport:
    """Build a node's report from its JSON. answered: the time of the answer on this process's clock."""
    beats = {
        int(rank): None if beat is None else Heartbeat.from_fields(beat | {"at": beat["at"] + answered})
        for rank, beat in fields["beats"].items()
    }
    states = {int(rank): state for rank, state in fields["states"].items()}
    cut = [CutLink(*link) for link in fields["cut"]]
    return NodeReport(beats, states, fields["in_collective"], fields["silent"], cut)
