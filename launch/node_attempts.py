"""The attempts of a run on several nodes, one after another: the same on Slurm and on Ray. Needs neither torch nor a GPU."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol

from distattn.checkpoints.checkpoint_folder import preferred_step
from distattn.checkpoints.held_folder import HeldFolder
from distattn.ir.errors import RunStopped
from distattn.launch.attempt_end import AttemptEnd
from distattn.launch.attempts import Attempts
from distattn.launch.command_line import say
from distattn.training.run_folder import RunFolder

_STOPPED = RunStopped.exit_code


class Nodes(Protocol):
    """Where attempts run. Hosts are names that people know."""

    def choose(self) -> list[str] | None:
        """The hosts of the next attempt, in the order of their ranks; None where too few are left, or the run is to stop."""

    def run(self, hosts: Sequence[str], attempt: int) -> AttemptEnd:
        """Run one `distattn.launch.run_node` on each host, until all have ended."""

    def finish(self, hosts: Sequence[str]) -> int:
        """Write the report of the run, on one of the hosts. Returns the exit code."""

    def blame(self, hosts: Sequence[str], end: AttemptEnd) -> None:
        """Take note of hosts that failed: some are left out of the attempts that follow."""

    def give_back(self) -> str:
        """Why the run is to stop, to go on elsewhere later: a sentence without its period; empty where it goes on here."""

    def shortage(self) -> str:
        """Why `choose` has found too few hosts: a sentence without its period."""


class Outcome(NamedTuple):
    """How a run's attempts end. again: whether who has stopped them wants them to go on later."""

    code: int
    again: bool = False


class NodeAttempts:
    """Runs attempts until the run has ended, can go on elsewhere only, or not at all. facts: noted of every attempt, as they are
    when it begins."""

    def __init__(self, run: RunFolder, nodes: Nodes, max_restarts: int, facts: Mapping[str, Any]):
        self._run, self._nodes, self._max_restarts, self._facts = run, nodes, max_restarts, facts
        self._attempts = Attempts(run.attempts)
        # the signal that asks this process to stop
        self._signal = ""

    def stop(self, number: int, frame: FrameType | None = None) -> None:
        """Have the ranks save and end: a handler of signals."""
        self._signal = signal.Signals(number).name
        try:
            self._run.ask_to_stop(self._signal)
        except OSError as error:
            say(f"the ranks cannot be asked to stop: {error}; the run goes on from its newest checkpoint.")

    def run(self) -> Outcome:
        """Run attempt after attempt. Raises DistattnError where the run's folder is not in its place before one."""
        with HeldFolder(self._run.folder) as held:
            return self._run_attempts(held)

    def _run_attempts(self, held: HeldFolder) -> Outcome:
        self._attempts.end_open("ended with its job, before anybody could tell why")
        self._run.forget_requests()
        if self._signal:
            # it came before there was anything to stop
            self._run.ask_to_stop(self._signal)
        restarts, start, first, started = 0, self._progress(), True, False
        furthest = start
        while (hosts := self._nodes.choose()) is not None:
            # that would make half a folder anew
            held.check()
            number = self._attempts.begin(**self._facts, hosts=hosts)
            end = self._nodes.run(hosts, number)
            asked = self._asked()
            if end.code == 0:
                self._attempts.end(number, 0, "ended well")
                code = self._nodes.finish(hosts)
                # where the signal has ended the report, too, all that is left to do later is to write it
                return Outcome(code, again=code != 0 and self._asked().startswith("SIG"))
            if end.code == _STOPPED and end.next_nodes and not asked:
                self._attempts.end(number, _STOPPED, f"saved, to go on with {end.next_nodes} nodes")
                continue
            if end.code == _STOPPED:
                self._attempts.end(number, _STOPPED, f"stopped, asked by {asked or 'a file in the run folder'}")
                return Outcome(_STOPPED, again=asked.startswith("SIG"))
            told = self._attempts.told(number)
            why, blamed = end.cause(hosts, told)
            self._attempts.end(number, end.code, why, blamed=blamed)
            if end.unstarted and started:
                # what is asked for is right, since ranks have been started before: the scheduler has lost track of the nodes
                say(f"{why}.")
                return Outcome(_STOPPED, again=not asked or asked.startswith("SIG"))
            started = started or not end.unstarted
            # before the first step of a later attempt ranks may refuse what the one before has left: memory, locks, files
            left_over = not first and bool(told) and not any(facts.get("steps", 1) for facts in told.values())
            first = False
            if end.is_final() and not left_over:
                say(f"{why}; the other ranks were stopped.")
                return Outcome(end.code)
            now = self._progress()
            restarts, furthest = (1, now) if now > furthest else (restarts + 1, furthest)
            if asked or restarts > self._max_restarts:
                say(f"{why}; {'the run was to stop' if asked else f'{restarts} attempts came no further'}.")
                return Outcome(end.code, again=asked.startswith("SIG"))
            if not end.is_final():
                self._nodes.blame(blamed, end)
            # without progress in between, other nodes would most likely fail, too
            if now > start and (back := self._nodes.give_back()):
                say(f"{why}; {back}.")
                return Outcome(_STOPPED, again=True)
            say(f"{why}; all ranks start again from step {now:,} (restart {restarts} of {self._max_restarts}).")
        asked = self._asked()
        say(f"stopped between attempts, asked by {asked}." if asked else f"{self._nodes.shortage()}.")
        return Outcome(_STOPPED, again=not asked or asked.startswith("SIG"))

    def _asked(self) -> str:
        """Who asked the ranks to stop, empty where nobody has. Nodes are told by Slurm, too, and write the signal's name."""
        try:
            return self._signal or self._run.stop_file.read_text("utf-8").strip()
        except FileNotFoundError:
            return ""

    def _progress(self) -> int:
        return preferred_step(self._run.checkpoints)
