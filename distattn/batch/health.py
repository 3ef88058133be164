"""Find the rank that has stopped answering: after a failure, every rank is asked for a sign of life.

A broken connection or a time-out names a neighbour at best, and when one rank is lost the others disconnect one after another. So
every rank has a thread that looks regularly for a question in the job's store, and answers it with the rank's progress. A rank
that waits in vain asks, and names the ranks that do not answer (killed, stopped, unreachable), or else those with less progress
than its own (still in their own code). The first verdict is the verdict of all ranks.

Without a failure nothing is written to the store.
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

from distattn.ir.errors import LostRankError, named_ranks
from distattn.parallel.runtime.communication.collective_calls import ask_store, default_store

Result = TypeVar("Result")
# seconds between two looks for a question
_POLL = 0.5
# share of the time-out that is reserved for asking and answering; the most and the fewest seconds for it
_ASKING_SHARE, _MOST_ASKING, _LEAST_ASKING = 0.25, 15.0, 2.0


class Verdict(NamedTuple):
    """Reason why the ranks have given up. text: for users. peers: the ranks to blame; empty if they are unknown."""

    text: str
    peers: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, text: bytes) -> Verdict:
        """Read a verdict from the store."""
        sentence, peers = json.loads(text)
        return cls(sentence, tuple(peers))

    def error(self) -> LostRankError:
        """Return the error of the ranks that give up."""
        return LostRankError(self.text, self.peers)


class HealthMonitor:
    """Monitor of the signs of life of some ranks of the job (numbered as in the default group). name: unique, the same on all.

    Waits of this process last `wait_timeout`, so that they end within `timeout` together with the questions that follow.
    """

    def __init__(self, name: str, rank: int, ranks: Sequence[int], timeout: timedelta):
        self.rank, self.ranks = rank, list(ranks)
        seconds = timeout.total_seconds()
        self.asking = min(max(_ASKING_SHARE * seconds, min(_LEAST_ASKING, seconds / 2)), _MOST_ASKING)
        self.wait_timeout = timedelta(seconds=seconds - self.asking)
        # how often this rank has begun each kind of collective work
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
        """Note that this rank begins an activity that all ranks do together and equally often."""
        self._begun[activity] += 1

    def guarded(self, work: Callable[[], Result], activity: str, members: Sequence[int]) -> Result:
        """Return the result of `work`. If communication fails, raise LostRankError naming the rank that is to blame.

        members: the ranks that take part.
        """
        try:
            return work()
        except torch.OutOfMemoryError:
            # a fault of this rank, not of a message
            raise
        except (RuntimeError, TimeoutError, LostRankError) as error:
            raise self._explained(error, activity, members) from None

    def _explained(self, error: Exception, activity: str, members: Sequence[int]) -> LostRankError:
        """Return the verdict about missing ranks. Unless it is known, ask all ranks, and wait a while for their answers."""
        with self._lock:
            if self._verdict is None:
                verdict = self._with_store(lambda: self._ask(error, activity, members))
                self._verdict = (
                    verdict
                    or self._verdict
                    or Verdict(
                        "the process that holds the job's store (rank 0, or the launcher) stopped answering: "
                        f"{_first_line(error)}."
                    )
                )
            return self._verdict.error()

    def _with_store(self, work: Callable[[], Result]) -> Result | None:
        return ask_store(work, self.asking + 8 * _POLL)

    def check_alive(self, rank: int, activity: str) -> None:
        """Ask whether a rank that has been silent for long still lives. Raise LostRankError if a rank does not."""
        error = TimeoutError(f"nothing arrived from rank {rank} within {self.wait_timeout.total_seconds():.0f} s")
        with self._lock:
            if self._verdict is None and self._with_store(lambda: rank in self._answers()):
                return
        raise self._explained(error, activity, [rank])

    @property
    def verdict(self) -> Verdict | None:
        """The reason why the ranks have given up, or None."""
        return self._verdict

    def raise_verdict(self) -> None:
        """Raise LostRankError if the ranks have given up."""
        if self._verdict is not None:
            raise self._verdict.error()

    def report(self, reason: str) -> None:
        """Report to the other ranks that this rank leaves, and why; errors name the first one to leave."""
        self._with_store(lambda: self._judge(Verdict(f"rank {self.rank} has left: {reason}", (self.rank,))))

    def close(self) -> None:
        """End the thread. Later questions of others are not answered."""
        if self._verdict is None and not self._closed.is_set():
            self._with_store(lambda: self._store.set(f"closed/{self.rank}", "1"))
        self._closed.set()
        self._thread.join(timeout=2 * _POLL)

    def _open_store(self) -> dist.Store:
        # a separate connection: other threads may block theirs
        return dist.PrefixStore(f"distattn/health/{self._name}", default_store().clone())  # type: ignore[attr-defined]

    def _answer(self, store: dist.Store) -> None:
        """Answer questions, and remember the verdict so that it survives the process that holds the store. Runs in the thread."""
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
            # the store is gone with its process: threads that wait for it notice that themselves
            return

    def _ask(self, error: Exception, activity: str, members: Sequence[int]) -> Verdict:
        if self._store.check(["verdict"]):
            return Verdict.from_json(self._store.get("verdict"))
        return self._judge(self._named(self._answers(), error, activity, members))

    def _answers(self) -> dict[int, Any]:
        """Ask all ranks, and wait a while for answers: for each living rank, how often it has begun each activity."""
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
            text = f"{named_ranks(gone)} stopped answering: killed, stopped or unreachable ({_first_line(error)})"
            return Verdict(text, tuple(gone))
        if closed:
            text = f"{named_ranks(closed)} closed its ContextParallel while others still need it."
            return Verdict(text, tuple(closed))
        # the ranks with least progress: others may wait for them
        least = min(answers[rank].get(activity, 0) for rank in members)
        if least < self._begun[activity]:
            late_ranks = [rank for rank in members if answers[rank].get(activity, 0) == least]
            return Verdict(
                f"{named_ranks(late_ranks)} did not reach {activity} number {least + 1}: the process is alive, but elsewhere "
                "(in its data loader or training loop, or it has left the loop).",
                tuple(late_ranks),
            )
        text = f"all ranks are alive, but {activity} failed on rank {self.rank}: {_first_line(error)}"
        return Verdict(text, (self.rank,))

    def _judge(self, verdict: Verdict) -> Verdict:
        """Make this the verdict unless there is one; return the verdict, once the others know it."""
        first = Verdict.from_json(self._store.compare_set("verdict", "", json.dumps(verdict)))
        self._verdict = first
        self._store.set(f"seen/{self.rank}", "1")
        # the process that holds the store must not end it before the others have read this
        ends = time.monotonic() + 3 * _POLL
        while time.monotonic() < ends:
            if all(self._store.check([f"seen/{rank}"]) for rank in self.ranks):
                break
            time.sleep(0.05)
        return first


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
