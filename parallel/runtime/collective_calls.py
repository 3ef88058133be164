"""Which ranks have come to a collective call: noted in the job's store, and looked up only where the call fails."""

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
# how often this rank has called, by group
_CALLS: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()
# seconds that the store may take to answer, and that others may come later: a broken connection is noticed at once
_ANSWER, _LATER = 5.0, 10.0


def run_collective(group: dist.ProcessGroup, what: str, work: Callable[[], Result]) -> Result:
    """What `work`, a collective call of a group, returns. Raises LostRankError, with the ranks that did not come, where it fails.

    what: the call, for the error; all ranks of the group make it equally often. Ranks are those of the default group.
    """
    calls = _CALLS.setdefault(group, Counter())
    calls[what] += 1
    name = f"distattn/{what}/{group.group_name}"
    # only whoever fails needs it, and some stores have no process behind them
    with contextlib.suppress(RuntimeError):
        dist.PrefixStore(name, default_store()).set(str(dist.get_rank()), str(calls[what]))
    try:
        return work()
    except torch.OutOfMemoryError:
        # this rank's own trouble
        raise
    except RuntimeError as error:
        raise _missing(name, dist.get_process_group_ranks(group), calls[what], what, error) from None


def default_store() -> dist.Store:
    """The store of the default process group, which PyTorch offers under a private name only."""
    return dist.distributed_c10d._get_default_store()


def ask_store(work: Callable[[], Result], seconds: float) -> Result | None:
    """What `work` returns; None where the store does not answer in time. PyTorch's own calls would wait for it for ever."""
    found: list[Result] = []

    def attempt() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(work())

    thread = threading.Thread(target=attempt, daemon=True, name="distattn-store")
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _missing(name: str, members: list[int], number: int, what: str, error: RuntimeError) -> LostRankError:
    def look_up() -> list[int]:
        # a connection of its own: others may block theirs
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
        return LostRankError(f"all ranks came to {what}, but it failed: {reason}.")
    text = f"{named_ranks(absent)} did not come to {what}: killed, stopped or elsewhere ({reason})."
    return LostRankError(text, absent)
