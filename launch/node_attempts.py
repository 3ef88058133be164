"""Runs the attempts of a run on several nodes, one after another, on Slurm or Ray. Needs neither torch nor a GPU."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol

from distattn.checkpoints.checkpoint_folder import preferred_step
from distattn.checkpoints.folder_handle import FolderHandle
from distattn.ir.errors import RunStopped
from distattn.ir.text_format import print_message
from distattn.launch.attempt_end import AttemptEnd
from distattn.launch.attempts import Attempts
from distattn.training.run_folder import RunFolder

_STOPPED = RunStopped.exit_code


class Nodes(Protocol):
    """The nodes on which attempts run. A host is a node's name as users know it."""

    def choose(self) -> list[str] | None:
        """Return the hosts of the next attempt in rank order; None if too few are left or the run must stop."""

    def run(self, hosts: Sequence[str], attempt: int) -> AttemptEnd:
        """Run `distattn.launch.run_node` on each host, and wait until all have ended."""

    def finish(self, hosts: Sequence[str]) -> int:
        """Write the run's report on one of the hosts. Return the exit code."""

    def blame(self, hosts: Sequence[str], end: AttemptEnd) -> None:
        """Record the hosts at fault. Some of them may be left out of later attempts."""

    def give_back(self) -> str:
        """Return why the run must continue later on other nodes, as a sentence without its period, or "" if it need not."""

    def shortage(self) -> str:
        """Return why `choose` found too few hosts, as a sentence without its period."""


class Outcome(NamedTuple):
    """The outcome of a run's attempts. code: exit code. again: True if the run has to continue later."""

    code: int
    again: bool = False


def ask_to_stop(run: RunFolder, signal_name: str) -> None:
    """Ask the ranks to save and end. Print a message if that fails."""
    try:
        run.ask_to_stop(signal_name)
    except OSError as error:
        print_message(f"the ranks cannot be asked to stop: {error}; the run continues from its newest checkpoint.")


class NodeAttempts:
    """Runs attempts until the run has ended, can only continue on other nodes, or cannot continue.

    facts: recorded for every attempt, with their values at its start.
    """

    def __init__(self, run: RunFolder, nodes: Nodes, max_restarts: int, facts: Mapping[str, Any]):
        self._run, self._nodes, self._max_restarts, self._facts = run, nodes, max_restarts, facts
        self._attempts = Attempts(run.attempts)
        # the signal that asked this process to stop
        self._signal = ""

    def stop(self, number: int, frame: FrameType | None = None) -> None:
        """Ask the ranks to save and end. This is a signal handler."""
        self._signal = signal.Signals(number).name
        ask_to_stop(self._run, self._signal)

    def run(self) -> Outcome:
        """Run attempt after attempt. Raises DistattnError if the run's folder is missing or replaced before an attempt."""
        with FolderHandle(self._run.folder) as held:
            return self._run_attempts(held)

    def _run_attempts(self, held: FolderHandle) -> Outcome:
        self._attempts.end_open("ended with its job, which left no reason")
        self._run.forget_requests()
        if self._signal:
            # repeat a request that the previous line has removed
            self._run.ask_to_stop(self._signal)
        restarts, start, first, started = 0, self._progress(), True, False
        furthest = start
        while (hosts := self._nodes.choose()) is not None:
            # without this check, an attempt could recreate part of a deleted folder
            held.check()
            number = self._attempts.begin(**self._facts, hosts=hosts)
            end = self._nodes.run(hosts, number)
            asked = self._asked()
            if end.code == 0:
                self._attempts.end(number, 0, "ended well")
                code = self._nodes.finish(hosts)
                # if the signal also ended the report, only the report remains to be done later
                return Outcome(code, again=code != 0 and self._asked_by_signal())
            if end.code == _STOPPED and end.next_nodes and not asked:
                self._attempts.end(number, _STOPPED, f"saved, to continue with {end.next_nodes} nodes")
                continue
            if end.code == _STOPPED:
                self._attempts.end(number, _STOPPED, f"stopped at the request of {asked or 'a file in the run folder'}")
                return Outcome(_STOPPED, again=self._asked_by_signal())
            node_reports = self._attempts.node_reports(number)
            why, blamed = end.cause(hosts, node_reports)
            self._attempts.end(number, end.code, why, blamed=blamed)
            if end.unstarted and started:
                # ranks were started before, so the request is valid, but the scheduler has lost track of the nodes
                print_message(f"{why}.")
                return Outcome(_STOPPED, again=not asked or self._asked_by_signal())
            started = started or not end.unstarted
            # ranks that fail before the first step of a later attempt may trip over leftovers of the previous attempt: memory,
            # locks, files
            left_over = not first and bool(node_reports)
            left_over = left_over and not any(facts.get("steps", 1) for facts in node_reports.values())
            first = False
            if end.is_final() and not left_over:
                print_message(f"{why}; the other ranks were stopped.")
                return Outcome(end.code)
            now = self._progress()
            restarts, furthest = (1, now) if now > furthest else (restarts + 1, furthest)
            if asked or restarts > self._max_restarts:
                reason = "the run had to stop" if asked else f"{restarts} attempts made no progress"
                print_message(f"{why}; {reason}.")
                return Outcome(end.code, again=self._asked_by_signal())
            if not end.is_final():
                self._nodes.blame(blamed, end)
            # without progress, the run would most likely also fail on other nodes
            if now > start and (back := self._nodes.give_back()):
                print_message(f"{why}; {back}.")
                return Outcome(_STOPPED, again=True)
            print_message(
                f"{why}; all ranks start again from step {now:,} (restart {restarts} of {self._max_restarts})."
            )
        asked = self._asked()
        message = f"stopped between attempts at the request of {asked}" if asked else self._nodes.shortage()
        print_message(f"{message}.")
        return Outcome(_STOPPED, again=not asked or self._asked_by_signal())

    def _asked(self) -> str:
        """Return who asked the ranks to stop: a signal's name or the text in the stop file; "" if there is no request.

        Slurm may also signal the nodes, which write the signal's name to the stop file.
        """
        try:
            return self._signal or self._run.stop_file.read_text("utf-8").strip()
        except FileNotFoundError:
            return ""

    def _asked_by_signal(self) -> bool:
        """Return whether a signal asked the ranks to stop. In that case the run continues later."""
        return self._asked() in signal.Signals.__members__

    def _progress(self) -> int:
        return preferred_step(self._run.checkpoints)
