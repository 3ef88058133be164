"""Messages between the ranks that save or load a checkpoint: rank 0 receives all results, decides, and answers each rank.

They have their own connections, so that a thread can exchange them while the trainer communicates. If a rank fails, all ranks
raise its error. If a rank exits, the others raise an error, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from distattn.checkpoints.rank_sockets import RankConnection, connect_to_root
from distattn.ir.errors import DamagedDataError, DistattnError, LostRankError
from distattn.supervision.heartbeats import thread_activity

# how many seconds longer than the others a rank may take to write its part; a rank that has exited is noticed immediately
_SLOWEST_SECONDS = 1800.0
Result = TypeVar("Result")


class RankFailure(Exception):
    """A failure on one rank, raised on all ranks. kind: "files" (OSError), "damaged", "refused", "lost" or "error"."""

    def __init__(self, kind: str, rank: int, text: str):
        super().__init__(kind, rank, text)
        self.kind, self.rank, self.text = kind, rank, text

    @classmethod
    def of(cls, error: Exception, rank: int) -> RankFailure:
        """Return the failure that describes an error on this rank."""
        if isinstance(error, RankFailure):
            return error
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            return cls("files", rank, f"{where}{error.strerror or error}")
        if isinstance(error, LostRankError):
            return cls("lost", rank, str(error))
        if isinstance(error, DistattnError):
            return cls("damaged" if isinstance(error, DamagedDataError) else "refused", rank, str(error))
        return cls("error", rank, f"{type(error).__name__}: {error}")

    def raised(self) -> DistattnError:
        """Return the DistattnError that tells the user about this failure."""
        kinds = {"lost": LostRankError, "damaged": DamagedDataError}
        where = "" if self.kind in ("lost", "damaged", "refused") else f"rank {self.rank}: "
        return kinds.get(self.kind, DistattnError)(where + self.text)


class _Answer(NamedTuple):
    value: Any
    failure: RankFailure | None


class RankExchange:
    """A channel between a group's ranks, or for a single process. For one thread at a time. Creating it is collective."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self._members = [0] if group is None else dist.get_process_group_ranks(group)
        self._connections: dict[int, RankConnection] = {}
        if group is not None and self.ranks > 1:
            self._connections = connect_to_root(group)

    def decide(self, work: Callable[[], Result], decision: Callable[[list[Result]], Sequence[Any]]) -> Any:
        """Run `work` on every rank and `decision` on rank 0. Return this rank's answer. Collective.

        `decision` gets all ranks' results, in order, and returns an answer for each rank. If `work` or `decision` raises, all
        ranks raise the same RankFailure. If a rank has exited, the failure's kind is "lost", and no further exchange is possible.
        """
        outcome: Any
        try:
            outcome = _Answer(work(), None)
        except Exception as error:
            outcome = _Answer(None, RankFailure.of(error, self.rank))
        if self.ranks > 1 and not self._connections:
            raise RankFailure(
                "lost", self.rank, "another rank ended during an earlier checkpoint; start the job again."
            )
        if self.rank:
            answer = self._ask(outcome)
        else:
            answer = self._answer_all(outcome, decision)
        if answer.failure is not None:
            if answer.failure.kind == "lost":
                self.close()
            raise answer.failure
        return answer.value

    def close(self) -> None:
        """Close the connections. Ranks that are waiting for this rank notice it."""
        for connection in self._connections.values():
            connection.close()
        self._connections = {}

    def _ask(self, outcome: _Answer) -> _Answer:
        try:
            self._connections[0].send(outcome)
            answer = self._receive(0)
            assert isinstance(answer, _Answer)
            return answer
        except (EOFError, OSError) as error:
            return _lost(0, error)

    def _answer_all(self, own_outcome: _Answer, decision: Callable[[list[Any]], Sequence[Any]]) -> _Answer:
        outcomes = [own_outcome]
        for rank in range(1, self.ranks):
            try:
                outcomes.append(self._receive(rank))
            except (EOFError, OSError) as error:
                outcomes.append(_lost(rank, error))
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        # report a lost rank first, since nothing can be retried after it
        lost = (failure for failure in failures if failure.kind == "lost")
        failure = next(lost, failures[0] if failures else None)
        answers: Sequence[Any] = [None] * self.ranks
        if failure is None:
            try:
                answers = decision([outcome.value for outcome in outcomes])
            except Exception as error:
                failure = RankFailure.of(error, 0)
        for rank in range(1, self.ranks):
            try:
                self._connections[rank].send(_Answer(answers[rank], failure))
            except OSError:
                # continue without the lost rank: it may have exited after doing its part, and the next exchange raises an
                # error anyway
                continue
        return _Answer(answers[0], failure)

    def _receive(self, rank: int) -> Any:
        with thread_activity(f"the part of a checkpoint from rank {rank}", waits=True, peers=(self._members[rank],)):
            if not self._connections[rank].poll(_SLOWEST_SECONDS):
                raise TimeoutError(f"no answer for {_SLOWEST_SECONDS / 60:.0f} minutes")
            return self._connections[rank].recv()


def _lost(rank: int, error: Exception) -> _Answer:
    why = f" ({error})" if str(error) else ""
    return _Answer(None, RankFailure("lost", rank, f"rank {rank} of the group ended during a checkpoint{why}."))
