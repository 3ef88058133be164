"""Watch the ranks on one machine from their launcher: notice at once when a rank ends, and detect hangs from the heartbeats."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from distattn.supervision.culprits import Culprit, culprits, last_activity, process_state
from distattn.supervision.evidence import is_in_collective, save_evidence
from distattn.supervision.heartbeats import WITH_REASON, Heartbeat, HeartbeatBoard
from distattn.supervision.helper_processes import LOOK_SECONDS, Helper, shell_exit_code
from distattn.supervision.node_links import CutLink, blamed_nodes
from distattn.supervision.node_reports import ANSWER_SECONDS, NodeReport, NodeReports, merged

# the signal that this process sends itself if only its main thread can end the ranks; users and schedulers do not send it
INTERRUPT = signal.SIGUSR2
# seconds between checks for questions from other nodes
_ASKED_SECONDS = 0.5
# seconds between checks of the heartbeats
POLL_SECONDS = 0.02
# seconds by which a check may be late; a longer delay means that the machine or the entire job was paused
_LATE_SECONDS = 1.0
# consecutive checks that must find a rank stopped before it counts as stopped for good
_STOPPED_LOOKS = 10
# seconds that torchrun gets to notice how a rank ended; only torchrun learns the exit code
_TORCHRUN_SECONDS = 5.0
Kind = Literal["killed", "cut", "hung", "raised", "refused"]


@dataclass(frozen=True)
class Patience:
    """Limits on how many seconds may pass without a heartbeat from any rank.

    starting: the limit until all ranks have done two steps; before that they import, connect, load and compile. running: the
    limit afterwards, or `factor` times the longest silence since the first step if that is longer.
    """

    starting: float = 300.0
    running: float = 10.0
    factor: float = 4.0


@dataclass(frozen=True)
class Trouble:
    """Why the ranks of an attempt were ended, with the ranks to blame.

    kind: "killed" (or ended without giving a reason), "cut" (lost the link to other nodes), "hung", "raised" (an error) or
    "refused" (to continue). steps: the steps done in this attempt by the rank that was furthest ahead. seconds: the time until
    the trouble was noticed, without pauses of the machine, counted from the last heartbeat or the rank's report of its end;
    for a killed rank, an upper bound. exit_code: the exit code of a rank that refused. nodes: the nodes to blame for a cut
    link. lost_peer: True if the ranks to blame ended because they lost another rank. error: a number that is equal for equal
    errors.
    """

    culprits: tuple[Culprit, ...]
    kind: Kind
    steps: int
    seconds: float
    exit_code: int = 1
    nodes: tuple[int, ...] = ()
    lost_peer: bool = False
    error: int = 0

    def __str__(self) -> str:
        return "; ".join(map(str, self.culprits))

    def facts(self) -> dict[str, object]:
        """Return the fields to record together with the sentence `str(self)`."""
        ranks = [culprit.rank for culprit in self.culprits if not culprit.helper]
        facts: dict[str, object] = {
            "ranks": ranks,
            "kind": self.kind,
            "steps": self.steps,
            "noticed_seconds": round(self.seconds, 3),
            "lost_peer": self.lost_peer,
        }
        return facts | ({"nodes": list(self.nodes)} if self.nodes else {})

    def repeats(self, before: Trouble | None) -> bool:
        """Return True if this trouble has the same kind, ranks and error as `before`."""
        return before is not None and self._identity() == before._identity()

    def _identity(self) -> tuple[object, ...]:
        return self.kind, self.error, [culprit.rank for culprit in self.culprits]


class RankWatch:
    """A thread that watches the ranks on a board until `close`. At the first trouble, it kills them all with SIGKILL.

    A rank is watched from its first heartbeat on. ranks: the numbers of this machine's ranks, each with a slot on the board.
    folder: where to save evidence about hung ranks; it must exist when a rank hangs. reports: the exchange with other nodes, None
    if there is only one node. helpers: other processes to watch. notify: prints a sentence about a helper that was replaced.
    """

    def __init__(
        self,
        board: HeartbeatBoard,
        ranks: range,
        patience: Patience,
        folder: Path,
        reports: NodeReports | None = None,
        helpers: Sequence[Helper] = (),
        notify: Callable[[str], None] = lambda text: None,
    ):
        self._board, self._ranks, self._patience, self._folder = board, ranks, patience, folder
        self._helpers, self._notify = helpers, notify
        # names of the helpers that could not be replaced, so that this is reported only once
        self._not_replaced: set[str] = set()
        # some schedulers do not number attempts, so ignore questions that an earlier attempt asked
        self._reports, self._answered = reports, reports.asked() if reports is not None else 0.0
        self.trouble: Trouble | None = None
        self._began = time.monotonic()
        # number of consecutive checks that found a rank stopped after ranks were silent for too long
        self._stopped_looks = 0
        # the longest time without a heartbeat from any rank since all ranks have done their first step
        self._longest = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="distattn-rank-watch")
        self._thread.start()

    def close(self) -> Trouble | None:
        """End the thread. Return the trouble, or None if there was no trouble."""
        self._closed.set()
        self._thread.join()
        return self.trouble

    def _run(self) -> None:
        heard, last, asked_at, helped_at = self._began, -1, 0.0, 0.0
        # seconds of pauses since `heard`, and the time of the last check
        paused, looked = 0.0, self._began
        while not self._closed.wait(POLL_SECONDS):
            # take the time before reading the board, so that a heartbeat written while this process waits for a core still counts
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
            if latest > heard:
                # the part of this pause after the heartbeat; negative if the heartbeat was written after `now`
                after = min(late, now - latest)
                # the first step compiles and allocates, so silences count only from the second step on
                if last > 0 and len(beats) == len(self._ranks):
                    self._longest = max(self._longest, latest - heard - (paused - after))
                heard, last, paused = latest, done, after
            silent = now - heard - paused
            if self._reports is not None and now > asked_at + _ASKED_SECONDS:
                asked_at = now
                if self._answer(self._reports, beats, silent):
                    # do not count the time of the answer as a pause
                    looked = time.monotonic()
            if self._is_too_long(silent, beats):
                if self._hung(beats, silent, now - heard):
                    return
                # these ranks wait for ranks on other nodes, which are working
                heard = looked = time.monotonic()
                paused = 0.0
        # check once more: torchrun may have noticed first that a rank has ended
        beats = self._read()
        if (helper := self._lost_helper()) is not None:
            self._end_with_helper(helper, helper.end(), "killed", POLL_SECONDS, beats)
        else:
            self._end_of_one(beats)

    def _read(self) -> dict[int, Heartbeat]:
        beats = {rank: self._board.read(slot) for slot, rank in enumerate(self._ranks)}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def _done(self, beats: Mapping[int, Heartbeat]) -> dict[int, int]:
        """Return each rank's number of steps in this attempt, except for ranks that never begin a step (attention servers)."""
        return {rank: beat.step - beat.first for rank, beat in beats.items() if beat.first >= 0}

    def _has_started(self, beats: Mapping[int, Heartbeat]) -> bool:
        return len(beats) == len(self._ranks) and min(self._done(beats).values(), default=0) > 1

    def _is_too_long(self, silent: float, beats: Mapping[int, Heartbeat]) -> bool:
        """Return True if `silent` seconds without a heartbeat mean that the ranks hang."""
        if silent <= self._patience.running or beats and all(beat.has_done_its_part for beat in beats.values()):
            return False
        is_stopped = any(process_state(beat.pid) in "Tt" for beat in beats.values())
        # wait a few checks, because the processes of a stopped job continue one after another
        self._stopped_looks = self._stopped_looks + 1 if is_stopped else 0
        if self._stopped_looks > _STOPPED_LOOKS:
            return True
        usual = max(self._patience.running, self._patience.factor * self._longest)
        return silent > max(usual if self._has_started(beats) else self._patience.starting, _announced_seconds(beats))

    def _end_of_one(self, beats: Mapping[int, Heartbeat]) -> bool:
        """End all ranks if a rank has ended without having done its part. Return True if they were ended."""
        dead = {
            rank: beat.pid for rank, beat in beats.items() if beat.state != "left" and process_state(beat.pid) in "XZ"
        }
        if not dead:
            return False
        # read again: a rank may have reported its reason, or the state "left", just before it ended
        beats = self._read()
        gone = {
            rank: beats[rank] for rank, pid in dead.items() if beats[rank].state != "left" and beats[rank].pid == pid
        }
        if not gone:
            return False
        # first blame ranks that gave no reason: a killed rank could not give a reason, and the ranks that lost it report that
        # loss and end later
        if killed := {rank: beat for rank, beat in gone.items() if beat.state not in WITH_REASON}:
            first = tuple(
                Culprit(rank, "ended without giving a reason", last_activity(beat)) for rank, beat in killed.items()
            )
            others = [beat.pid for rank, beat in beats.items() if rank not in gone]
            noticed = self._wait_for_torchrun(others, all(beat.state == "ended" for beat in killed.values()))
            # if a helper was lost, blame it: the ranks that it started are killed with it
            if (helper := self._lost_helper()) is not None:
                self._end_with_helper(helper, helper.end(), "killed", POLL_SECONDS, beats)
            else:
                self._end(first, "killed", POLL_SECONDS, beats, noticed=noticed)
        else:
            rank, beat = min(gone.items(), key=lambda item: item[1].at)
            silent = time.monotonic() - beat.at
            if beat.lost_peer and self._reports is not None and (cut := self._reports.cut_links()):
                self._end_with_cut(cut, silent, beats)
            else:
                kind: Kind = "refused" if beat.state == "refused" else "raised"
                code = beat.exit_code if kind == "refused" else 1
                self._end((Culprit(rank, beat.words),), kind, silent, beats, code, reason=beat)
        return True

    def _fault_of_helper(self, beats: Mapping[int, Heartbeat]) -> bool:
        """Replace helpers that were killed or are stopped. If such a helper has no replacement, end the ranks and return True."""
        for helper in self._helpers:
            if not (fault := helper.fault(self._patience.running)):
                continue
            if helper.replace is None:
                kind: Kind = "killed" if helper.end() else "hung"
                self._end_with_helper(helper, fault, kind, LOOK_SECONDS, beats)
                return True
            try:
                self._notify(f"{helper.start_again(fault)}.")
                self._not_replaced.discard(helper.name)
            except OSError as error:
                # no process can be started now: try again at each check, but report it only once
                if helper.name not in self._not_replaced:
                    self._not_replaced.add(helper.name)
                    self._notify(
                        f"{helper} {fault}, and cannot be replaced now: {error.strerror}; distattn tries again."
                    )
        return False

    def _lost_helper(self) -> Helper | None:
        """Return a helper that has ended and cannot be replaced, or None if all such helpers are alive."""
        return next((helper for helper in self._helpers if helper.replace is None and helper.end()), None)

    def _end_with_helper(
        self, helper: Helper, fault: str, kind: Kind, seconds: float, beats: Mapping[int, Heartbeat]
    ) -> None:
        code = helper.exit_code() or 1
        helper.kill()
        culprit = Culprit(self._ranks[0], fault, helper=str(helper))
        # no interrupt is needed, because torchrun notices by itself that all ranks have ended
        done = max(self._done(beats).values(), default=0)
        self._record(Trouble((culprit,), kind, done, seconds, shell_exit_code(code)))

    def _wait_for_torchrun(self, others: Sequence[int], done: bool) -> bool:
        """Wait until torchrun ends the other ranks, or tries to. By then, torchrun knows how the first rank ended.

        others: process ids of the other ranks. done: True if the killed ranks had done their part. Such ranks wait for each
        other, and torchrun, in releasing them, waits forever for a dead rank (`multiprocessing.Event.set`). In that case return
        False.
        """
        ends = time.monotonic() + _TORCHRUN_SECONDS
        while (others or done) and time.monotonic() < ends:
            if any(map(_is_asked_to_end, others)) or self._closed.wait(POLL_SECONDS):
                return True
        return not done

    def _hung(self, beats: Mapping[int, Heartbeat], silent: float, ago: float) -> bool:
        """End ranks that hang. Return False if they only wait for working ranks on other nodes.

        silent, ago: seconds since their last heartbeat, excluding and including pauses of the machine.
        """
        report = self._report(beats, silent)
        if self._reports is None:
            blamed = culprits(*report[:3])
        else:
            others = self._other_reports(self._reports, report, ago)
            if others is None:
                others, absent = {}, []
            else:
                absent = sorted(set(range(self._reports.nodes)) - {self._reports.node, *others})
            if cut := merged({self._reports.node: report, **others}).cut:
                self._end_with_cut(cut, silent, beats)
                return True
            busy = self._patience.running / 4
            if any(other.silent < max(busy, _announced_seconds(other.beats)) for other in others.values()):
                return False
            blamed = culprits(*merged({self._reports.node: report, **others})[:3])
            if absent:
                first = {node: node * len(self._ranks) for node in absent}
                blamed = [Culprit(first[node], f"and the other ranks of node {node} do not answer") for node in absent]
        self._end(tuple(blamed), "hung", silent, beats)
        return True

    def _report(self, last_beats: Mapping[int, Heartbeat], silent: float) -> NodeReport:
        """Save evidence about this machine's ranks in the folder. Return a report about them."""
        pids = {rank: beat.pid for rank, beat in last_beats.items() if not beat.has_done_its_part}
        states = {rank: process_state(pid) for rank, pid in pids.items()}
        stacks: dict[int, str] = {}
        # a full disk must not stop the run
        with contextlib.suppress(OSError):
            stacks = save_evidence(self._folder, pids, last_beats)
        beats = {rank: last_beats.get(rank) for rank in self._ranks if rank not in last_beats or rank in pids}
        collective = [rank for rank, text in stacks.items() if is_in_collective(text)]
        return NodeReport(beats, states, collective, silent, self._reports.cut_links() if self._reports else ())

    def _answer(self, reports: NodeReports, beats: Mapping[int, Heartbeat], silent: float) -> bool:
        """Answer if another node has asked what these ranks are doing. Return True if an answer was written."""
        with contextlib.suppress(OSError):
            if (asked := reports.asked()) > self._answered:
                self._answered = asked
                reports.answer(self._report(beats, silent))
                return True
        return False

    def _other_reports(self, reports: NodeReports, report: NodeReport, ago: float) -> dict[int, NodeReport] | None:
        """Return the reports of other nodes once all have answered or time is up, or None if they cannot be asked."""
        answers: dict[int, NodeReport] = {}
        try:
            asked, ends = reports.ask(), time.monotonic() + ANSWER_SECONDS
            # also answer, because other nodes may ask at the same time
            reports.answer(report)
        except OSError:
            return None
        while len(answers) < reports.nodes - 1 and time.monotonic() < ends and not self._closed.is_set():
            time.sleep(POLL_SECONDS)
            # accept any answer since the silence began, because a node that asked earlier may already have ended its ranks
            answers = reports.answers(asked - ago)
        return answers

    def _end_with_cut(self, cut: Sequence[CutLink], seconds: float, beats: Mapping[int, Heartbeat]) -> None:
        """End the ranks because nodes cannot reach each other, which explains what the ranks wait for or report."""
        culprits = tuple(Culprit(link.first * len(self._ranks), link.how, helper=link.names) for link in cut)
        self._end(culprits, "cut", seconds, beats, nodes=tuple(blamed_nodes(cut)))

    def _end(
        self,
        culprits: tuple[Culprit, ...],
        kind: Kind,
        seconds: float,
        beats: Mapping[int, Heartbeat],
        code: int = 1,
        noticed: bool = True,
        nodes: tuple[int, ...] = (),
        reason: Heartbeat | None = None,
    ) -> None:
        done = max(self._done(beats).values(), default=0)
        trouble = Trouble(culprits, kind, done, seconds, code, nodes)
        if reason is not None:
            trouble = replace(trouble, lost_peer=reason.lost_peer, error=reason.key)
        self._record(trouble)
        if not beats or not noticed:
            # either no rank has reported its process id, or torchrun waits for a dead rank; the main thread must end the ranks
            os.kill(os.getpid(), INTERRUPT)

    def _record(self, trouble: Trouble) -> None:
        """Record the trouble, and kill all ranks whose process ids are known."""
        self.trouble = trouble
        for beat in self._read().values():
            # skip ranks that have ended, whose process ids may belong to other processes by now
            if not beat.has_done_its_part:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)
        # a stopped torchrun cannot notice that the ranks ended
        for helper in self._helpers:
            if helper.replace is None and helper.is_stopped():
                helper.kill()


def _announced_seconds(beats: Mapping[int, Heartbeat | None]) -> float:
    """Return how many seconds the activities may take: the longest time announced by any rank, or 0."""
    return max((beat.seconds for beat in beats.values() if beat is not None), default=0.0)


def _is_asked_to_end(pid: int) -> bool:
    """Return True if a process has ended or has a pending SIGTERM."""
    try:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines()
        )
    except OSError:
        return True
    return fields["State"].strip()[0] in "XZ" or bool(int(fields["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)
