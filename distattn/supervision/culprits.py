"""Which of several ranks that stand still is to blame: most of them only wait for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from distattn.supervision.heartbeats import Heartbeat


class Culprit(NamedTuple):
    """A rank that is to blame. how: what is wrong with it, as the rest of a sentence; does: what it has told last."""

    rank: int
    how: str
    does: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} {self.how}" + (f": {self.does}" if self.does else "")


def process_state(pid: int) -> str:
    """The state of a process as Linux tells it (proc(5)): R, S, D, T, t, Z, or X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def culprits(beats: Mapping[int, Heartbeat | None], states: Mapping[int, str]) -> list[Culprit]:
    """Of ranks that stand still, those that do not merely wait for others; never none.

    beats: by rank, None of those that have told nothing; without ranks that have ended. states: of their processes, as
    `process_state` has them.
    """
    if stopped := [rank for rank, state in states.items() if state in "Tt"]:
        return [Culprit(rank, "is stopped (SIGSTOP or a debugger)", words(beats[rank])) for rank in stopped]
    if silent := [rank for rank, beat in beats.items() if beat is None]:
        return [Culprit(rank, "has told nothing since it was started") for rank in silent]
    known = {rank: beat for rank, beat in beats.items() if beat is not None}
    if stuck := [rank for rank, state in states.items() if state == "D"]:
        return [Culprit(rank, "waits for its disk or a device", words(beats[rank])) for rank in stuck]
    if busy := {rank: beat for rank, beat in known.items() if not beat.waits}:
        # others may wait for it in a collective that tells nothing, FSDP2's for example: it stood still before them
        rank = min(busy, key=lambda one: busy[one].at)
        return [Culprit(rank, "neither waits for others nor goes on", words(beats[rank]))]
    # all wait: those that are behind, or else those that wait for something else than most
    least = min((beat.step for beat in known.values()), default=-1)
    behind = [rank for rank, beat in known.items() if beat.step == least]
    if len(behind) < len(known):
        return [Culprit(rank, "is behind the others", words(beats[rank])) for rank in behind]
    counts = Counter(beat.words for beat in known.values())
    latest = {beat.words: beat.at for beat in sorted(known.values(), key=lambda beat: beat.at)}
    # as many wait for either: those that came later could go on for longer
    common = max(counts, key=lambda text: (counts[text], latest[text]))
    if counts[common] < len(known):
        others = [rank for rank, beat in known.items() if beat.words != common]
        return [
            Culprit(rank, "waits for what no other does", f"{words(beats[rank])}; the others: {common}")
            for rank in others
        ]
    return [Culprit(rank, "waits as all others do", common) for rank in known]


def words(beat: Heartbeat | None) -> str:
    """What a rank told last, with the step it is in."""
    if beat is None:
        return "it has told nothing"
    return beat.words if beat.step < 0 else f"step {beat.step + 1}, {beat.words}"
