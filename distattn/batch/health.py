"""Find the rank that has stopped answering: after a failure, every rank is asked whether it is alive.

A broken connection or a time-out names a neighbour at best, and once one rank is lost, the others disconnect one after another.
Therefore each rank has a thread that regularly checks the job's store for a question, and answers with the rank's progress. A
rank whose wait fails asks such a question. It blames the ranks that do not answer (killed, stopped, unreachable), or, if all
answer, those that have made less progress (still in their own code). The first verdict is the verdict of all ranks.

Without a failure, nothing is written to the store.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from distattn.ir.errors import LostRankError, first_line, named_ranks
from distattn.parallel.runtime.communication.collective_calls import ask_store, default_store

Result = TypeVar("Result")
# seconds between checks for other ranks' questions
_POLL = 0.5
# the fraction of the timeout reserved for questions and answers, and the maximum and minimum of that time in seconds
_ASKING_SHARE, _MOST_ASKING, _LEAST_ASKING = 0.25, 15.0, 2.0


class Verdict(NamedTuple):
    """The reason why the ranks have given up. text: a message for users. peers: the ranks to blame; empty if unknown."""

    text: str
    peers: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, text: bytes) -> Verdict:
        """Parse a verdict that was read from the store."""
        sentence, peers = json.loads(text)
        return cls(sentence, tuple(peers))

    def error(self) -> LostRankError:
        """Return the error that ranks raise when they give up."""
        return LostRankError(self.text, self.peers)


class HealthMonitor:
    """A monitor that finds out which ranks of a job are alive. ranks: numbered as in the default group.

    name: unique, and equal on all ranks. Waits in this process last at most `wait_timeout`, so that a wait and the questions that
    follow it end within `timeout`.
    """

    def __init__(self, name: str, rank: int, ranks: Sequence[int], timeout: timedelta):
        self.rank, self.ranks = rank, list(ranks)
        seconds = timeout.total_seconds()
        self.asking = min(max(_ASKING_SHARE * seconds, min(_LEAST_ASKING, seconds / 2)), _MOST_ASKING)
        self.wait_timeout = timedelta(seconds=seconds - self.asking)
        # how often this rank has started each kind of collective work
        self._begun: Counter[str] = Counter()
        self._verdict: Verdict | None = None
        self._name = name
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._store = self._open_store()
        self._thread = threading.Thread(target=self._answer, args=(self._open_store(),), daemon=True)
        self._thread.name = "distattn-health"
        self._thread.start()

    def enter(self, activity: str) -> None:
        """Record that this rank starts an activity that all ranks run together and equally often."""
        self._begun[activity] += 1

    def guarded(self, work: Callable[[], Result], activity: str, members: Sequence[int]) -> Result:
        """Return the result of `work`. If communication fails, raise LostRankError naming the rank to blame.

        members: the ranks that take part.
        """
        try:
            return work()
        except torch.OutOfMemoryError:
            # running out of memory is this rank's own fault, not a failure of communication
            raise
        except (RuntimeError, TimeoutError, LostRankError) as error:
            raise self._explained(error, activity, members) from None

    def _explained(self, error: Exception, activity: str, members: Sequence[int]) -> LostRankError:
        """Return the verdict as an error. If there is no verdict yet, ask all ranks, and wait a while for their answers."""
        with self._lock:
            if self._verdict is None:
                verdict = self._with_store(lambda: self._ask(error, activity, members))
                self._verdict = (
                    verdict
                    or self._verdict
                    or Verdict(
                        "the process that holds the job's store (rank 0, or the launcher) stopped answering: "
                        f"{first_line(error)}."
                    )
                )
            return self._verdict.error()

    def _with_store(self, work: Callable[[], Result]) -> Result | None:
        return ask_store(work, self.asking + 8 * _POLL)

    def check_alive(self, rank: int, activity: str) -> None:
        """Ask a rank that has long been silent whether it is alive. Raise LostRankError if it does not answer."""
        error = TimeoutError(f"nothing arrived from rank {rank} within {self.wait_timeout.total_seconds():.0f} s")
        with self._lock:
            if self._verdict is None and self._with_store(lambda: rank in self._answers()):
                return
        raise self._explained(error, activity, [rank])

    @property
    def verdict(self) -> Verdict | None:
        """The reason why the ranks have given up; None if they have not."""
        return self._verdict

    def raise_verdict(self) -> None:
        """Raise LostRankError if the ranks have given up."""
        if self._verdict is not None:
            raise self._verdict.error()

    def report(self, reason: str) -> None:
        """Tell the other ranks that this rank is leaving, and why; their errors name the first rank that left."""
        self._with_store(lambda: self._judge(Verdict(f"rank {self.rank} has left: {reason}", (self.rank,))))

    def close(self) -> None:
        """Stop the thread. Later questions are not answered."""
        if self._verdict is None and not self._closed.is_set():
            self._with_store(lambda: self._store.set(f"closed/{self.rank}", "1"))
        self._closed.set()
        self._thread.join(timeout=2 * _POLL)

    def _open_store(self) -> dist.Store:
        # open a separate connection, because a call of another thread may block a shared one
        return dist.PrefixStore(f"distattn/health/{self._name}", default_store().clone())  # type: ignore[attr-defined]

    def _answer(self, store: dist.Store) -> None:
        """Answer questions, and copy the verdict in case the process that holds the store ends. Runs on the monitor's thread."""
        answered = 0
        try:
            while not self._closed.wait(_POLL):
                if store.check(["questions"]):
                    question = store.add("questions", 0)
                    if question > answered:
                        store.set(f"answer/{self.rank}", json.dumps({"question": question, "begun": dict(self._begun)}))
                        answered = question
                if self._verdict is None and store.check(["verdict"]):
                    self._verdict = Verdict.from_json(store.get("verdict"))
                    store.set(f"seen/{self.rank}", "1")
        except RuntimeError:
            # the process that holds the store is gone, which threads that use the store notice themselves
            return

    def _ask(self, error: Exception, activity: str, members: Sequence[int]) -> Verdict:
        if self._store.check(["verdict"]):
            return Verdict.from_json(self._store.get("verdict"))
        return self._judge(self._named(self._answers(), error, activity, members))

    def _answers(self) -> dict[int, Any]:
        """Ask all ranks, and wait a while for answers. Return how often each rank that answered has started each activity."""
        question = self._store.add("questions", 1)
        answers: dict[int, Any] = {}
        ends = time.monotonic() + self.asking
        while len(answers) < len(self.ranks) and time.monotonic() < ends:
            for rank in self.ranks:
                if rank not in answers and self._store.check([f"answer/{rank}"]):
                    answer = json.loads(self._store.get(f"answer/{rank}"))
                    if answer["question"] >= question:
                        answers[rank] = answer["begun"]
            time.sleep(0.05)
        return answers

    def _named(self, answers: dict[int, Any], error: Exception, activity: str, members: Sequence[int]) -> Verdict:
        silent = [rank for rank in self.ranks if rank not in answers]
        closed = [rank for rank in silent if self._store.check([f"closed/{rank}"])]
        gone = [rank for rank in silent if rank not in closed]
        if gone:
            text = f"{named_ranks(gone)} stopped answering: killed, stopped or unreachable ({first_line(error)})"
            return Verdict(text, tuple(gone))
        if closed:
            text = f"{named_ranks(closed)} closed its ContextParallel while others still need it."
            return Verdict(text, tuple(closed))
        # blame the ranks with the least progress, because others may be waiting for them
        least = min(answers[rank].get(activity, 0) for rank in members)
        if least < self._begun[activity]:
            late_ranks = [rank for rank in members if answers[rank].get(activity, 0) == least]
            return Verdict(
                f"{named_ranks(late_ranks)} did not reach {activity} number {least + 1}: the process is alive, but elsewhere "
                "(in its data loader or training loop, or it has left the loop).",
                tuple(late_ranks),
            )
        text = f"all ranks are alive, but {activity} failed on rank {self.rank}: {first_line(error)}"
        return Verdict(text, (self.rank,))

    def _judge(self, verdict: Verdict) -> Verdict:
        """Propose a verdict; any earlier verdict has precedence. Give the other ranks time to read it, and return it."""
        first = Verdict.from_json(self._store.compare_set("verdict", "", json.dumps(verdict)))
        self._verdict = first
        self._store.set(f"seen/{self.rank}", "1")
        # the process that holds the store must not end before the other ranks have read the verdict
        ends = time.monotonic() + 3 * _POLL
        while time.monotonic() < ends:
            if all(self._store.check([f"seen/{rank}"]) for rank in self.ranks):
                break
            time.sleep(0.05)
        return first
