"""Watches the ranks of one machine from their launcher: notices at once which has ended, and by heartbeats that they hang."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distattn.ir.errors import LostRankError
from distattn.supervision.culprits import Culprit, culprits, process_state, tells_of_lost_peer, words
from distattn.supervision.evidence import is_in_collective, keep_evidence
from distattn.supervision.heartbeats import ENDED, LEFT, RAISED, REFUSED, Heartbeat, HeartbeatBoard
from distattn.supervision.helpers import LOOK_SECONDS, Helper
from distattn.supervision.node_links import CutLink, blamed_nodes
from distattn.supervision.node_reports import ANSWER_SECONDS, NodeReport, NodeReports, merged

# sent to this process itself where only its main thread can end the ranks; no person or scheduler sends it to launchers
INTERRUPT = signal.SIGUSR2
# seconds between two looks at other nodes' questions
_ASKED_SECONDS = 0.5
# seconds between two looks
POLL_SECONDS = 0.02
# that a look may be late; what is more is time in which nobody ran: the machine, or all of the job, was paused
_LATE_SECONDS = 1.0
# looks at a stopped rank before it is one that nobody lets go on
_STOPPED_LOOKS = 10
# that torchrun may take to notice how a rank has ended, which it alone is told
_TORCHRUN_SECONDS = 5.0
# what ranks have told that have done their part
_DONE = (ENDED, LEFT)
Kind = Literal["killed", "cut", "hung", "raised", "refused"]


@dataclass(frozen=True)
class Patience:
    """How long all ranks may be silent, in seconds.

    starting: until all ranks have done two steps: what is imported, connected, loaded and compiled. running: afterwards, or
    `factor` times the longest silence since the first of them where that is longer.
    """

    starting: float = 300.0
    running: float = 10.0
    factor: float = 4.0


@dataclass(frozen=True)
class Trouble:
    """Why the ranks of an attempt were ended, by those that are to blame.

    kind: whether they were killed or ended without a word, lost the link to other nodes, hung, raised an error or refused to go
    on. steps: that the rank that was furthest had done in this attempt. seconds: to the decision, from the last sign of life,
    less pauses of the machine, from what a rank has said of its end, or at most from its death. exit_code: of a rank that
    refuses. nodes: to blame for a link.
    """

    culprits: tuple[Culprit, ...]
    kind: Kind
    steps: int
    seconds: float
    exit_code: int = 1
    nodes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "; ".join(map(str, self.culprits))

    def facts(self) -> dict[str, object]:
        """What is written down of it, beside its words."""
        ranks = [one.rank for one in self.culprits if not one.helper]
        facts: dict[str, object] = {
            "ranks": ranks,
            "kind": self.kind,
            "steps": self.steps,
            "noticed_seconds": round(self.seconds, 3),
        }
        return facts | ({"nodes": list(self.nodes)} if self.nodes else {})


class RankWatch:
    """A thread that watches the ranks of a board until `close`. The first trouble ends them all, by SIGKILL.

    ranks: of this machine, by their numbers, each with a slot of the board. folder: where evidence of ranks that hang is kept;
    there by then. reports: what other nodes say of theirs, where there are several. Ranks are known by what they tell first.
    helpers: processes that are watched, too; say: prints a sentence about one that was replaced.
    """

    def __init__(
        self,
        board: HeartbeatBoard,
        ranks: range,
        patience: Patience,
        folder: Path,
        reports: NodeReports | None = None,
        helpers: Sequence[Helper] = (),
        say: Callable[[str], None] = lambda text: None,
    ):
        self._board, self._ranks, self._patience, self._folder = board, ranks, patience, folder
        self._helpers, self._say = helpers, say
        # names of helpers that could not be replaced, which is said once
        self._not_replaced: set[str] = set()
        # what was asked in an attempt before this one, of a scheduler that does not number them, is over
        self._reports, self._answered = reports, reports.asked() if reports is not None else 0.0
        self.trouble: Trouble | None = None
        self._began = time.monotonic()
        # looks in a row that have seen a stopped rank, after ranks were silent for too long
        self._stopped_looks = 0
        # the longest silence of all ranks since all have done their first step
        self._longest = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="distattn-rank-watch")
        self._thread.start()

    def close(self) -> Trouble | None:
        """End the thread; returns what went wrong, None where nothing did."""
        self._closed.set()
        self._thread.join()
        return self.trouble

    def _run(self) -> None:
        spoke, last, asked_at, helped_at = self._began, -1, 0.0, 0.0
        # since `spoke`, and the time of the last look
        paused, looked = 0.0, self._began
        while not self._closed.wait(POLL_SECONDS):
            # before it reads: what is told while this process waits for a core is no silence
            now = time.monotonic()
            late, looked = max(0.0, now - looked - _LATE_SECONDS), now
            paused += late
            beats = self._read()
            if self._end_of_one(beats):
                return
            if now > helped_at + LOOK_SECONDS:
                helped_at = now
                if self._fault_of_helper(beats):
                    return
            latest = max((beat.at for beat in beats.values()), default=self._began)
            done = min(self._done(beats).values(), default=0)
            if latest > spoke:
                # of this pause, what came after the word; less than nothing of a word that was told after `now`
                after = min(late, now - latest)
                # of the first steps, which compile and allocate, only from the second on
                if last > 0 and len(beats) == len(self._ranks):
                    self._longest = max(self._longest, latest - spoke - (paused - after))
                spoke, last, paused = latest, done, after
            silent = now - spoke - paused
            if self._reports is not None and now > asked_at + _ASKED_SECONDS:
                asked_at = now
                if self._answer(self._reports, beats, silent):
                    # what has taken time is no pause
                    looked = time.monotonic()
            if self._is_too_long(silent, beats):
                if self._hung(beats, silent, now - spoke):
                    return
                # ranks of other nodes work, and these wait for them
                spoke = looked = time.monotonic()
                paused = 0.0
        # torchrun may have been first to see that one has ended
        beats = self._read()
        if (helper := self._lost_helper()) is not None:
            self._end_with_helper(helper, helper.end(), "killed", POLL_SECONDS, beats)
        else:
            self._end_of_one(beats)

    def _read(self) -> dict[int, Heartbeat]:
        beats = {rank: self._board.read(slot) for slot, rank in enumerate(self._ranks)}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def _done(self, known: Mapping[int, Heartbeat]) -> dict[int, int]:
        """Steps that each rank has done in this attempt, by rank; without those that never begin one, as attention servers."""
        return {rank: beat.step - beat.first for rank, beat in known.items() if beat.first >= 0}

    def _has_started(self, known: Mapping[int, Heartbeat]) -> bool:
        return len(known) == len(self._ranks) and min(self._done(known).values(), default=0) > 1

    def _is_too_long(self, silent: float, known: Mapping[int, Heartbeat]) -> bool:
        """Whether ranks hang that have been silent for so many seconds."""
        if silent <= self._patience.running or known and all(beat.words in _DONE for beat in known.values()):
            return False
        is_stopped = any(process_state(beat.pid) in "Tt" for beat in known.values())
        # a job that was stopped as a whole goes on one process after another
        self._stopped_looks = self._stopped_looks + 1 if is_stopped else 0
        if self._stopped_looks > _STOPPED_LOOKS:
            # whatever it was about to do
            return True
        usual = max(self._patience.running, self._patience.factor * self._longest)
        return silent > max(usual if self._has_started(known) else self._patience.starting, _said(known))

    def _end_of_one(self, known: Mapping[int, Heartbeat]) -> bool:
        """Whether a rank has ended without having done its part; all others are ended then."""
        dead = {
            rank: beat.pid for rank, beat in known.items() if beat.words != LEFT and process_state(beat.pid) in "XZ"
        }
        if not dead:
            return False
        # again: they may have said why, or that they leave, just before they ended
        known = self._read()
        gone = {rank: known[rank] for rank, pid in dead.items() if known[rank].words != LEFT and known[rank].pid == pid}
        if not gone:
            return False
        # who was killed could say nothing, who was left alone by it says so, and ends later
        if killed := {rank: beat for rank, beat in gone.items() if not _has_said_why(beat)}:
            first = tuple(Culprit(rank, "ended without a word", words(beat)) for rank, beat in killed.items())
            others = [beat.pid for rank, beat in known.items() if rank not in gone]
            noticed = self._wait_for_torchrun(others, all(beat.words == ENDED for beat in killed.values()))
            # ranks that have a helper for their parent are killed with it
            if (helper := self._lost_helper()) is not None:
                self._end_with_helper(helper, helper.end(), "killed", POLL_SECONDS, known)
            else:
                self._end(first, "killed", POLL_SECONDS, known, noticed=noticed)
        else:
            rank, beat = min(gone.items(), key=lambda item: item[1].at)
            silent = time.monotonic() - beat.at
            if _tells_of_others(beat) and self._reports is not None and (cut := self._reports.cut_links()):
                self._end_with_cut(cut, silent, known)
            elif beat.words.startswith(REFUSED):
                code = int(beat.words.removeprefix(REFUSED).partition(":")[0])
                self._end((Culprit(rank, beat.words),), "refused", silent, known, code)
            else:
                self._end((Culprit(rank, beat.words),), "raised", silent, known)
        return True

    def _fault_of_helper(self, known: Mapping[int, Heartbeat]) -> bool:
        """Replace helpers that were killed or are stopped; return whether the ranks have ended with one that cannot be."""
        for helper in self._helpers:
            if not (fault := helper.fault(self._patience.running)):
                continue
            if helper.replace is None:
                kind: Kind = "killed" if helper.end() else "hung"
                self._end_with_helper(helper, fault, kind, LOOK_SECONDS, known)
                return True
            try:
                self._say(f"{helper.start_again(fault)}.")
                self._not_replaced.discard(helper.name)
            except OSError as error:
                # if no process can be started now, try again at each look, and say it once
                if helper.name not in self._not_replaced:
                    self._not_replaced.add(helper.name)
                    self._say(f"{helper} {fault}, and cannot be replaced now: {error.strerror}; it is tried again.")
        return False

    def _lost_helper(self) -> Helper | None:
        """Return the helper that has ended and ends the ranks with it; None while all live."""
        return next((helper for helper in self._helpers if helper.replace is None and helper.end()), None)

    def _end_with_helper(
        self, helper: Helper, fault: str, kind: Kind, seconds: float, known: Mapping[int, Heartbeat]
    ) -> None:
        code = helper.exit_code() or 1
        helper.kill()
        culprit = Culprit(self._ranks[0], fault, helper=str(helper))
        # torchrun finds that all ranks have ended: there is nothing to interrupt
        done = max(self._done(known).values(), default=0)
        self._record(Trouble((culprit,), kind, done, seconds, code if code > 0 else 128 - code))

    def _wait_for_torchrun(self, others: Sequence[int], done: bool) -> bool:
        """Until torchrun has ended the others, or tried to: it knows how the first has ended by then.

        done: whether ranks have been killed that had done their part. They wait for each other, and where torchrun is about to
        let them go it waits for the dead one for ever (`multiprocessing.Event.set`). Returns False then.
        """
        ends = time.monotonic() + _TORCHRUN_SECONDS
        while (others or done) and time.monotonic() < ends:
            if any(map(_is_asked_to_end, others)) or self._closed.wait(POLL_SECONDS):
                return True
        return not done

    def _hung(self, known: Mapping[int, Heartbeat], silent: float, ago: float) -> bool:
        """End ranks that hang; False where they only wait for ranks of other nodes, which work.

        ago: seconds since their last word, pauses included.
        """
        report = self._report(known, silent)
        if self._reports is None:
            found = culprits(*report[:3])
        else:
            others = self._of_others(self._reports, report, ago)
            if others is None:
                others, absent = {}, []
            else:
                absent = sorted(set(range(self._reports.nodes)) - {self._reports.node, *others})
            if cut := merged({self._reports.node: report, **others}).cut:
                self._end_with_cut(cut, silent, known)
                return True
            if any(other.silent < max(self._patience.running / 4, _said(other.beats)) for other in others.values()):
                return False
            found = culprits(*merged({self._reports.node: report, **others})[:3])
            if absent:
                first = {node: node * len(self._ranks) for node in absent}
                found = [Culprit(first[node], f"and the others of node {node} do not answer") for node in absent]
        self._end(tuple(found), "hung", silent, known)
        return True

    def _report(self, known: Mapping[int, Heartbeat], silent: float) -> NodeReport:
        """What this machine's ranks do, with evidence of it in the folder."""
        pids = {rank: beat.pid for rank, beat in known.items() if beat.words not in _DONE}
        states = {rank: process_state(pid) for rank, pid in pids.items()}
        stacks: dict[int, str] = {}
        # a full disk must not keep a run from going on
        with contextlib.suppress(OSError):
            stacks = keep_evidence(self._folder, pids, known)
        beats = {rank: known.get(rank) for rank in self._ranks if rank not in known or rank in pids}
        collective = [rank for rank, text in stacks.items() if is_in_collective(text)]
        return NodeReport(beats, states, collective, silent, self._reports.cut_links() if self._reports else ())

    def _answer(self, reports: NodeReports, known: Mapping[int, Heartbeat], silent: float) -> bool:
        """Tell another node that has asked what these ranks do; returns whether one has."""
        with contextlib.suppress(OSError):
            if (asked := reports.asked()) > self._answered:
                self._answered = asked
                reports.answer(self._report(known, silent))
                return True
        return False

    def _of_others(self, reports: NodeReports, report: NodeReport, ago: float) -> dict[int, NodeReport] | None:
        """What other nodes answer, until all have or the time is over; None where they cannot be asked."""
        found: dict[int, NodeReport] = {}
        try:
            asked, ends = reports.ask(), time.monotonic() + ANSWER_SECONDS
            # to others that ask as well
            reports.answer(report)
        except OSError:
            return None
        while len(found) < reports.nodes - 1 and time.monotonic() < ends and not self._closed.is_set():
            time.sleep(POLL_SECONDS)
            # what others said since these ranks are silent counts: who asked first may have ended its ranks and be gone
            found = reports.answers(asked - ago)
        return found

    def _end_with_cut(self, cut: Sequence[CutLink], seconds: float, known: Mapping[int, Heartbeat]) -> None:
        """End the ranks since nodes do not reach each other: what the ranks wait for or tell follows from it."""
        culprits = tuple(Culprit(link.first * len(self._ranks), link.how, helper=link.names) for link in cut)
        self._end(culprits, "cut", seconds, known, nodes=tuple(blamed_nodes(cut)))

    def _end(
        self,
        found: tuple[Culprit, ...],
        kind: Kind,
        seconds: float,
        known: Mapping[int, Heartbeat],
        code: int = 1,
        noticed: bool = True,
        nodes: tuple[int, ...] = (),
    ) -> None:
        self._record(Trouble(found, kind, max(self._done(known).values(), default=0), seconds, code, nodes))
        if not known or not noticed:
            # no rank has told its process id, or torchrun waits for a dead rank: it ends its ranks with this process
            os.kill(os.getpid(), INTERRUPT)

    def _record(self, trouble: Trouble) -> None:
        """Note the trouble, and kill all ranks that have told who they are."""
        self.trouble = trouble
        for beat in self._read().values():
            # the number of one that has ended meanwhile may be somebody else's by now
            if beat.words not in _DONE:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)
        # torchrun does not learn that they ended while it is stopped
        for helper in self._helpers:
            if helper.replace is None and helper.is_stopped():
                helper.kill()


def _said(beats: Mapping[int, Heartbeat | None]) -> float:
    """Seconds that ranks have said to need for what they do."""
    return max((beat.seconds for beat in beats.values() if beat is not None), default=0.0)


def _is_asked_to_end(pid: int) -> bool:
    """Whether a process has ended, or has a SIGTERM that it has blocked."""
    try:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines()
        )
    except OSError:
        return True
    return fields["State"].strip()[0] in "XZ" or bool(int(fields["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)


def _tells_of_others(beat: Heartbeat) -> bool:
    """Return whether a rank ends because it has lost another one."""
    refused = beat.words.removeprefix(REFUSED).partition(":")[0]
    return refused == str(LostRankError.exit_code) or tells_of_lost_peer(beat.words)


def _has_said_why(beat: Heartbeat) -> bool:
    return beat.words.startswith((REFUSED, RAISED))
