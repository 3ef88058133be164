"""Which of several ranks that stand still is to blame: most of them only wait for one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from distattn.supervision.heartbeats import Heartbeat

# what errors say of ranks that end because another one has ended
_LOST_PEER = ("stopped answering", "Connection", "gloo", "NCCL", "timed out", "Broken pipe")


class Culprit(NamedTuple):
    """A rank that is to blame. how: what is wrong with it, as the rest of a sentence; does: what it has told last.

    helper: the process to blame in its place, as sentences name it; rank is then the first rank of that process's node.
    """

    rank: int
    how: str
    does: str = ""
    helper: str = ""

    @property
    def name(self) -> str:
        """Return its name in sentences."""
        return self.helper or f"rank {self.rank}"

    def __str__(self) -> str:
        return f"{self.name} {self.how}" + (f": {self.does}" if self.does else "")


def process_state(pid: int) -> str:
    """The state of a process as Linux tells it (proc(5)): R, S, D, T, t, Z, or X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def tells_of_lost_peer(message: str) -> bool:
    """Whether an error's message is one of ranks that have lost another one, whose own end it would follow from."""
    return any(phrase in message for phrase in _LOST_PEER)


def culprits(
    beats: Mapping[int, Heartbeat | None], states: Mapping[int, str], in_collective: Collection[int] = ()
) -> list[Culprit]:
    """Of ranks that stand still, those that do not merely wait for others; never none.

    beats: by rank, None of those that have told nothing; without ranks that have ended. states: of their processes, as
    `process_state` has them. in_collective: ranks whose stacks show a collective, which they may not have told.
    """
    if stopped := [rank for rank, state in states.items() if state in "Tt"]:
        return [Culprit(rank, "is stopped (SIGSTOP or a debugger)", words(beats[rank])) for rank in stopped]
    if silent := [rank for rank, beat in beats.items() if beat is None]:
        return [Culprit(rank, "has told nothing since it was started") for rank in silent]
    known = {rank: beat for rank, beat in beats.items() if beat is not None}
    if stuck := [rank for rank, state in states.items() if state == "D"]:
        return [Culprit(rank, "waits for its disk or a device", words(beats[rank])) for rank in stuck]
    busy = {rank: beat for rank, beat in known.items() if not beat.waits and rank not in in_collective}
    if busy:
        # others may do nothing because it does not come
        rank = min(busy, key=lambda one: busy[one].at)
        return [Culprit(rank, "neither waits for others nor goes on", words(busy[rank]))]
    # a collective waits for all: whoever waits for a message instead keeps it from ending
    if waiting := _waiting_for_messages(known):
        others = Counter(_call(known[rank], rank in in_collective) for rank in known if rank not in waiting)
        what = f"; the others: {others.most_common(1)[0][0]}" if others else ""
        return [Culprit(rank, "waits for what does not come", f"{words(known[rank])}{what}") for rank in waiting]
    least = min((beat.step for beat in known.values()), default=-1)
    behind = [rank for rank, beat in known.items() if beat.step == least]
    if len(behind) < len(known):
        return [Culprit(rank, "is behind the others", words(known[rank])) for rank in behind]
    counts = Counter(beat.words for beat in known.values())
    common, number = counts.most_common(1)[0]
    if 1 < number < len(known):
        alone = [rank for rank, beat in known.items() if beat.words != common]
        return [
            Culprit(rank, "waits for what no other does", f"{words(known[rank])}; the others: {common}")
            for rank in alone
        ]
    return [Culprit(rank, "waits as all others do", words(beat)) for rank, beat in known.items()]


def _waiting_for_messages(known: Mapping[int, Heartbeat]) -> list[int]:
    """Ranks that wait for messages, without those that wait for one of them alone.

    Of ranks that all wait for each other all: a receiver of a lost message and its sender stop within a message, in any order.
    """
    awaited = {rank: _peers(beat.words) for rank, beat in known.items()}
    waiting = {rank for rank, peers in awaited.items() if peers}
    roots = [rank for rank in sorted(waiting) if not awaited[rank] <= waiting]
    return roots or sorted(waiting)


def _peers(text: str) -> set[int]:
    """Ranks that messages are awaited from, or are to go to, as `distattn.ir.errors.named_ranks` writes them."""
    found = re.findall(r"\b(?:from|to) ranks? (\d+(?:, \d+)*)", text)
    return {int(number) for numbers in found for number in numbers.split(", ")}


def _call(beat: Heartbeat, in_collective: bool) -> str:
    return f"a collective, {beat.words}" if in_collective and not beat.waits else beat.words


def words(beat: Heartbeat | None) -> str:
    """What a rank told last, with the step it is in."""
    if beat is None:
        return "it has told nothing"
    return beat.words if beat.step < 0 else f"step {beat.step + 1}, {beat.words}"
