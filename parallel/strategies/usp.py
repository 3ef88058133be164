"""USP: Ulysses in one direction of a 2-D mesh of ranks, a ring in the other.

Fang & Zhao 2024, arXiv 2405.07719. A rank collects the tokens of its Ulysses group for its share of the query heads;
those keys and values then go round the ranks that have the same share in the other groups.
"""

from __future__ import annotations

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import as_int64
from distattn.ir.plan import MOVE_COLUMNS, TASK_COLUMNS, Call, Payload, Table, concat_rows, make_columns
from distattn.parallel.tables.partition import chunks_of_groups, split_by_owners, split_heads
from distattn.parallel.tables.routes import reduce_direct, remote_users, send_along_ring, send_direct

_INNER = ("ulysses", "ring")


def usp(
    call: Call, cluster: AnyCluster | None = None, *, ulysses: int | None = None, inner: str = "ulysses"
) -> list[Table]:
    """Tasks and moves of one pass: collect at step 0, compute what came d groups far at step 1 + d, outputs straight home.

    ulysses: ranks in an Ulysses group, by default the most that copy no key/value head (and fit in a node, where the
    cluster is known). inner: which of the two has neighbouring ranks (0, 1, 2, ...) in one group.
    """
    if inner not in _INNER:
        raise DistattnError(f"the inner dimension of usp is one of {', '.join(_INNER)}, not {inner!r}.")
    share = _default_share(call, cluster) if ulysses is None else int(as_int64(ulysses, "ulysses"))
    if share < 1 or call.ranks % share or share > call.heads:
        fitting = [u for u in range(1, call.heads + 1) if call.ranks % u == 0]
        raise DistattnError(
            f"usp cannot split {call.heads} query heads and {call.ranks} ranks {share}-fold; ulysses = "
            f"{', '.join(map(str, fitting))} would work."
        )
    groups = call.ranks // share
    ranks = np.arange(call.ranks)
    # lane: the ranks that have the same share of the heads
    group, lane = (ranks // share, ranks % share) if inner == "ulysses" else (ranks % groups, ranks // groups)
    whole, query_group, key_group = split_by_owners(call, chunks_of_groups(call, group))
    area, row, part = split_heads(whole, share, call.heads)
    at, origin = query_group[row], key_group[row]
    rank = at * share + part if inner == "ulysses" else part * groups + at
    tasks = make_columns(TASK_COLUMNS, step=1 + (at - origin) % groups, rank=rank, **vars(area))
    moves = [
        send_direct(Payload.Q, remote_users(call, Payload.Q, tasks), 0),
        send_along_ring(Payload.KV, remote_users(call, Payload.KV, tasks), lane),
        reduce_direct(Payload.O, remote_users(call, Payload.O, tasks, latest=True)),
    ]
    return [Table(tasks, concat_rows(MOVE_COLUMNS, moves))]


def _default_share(call: Call, cluster: AnyCluster | None) -> int:
    most = min(call.kv_heads, call.ranks if cluster is None else cluster.devices)
    return max(u for u in range(1, most + 1) if call.ranks % u == 0)
