"""Find the ranks to blame for a hang. Most ranks that make no progress only wait for another rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from distattn.supervision.heartbeats import Heartbeat


class Culprit(NamedTuple):
    """A rank to blame. how: what is wrong with the rank, as the predicate of a sentence. does: the rank's last activity.

    helper: another process to blame instead, as it is named in sentences; in that case `rank` is the first rank on its node.
    """

    rank: int
    how: str
    does: str = ""
    helper: str = ""

    @property
    def name(self) -> str:
        """The name of the rank or helper process in sentences."""
        return self.helper or f"rank {self.rank}"

    def __str__(self) -> str:
        return f"{self.name} {self.how}" + (f": {self.does}" if self.does else "")


def process_state(pid: int) -> str:
    """Return the state of a process as listed in proc(5): R, S, D, T, t, Z, or X if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def culprits(
    beats: Mapping[int, Heartbeat | None], states: Mapping[int, str], in_collective: Collection[int] = ()
) -> list[Culprit]:
    """Return the ranks to blame for a hang, at least one: those that do not merely wait for others.

    beats: the last heartbeats by rank, None if a rank never sent any; leave out ranks that have ended. states: the ranks' process
    states, from `process_state`. in_collective: ranks whose stacks show a collective, which their heartbeats may not report.
    """
    if stopped := [rank for rank, state in states.items() if state in "Tt"]:
        return [Culprit(rank, "is stopped (SIGSTOP or a debugger)", last_activity(beats[rank])) for rank in stopped]
    if silent := [rank for rank, beat in beats.items() if beat is None]:
        return [Culprit(rank, "has sent no heartbeat since its start") for rank in silent]
    last_beats = {rank: beat for rank, beat in beats.items() if beat is not None}
    if stuck := [rank for rank, state in states.items() if state == "D"]:
        return [Culprit(rank, "waits for its disk or a device", last_activity(beats[rank])) for rank in stuck]
    busy = {rank: beat for rank, beat in last_beats.items() if not beat.waits and rank not in in_collective}
    if busy:
        # blame the rank that has been silent longest: the others may depend on it
        rank = min(busy, key=lambda busy_rank: busy[busy_rank].at)
        return [Culprit(rank, "waits for no other rank and makes no progress", last_activity(busy[rank]))]
    # a collective needs all ranks, so a rank that waits for a message instead keeps the collective from completing
    if waiting := _waiting_for_messages(last_beats):
        others = Counter(_call(last_beats[rank], rank in in_collective) for rank in last_beats if rank not in waiting)
        suffix = f"; the others: {others.most_common(1)[0][0]}" if others else ""
        return [
            Culprit(rank, "waits for a message that does not arrive", f"{last_activity(last_beats[rank])}{suffix}")
            for rank in waiting
        ]
    least = min((beat.step for beat in last_beats.values()), default=-1)
    behind = [rank for rank, beat in last_beats.items() if beat.step == least]
    if len(behind) < len(last_beats):
        return [Culprit(rank, "is behind the others", last_activity(last_beats[rank])) for rank in behind]
    counts = Counter(beat.key for beat in last_beats.values())
    common, number = counts.most_common(1)[0]
    if 1 < number < len(last_beats):
        common_words = next(beat.words for beat in last_beats.values() if beat.key == common)
        return [
            Culprit(
                rank,
                "waits for something that no other rank waits for",
                f"{last_activity(beat)}; the others: {common_words}",
            )
            for rank, beat in last_beats.items()
            if beat.key != common
        ]
    return [Culprit(rank, "waits like all other ranks", last_activity(beat)) for rank, beat in last_beats.items()]


def _waiting_for_messages(beats: Mapping[int, Heartbeat]) -> list[int]:
    """Return the ranks that wait for messages, except ranks whose peers are all waiting for messages, too.

    If that leaves no ranks, return all waiting ranks: the sender and the receiver of a lost message stop one message apart, and
    either may be ahead.
    """
    waiting = {rank for rank, beat in beats.items() if beat.peers}
    roots = [rank for rank in sorted(waiting) if not waiting.issuperset(beats[rank].peers)]
    return roots or sorted(waiting)


def _call(beat: Heartbeat, in_collective: bool) -> str:
    return f"a collective, {beat.words}" if in_collective and not beat.waits else beat.words


def last_activity(beat: Heartbeat | None) -> str:
    """Return the last activity of a rank with its step."""
    if beat is None:
        return "no heartbeat"
    return beat.words if beat.step < 0 else f"step {beat.step + 1}, {beat.words}"
