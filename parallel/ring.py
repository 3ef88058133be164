"""Ring attention: every rank keeps its queries, keys and values travel one hop a step.

Liu, Zaharia, Abbeel 2023, arXiv 2310.01889. Balance comes from the layout (zigzag), not from here. Ranks without tokens
are left out of the ring; a token travels only as far as the last rank that uses it.
"""

from __future__ import annotations

import numpy as np

from distattn.intervals import Ints, elementary, expand
from distattn.parallel.ownership import coalesce, pieces, split_by_key_owner, split_by_query_owner
from distattn.plan import MOVE_COLUMNS, TASK_COLUMNS, Call, Payload, Table, columns


def ring(call: Call) -> Table:
    """Tasks and moves of one ring pass: hop d is move step d-1, used by the tasks of step d."""
    members = np.unique(call.layout.chunks["rank"])
    seat = np.full(call.ranks, -1)
    seat[members] = np.arange(len(members))

    area, rank = split_by_query_owner(call, pieces(call))
    area, row, key_owner = split_by_key_owner(call, area)
    hops = (seat[rank[row]] - seat[key_owner]) % len(members)
    tasks = columns(TASK_COLUMNS, step=hops, rank=rank[row], **vars(area), h0=0, h1=call.heads)

    owner, t0, t1, farthest = _farthest_use(key_owner, area.k0, area.k1, hops)
    i, hop = expand(np.zeros_like(farthest), farthest)
    start = seat[owner[i]] + hop
    moves = columns(
        MOVE_COLUMNS,
        step=hop,
        src=members[start % len(members)],
        dst=members[(start + 1) % len(members)],
        payload=int(Payload.KV),
        t0=t0[i],
        t1=t1[i],
        h0=0,
        h1=call.kv_heads,
    )
    return Table(tasks, coalesce(moves))


def _farthest_use(owner: Ints, k0: Ints, k1: Ints, hops: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Stretches of tokens with the number of hops they must travel: (owner, t0, t1, hops)."""
    row, part, group, t0, t1 = elementary(owner, k0, k1)
    farthest = np.zeros(len(t0), np.int64)
    np.maximum.at(farthest, part, hops[row])
    travels = farthest > 0
    return group[travels], t0[travels], t1[travels], farthest[travels]
