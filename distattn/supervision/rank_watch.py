"""Watches the ranks of one machine from their launcher: notices at once which has ended, and by heartbeats that they hang."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distattn.supervision.culprits import Culprit, culprits, process_state
from distattn.supervision.evidence import keep_evidence
from distattn.supervision.heartbeats import Heartbeat, HeartbeatBoard

# seconds between two looks
POLL_SECONDS = 0.02
# that a death is given to show itself: a rank that is killed makes its peers fail in the same instant
_BLAME_SECONDS = 0.05
# of a rank that has done its part, and of one that raised an error and has said so
ENDED, FAILED = "ended", "failed: "


@dataclass(frozen=True)
class Patience:
    """How long all ranks may be silent, in seconds.

    starting: until a rank has done its first two steps: what is imported, connected, loaded and compiled. running: afterwards,
    or `factor` times the longest silence of a finished step where that is longer.
    """

    starting: float = 600.0
    running: float = 10.0
    factor: float = 4.0


@dataclass(frozen=True)
class Trouble:
    """Why the ranks of an attempt were ended. step: training steps that had been begun, by the rank that was furthest.

    hung: none had ended by itself. seconds: from the last sign of life, or the death, to the decision.
    """

    culprits: tuple[Culprit, ...]
    step: int
    hung: bool
    seconds: float

    def __str__(self) -> str:
        return "; ".join(map(str, self.culprits))


class RankWatch:
    """A thread that watches the ranks of a board until `close`. The first trouble ends them all, by SIGKILL.

    folder: where evidence of ranks that hang is kept; there by then. Ranks are known by what they tell first.
    """

    def __init__(self, board: HeartbeatBoard, ranks: int, patience: Patience, folder: Path):
        self._board, self._ranks, self._patience, self._folder = board, ranks, patience, folder
        self.trouble: Trouble | None = None
        self._began = time.monotonic()
        # of steps that every rank has finished, the longest silence of all ranks
        self._longest = 0.0
        self._first_step: int | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="distattn-rank-watch")
        self._thread.start()

    def close(self) -> Trouble | None:
        """End the thread; returns what went wrong, None where nothing did."""
        self._closed.set()
        self._thread.join()
        return self.trouble

    def _run(self) -> None:
        spoke, last = self._began, -1
        while not self._closed.wait(POLL_SECONDS):
            beats = {rank: self._board.read(rank) for rank in range(self._ranks)}
            known = {rank: beat for rank, beat in beats.items() if beat is not None}
            if self._end_of_one(known):
                return
            latest = max((beat.at for beat in known.values()), default=self._began)
            step = min((beat.step for beat in known.values()), default=-1) if len(known) == self._ranks else -1
            if latest > spoke:
                if self._has_started(step):
                    self._longest = max(self._longest, latest - spoke if step == last else 0.0)
                spoke, last = latest, step
            silent = time.monotonic() - spoke
            allowed = max(self._limit(step), max((beat.seconds for beat in known.values()), default=0.0))
            if silent > allowed and any(beat.words != ENDED for beat in known.values()):
                self._hung(beats, silent)
                return

    def _has_started(self, step: int) -> bool:
        """Whether two steps were finished in this attempt, the first of which compile and allocate."""
        if step >= 0 and self._first_step is None:
            self._first_step = step
        return self._first_step is not None and step >= self._first_step + 2

    def _limit(self, step: int) -> float:
        if not self._has_started(step):
            return self._patience.starting
        return max(self._patience.running, self._patience.factor * self._longest)

    def _end_of_one(self, known: Mapping[int, Heartbeat]) -> bool:
        """Whether a rank has ended without having done its part; all others are ended then."""
        if not any(_is_gone(beat) for beat in known.values()):
            return False
        noticed = time.monotonic()
        time.sleep(_BLAME_SECONDS)
        found = {rank: beat for rank in known if (beat := self._board.read(rank)) is not None}
        gone = {rank: beat for rank, beat in found.items() if _is_gone(beat)}
        # who was killed could say nothing, who was left alone says so
        silent = {rank: beat for rank, beat in gone.items() if not beat.words.startswith(FAILED)}
        if silent:
            first = tuple(Culprit(rank, f"was killed: {beat.words}") for rank, beat in silent.items())
        else:
            rank, beat = min(gone.items(), key=lambda item: item[1].at)
            first = (Culprit(rank, beat.words),)
        self._end(Trouble(first, _furthest(found), False, time.monotonic() - noticed), found)
        return True

    def _hung(self, beats: Mapping[int, Heartbeat | None], silent: float) -> None:
        known = {rank: beat for rank, beat in beats.items() if beat is not None}
        pids = {rank: beat.pid for rank, beat in known.items()}
        states = {rank: process_state(pid) for rank, pid in pids.items()}
        found = tuple(culprits(beats, states))
        with contextlib.suppress(OSError):
            # a full disk must not keep a run from going on
            keep_evidence(
                self._folder, pids, known, sorted(pids, key=lambda rank: rank not in [one.rank for one in found])
            )
        self._end(Trouble(found, _furthest(known), True, silent), known)

    def _end(self, trouble: Trouble, known: Mapping[int, Heartbeat]) -> None:
        self.trouble = trouble
        for beat in known.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)


def _is_gone(beat: Heartbeat) -> bool:
    return beat.words != ENDED and process_state(beat.pid) in "XZ"


def _furthest(known: Mapping[int, Heartbeat]) -> int:
    return max((beat.step for beat in known.values()), default=-1) + 1
