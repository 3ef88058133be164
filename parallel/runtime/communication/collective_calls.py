"""Collective calls whose errors name missing ranks. Each rank records its calls in the job's store, read after a failure."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distattn.ir.errors import LostRankError, named_ranks

Result = TypeVar("Result")
# for each group, how often this rank has made each call, keyed by name
_CALLS: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()
# after a failure: seconds to wait for the store's answer, and for ranks that may merely be late
_ANSWER, _LATER = 5.0, 10.0


def run_collective(group: dist.ProcessGroup, call: str, work: Callable[[], Result]) -> Result:
    """Run the collective `work` and return its result. If it fails, raise LostRankError naming the ranks that never joined.

    call: the name of the call, for the error; all ranks of the group must make it the same number of times. The error numbers
    ranks as in the default group.
    """
    calls = _CALLS.setdefault(group, Counter())
    calls[call] += 1
    name = f"distattn/{call}/{group.group_name}"
    # ignore errors: the record is needed only after a failure, and some stores have no live process behind them
    with contextlib.suppress(RuntimeError):
        dist.PrefixStore(name, default_store()).set(str(dist.get_rank()), str(calls[call]))
    try:
        return work()
    except torch.OutOfMemoryError:
        # the failure is this rank's own, not a peer's
        raise
    except RuntimeError as error:
        raise _missing(name, dist.get_process_group_ranks(group), calls[call], call, error) from None


def default_store() -> dist.Store:
    """Return the default process group's store, which PyTorch exposes only under a private name."""
    return dist.distributed_c10d._get_default_store()


def ask_store(work: Callable[[], Result], seconds: float) -> Result | None:
    """Return the result of `work`, or None if the store does not answer in time. PyTorch's own calls could wait forever."""
    answers: list[Result] = []

    def attempt() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(work())

    thread = threading.Thread(target=attempt, daemon=True, name="distattn-store")
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _missing(name: str, members: list[int], number: int, call: str, error: RuntimeError) -> LostRankError:
    def look_up() -> list[int]:
        # open a separate connection, since other threads may be blocked on the shared connection
        store = dist.PrefixStore(name, default_store().clone())  # type: ignore[attr-defined]
        ends, absent = time.monotonic() + _LATER, list(members)
        while absent and time.monotonic() < ends:
            keys = {rank: str(rank) for rank in absent}
            came = [rank for rank, key in keys.items() if store.check([key]) and int(store.get(key).decode()) >= number]
            absent = [rank for rank in absent if rank not in came]
            time.sleep(0.05)
        return absent

    reason = str(error).strip().partition("\n")[0].rstrip(".")
    absent = ask_store(look_up, _LATER + _ANSWER)
    if absent is None:
        text = f"the process that holds the job's store (rank 0, or the launcher) stopped answering: {reason}."
        return LostRankError(text)
    if not absent:
        return LostRankError(f"all ranks took part in {call}, but it failed: {reason}.")
    text = f"{named_ranks(absent)} did not take part in {call}: killed, stopped or busy elsewhere ({reason})."
    return LostRankError(text, absent)
