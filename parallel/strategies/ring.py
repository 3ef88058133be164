"""Ring attention: tokens travel round the ranks, one neighbour a step, and are used where they pass.

Liu, Zaharia, Abbeel 2023, arXiv 2310.01889. Either keys and values travel and queries stay, or queries travel (and
their outputs home, as in BurstAttention, Sun et al. 2024, arXiv 2403.09347): whichever moves fewer bytes, in the forward
and in the backward pass. Ranks that do not use a token are skipped. Balance comes from the layout (zigzag), not from here.
"""

from __future__ import annotations

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints
from distattn.ir.plan import MOVE_COLUMNS, TASK_COLUMNS, Call, Payload, Table, concat_rows, make_columns
from distattn.parallel.tables.partition import Rectangles, split_by_owners
from distattn.parallel.tables.routes import reduce_along_ring, remote_users, send_along_ring

_ROTATIONS = ("fewest bytes", "keys", "queries")


def ring(call: Call, cluster: AnyCluster | None = None, *, rotate: str = "fewest bytes") -> list[Table]:
    """Tasks and moves of a ring pass: what is d seats away is used in step d. One candidate per kind of rotation."""
    if rotate not in _ROTATIONS:
        raise DistattnError(f"ring rotates one of {', '.join(_ROTATIONS)}, not {rotate!r}.")
    parts = split_by_owners(call)
    candidates = {"keys": _rotate_keys, "queries": _rotate_queries}
    return [make(call, *parts) for name, make in candidates.items() if rotate in (name, "fewest bytes")]


def _rotate_keys(call: Call, area: Rectangles, query_owner: Ints, key_owner: Ints) -> Table:
    tasks = make_columns(
        TASK_COLUMNS, step=_ring_distance(call, key_owner, query_owner), rank=query_owner, **vars(area)
    )
    return Table(tasks, send_along_ring(Payload.KV, remote_users(call, Payload.KV, tasks)))


def _rotate_queries(call: Call, area: Rectangles, query_owner: Ints, key_owner: Ints) -> Table:
    tasks = make_columns(TASK_COLUMNS, step=_ring_distance(call, query_owner, key_owner), rank=key_owner, **vars(area))
    there = send_along_ring(Payload.Q, remote_users(call, Payload.Q, tasks))
    back = reduce_along_ring(Payload.O, remote_users(call, Payload.O, tasks, latest=True))
    return Table(tasks, concat_rows(MOVE_COLUMNS, [there, back]))


def _ring_distance(call: Call, origin: Ints, user: Ints) -> Ints:
    """Hops from origin to user, ranks without tokens left out."""
    members = np.unique(call.layout.chunks["rank"])
    seat = np.full(call.ranks, -1)
    seat[members] = np.arange(len(members))
    return (seat[user] - seat[origin]) % len(members)
