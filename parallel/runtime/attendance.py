"""Which ranks have come to a collective call: noted in the job's store, and looked up only where the call fails."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from distattn.ir.errors import LostRankError

Result = TypeVar("Result")
# how often this rank has called, by group
_CALLS: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()


def attended(group: dist.ProcessGroup, what: str, work: Callable[[], Result]) -> Result:
    """What `work`, a collective call of a group, returns. Raises LostRankError, with the ranks that did not come, where it fails.

    what: the call, for the error; all ranks of the group make it equally often. Ranks are those of the default group.
    """
    calls = _CALLS.setdefault(group, Counter())
    calls[what] += 1
    store = dist.PrefixStore(f"distattn/{what}/{group.group_name}", dist.distributed_c10d._get_default_store())
    members = dist.get_process_group_ranks(group)
    try:
        store.set(str(dist.get_rank()), str(calls[what]))
        return work()
    except RuntimeError as error:
        raise LostRankError(_missing(store, members, calls[what], what, error)) from None


def _missing(store: dist.Store, members: list[int], number: int, what: str, error: RuntimeError) -> str:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    try:
        absent = [
            rank for rank in members if not store.check([str(rank)]) or int(store.get(str(rank)).decode()) < number
        ]
    except RuntimeError:
        return f"the process that holds the job's store (rank 0, or the launcher) stopped answering: {reason}."
    if not absent:
        return f"all ranks came to {what}, but it failed: {reason}."
    who = ("rank " if len(absent) == 1 else "ranks ") + ", ".join(map(str, absent))
    return f"{who} did not come to {what}: killed, stopped or elsewhere ({reason})."
