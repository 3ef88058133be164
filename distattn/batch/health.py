"""Which rank has stopped answering: said once something has failed, by asking every rank for a sign of life.

A broken connection or a time-out names a neighbour at best, and when one rank is lost the others break off one after
another. So every rank has a thread that looks once in a while for a question in the job's store, and answers it with how far
the rank has come. A rank that waits in vain asks, and names the ranks that do not answer (killed, stopped, unreachable), or
else those that have not come as far as itself (still in their own code). The first verdict is everybody's verdict.

Nothing is written to the store while all is well.
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
from distattn.parallel.runtime.collective_calls import ask_store, default_store

Result = TypeVar("Result")
# seconds between two looks for a question
_POLL = 0.5
# of the time-out, the share that is left for asking and answering; at most and at least so many seconds
_ASKING_SHARE, _MOST_ASKING, _LEAST_ASKING = 0.25, 15.0, 2.0


class Verdict(NamedTuple):
    """Why the ranks have given up. text: for people. peers: the ranks to blame; empty where they are unknown."""

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
    """Signs of life of some ranks of the job (numbered as in the default group). name: the same on all, and nobody else's.

    Waits of this process last `wait_timeout`, so that with the asking that follows they end within `timeout`.
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

    def enter(self, what: str) -> None:
        """This rank begins something that all ranks do together and equally often."""
        self._begun[what] += 1

    def guarded(self, work: Callable[[], Result], what: str, members: Sequence[int]) -> Result:
        """What `work` returns. Raises LostRankError, which names the rank that is to blame, where communication fails.

        members: the ranks that take part.
        """
        try:
            return work()
        except torch.OutOfMemoryError:
            # this rank's own trouble, and no message's
            raise
        except (RuntimeError, TimeoutError, LostRankError) as error:
            raise self._explained(error, what, members) from None

    def _explained(self, error: Exception, what: str, members: Sequence[int]) -> LostRankError:
        """The verdict: who is missing. Asks all ranks, and waits a while for their answers, unless it is known already."""
        with self._lock:
            if self._verdict is None:
                found = self._with_store(lambda: self._ask(error, what, members))
                self._verdict = (
                    found
                    or self._verdict
                    or Verdict(
                        "the process that holds the job's store (rank 0, or the launcher) stopped answering: "
                        f"{_first_line(error)}."
                    )
                )
            return self._verdict.error()

    def _with_store(self, work: Callable[[], Result]) -> Result | None:
        return ask_store(work, self.asking + 8 * _POLL)

    def check_alive(self, rank: int, what: str) -> None:
        """Ask whether a rank that has been silent for long still lives. Raises LostRankError where one does not."""
        error = TimeoutError(f"nothing came of rank {rank} within {self.wait_timeout.total_seconds():.0f} s")
        with self._lock:
            if self._verdict is None and self._with_store(lambda: rank in self._answers()):
                return
        raise self._explained(error, what, [rank])

    @property
    def verdict(self) -> Verdict | None:
        """Why the ranks have given up, once one of them has."""
        return self._verdict

    def raise_verdict(self) -> None:
        """Raise LostRankError where the ranks have given up."""
        if self._verdict is not None:
            raise self._verdict.error()

    def report(self, reason: str) -> None:
        """Tell the others that this rank leaves, and why; the first one to leave is who they name."""
        self._with_store(lambda: self._judge(Verdict(f"rank {self.rank} has left: {reason}", (self.rank,))))

    def close(self) -> None:
        """End the thread. Later questions of others are not answered."""
        if self._verdict is None and not self._closed.is_set():
            self._with_store(lambda: self._store.set(f"closed/{self.rank}", "1"))
        self._closed.set()
        self._thread.join(timeout=2 * _POLL)

    def _open_store(self) -> dist.Store:
        # a connection of its own: others may block theirs
        return dist.PrefixStore(f"distattn/health/{self._name}", default_store().clone())  # type: ignore[attr-defined]

    def _answer(self, store: dist.Store) -> None:
        """The thread: answers questions, and remembers the verdict so that it survives the process that holds the store."""
        answered = 0
        try:
            while not self._closed.wait(_POLL):
                if store.check(["questions"]):
                    asked = store.add("questions", 0)
                    if asked > answered:
                        store.set(f"answer/{self.rank}", json.dumps({"question": asked, "begun": dict(self._begun)}))
                        answered = asked
                if self._verdict is None and store.check(["verdict"]):
                    self._verdict = Verdict.from_json(store.get("verdict"))
                    store.set(f"seen/{self.rank}", "1")
        except RuntimeError:
            # the store has gone with its process: whoever waits finds that out itself
            return

    def _ask(self, error: Exception, what: str, members: Sequence[int]) -> Verdict:
        if self._store.check(["verdict"]):
            return Verdict.from_json(self._store.get("verdict"))
        return self._judge(self._named(self._answers(), error, what, members))

    def _answers(self) -> dict[int, Any]:
        """Ask all ranks, and wait a while for their answers: of each rank that lives, how often it has begun what."""
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

    def _named(self, answers: dict[int, Any], error: Exception, what: str, members: Sequence[int]) -> Verdict:
        silent = [rank for rank in self.ranks if rank not in answers]
        closed = [rank for rank in silent if self._store.check([f"closed/{rank}"])]
        gone = [rank for rank in silent if rank not in closed]
        if gone:
            text = f"{named_ranks(gone)} stopped answering: killed, stopped or unreachable ({_first_line(error)})"
            return Verdict(text, tuple(gone))
        if closed:
            text = f"{named_ranks(closed)} closed its ContextParallel while others still need it."
            return Verdict(text, tuple(closed))
        # those furthest behind: others may wait for them in turn
        least = min(answers[rank].get(what, 0) for rank in members)
        if least < self._begun[what]:
            behind = [rank for rank in members if answers[rank].get(what, 0) == least]
            return Verdict(
                f"{named_ranks(behind)} did not come to {what} number {least + 1}: the process lives, but is elsewhere "
                "(in its data loader or training loop, or it has left the loop).",
                tuple(behind),
            )
        text = f"all ranks live, but {what} failed on rank {self.rank}: {_first_line(error)}"
        return Verdict(text, (self.rank,))

    def _judge(self, verdict: Verdict) -> Verdict:
        """Make this the verdict unless there is one; returns the verdict, once the others know it."""
        first = Verdict.from_json(self._store.compare_set("verdict", "", json.dumps(verdict)))
        self._verdict = first
        self._store.set(f"seen/{self.rank}", "1")
        # whoever holds the store must not take it away before the others have read this
        ends = time.monotonic() + 3 * _POLL
        while time.monotonic() < ends:
            if all(self._store.check([f"seen/{rank}"]) for rank in self.ranks):
                break
            time.sleep(0.05)
        return first


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
