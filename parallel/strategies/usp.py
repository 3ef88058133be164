"""USP: Ulysses along one dimension of a 2-D mesh of ranks, and a ring along the other.

Fang & Zhao 2024, arXiv 2405.07719. A rank collects its Ulysses group's tokens for its own share of the query heads. The keys and
values then travel around the ranks that have the same share in the other groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import as_int64
from distattn.ir.plan import MOVE_COLUMNS, TASK_COLUMNS, Call, Payload, Table, concat_rows, make_columns
from distattn.parallel.tables.partition import chunks_of_groups, split_by_owners, split_heads
from distattn.parallel.tables.rings import hops_in_rings
from distattn.parallel.tables.routes import reduce_direct, remote_users, send_along_ring, send_direct

_DIMS = ("ulysses", "ring")


@dataclass(frozen=True)
class UspOptions:
    """Options of "usp".

    ulysses: the number of ranks in a Ulysses group. The default is the largest number that duplicates no KV head and, if a
    cluster is given, fits in a node. inner_dim: the dimension, "ulysses" or "ring", whose groups consist of neighbouring
    ranks (0, 1, 2, ...).
    """

    ulysses: int | None = None
    inner_dim: str = "ulysses"

    def __post_init__(self) -> None:
        if self.inner_dim not in _DIMS:
            raise DistattnError(f"inner_dim of usp must be one of {', '.join(_DIMS)}, not {self.inner_dim!r}.")
        if self.ulysses is not None:
            as_int64(self.ulysses, "ulysses")


def usp(call: Call, cluster: AnyCluster | None = None, options: UspOptions = UspOptions()) -> list[Table]:
    """Return one candidate table. Step 0 collects tokens, step 1 + d uses keys from d groups away, and outputs return to
    their owners."""
    degree = _default_degree(call, cluster) if options.ulysses is None else options.ulysses
    if degree < 1 or call.ranks % degree or degree > call.heads:
        fitting = [u for u in range(1, call.heads + 1) if call.ranks % u == 0]
        raise DistattnError(
            f"usp cannot split {call.heads} query heads and {call.ranks} ranks {degree}-fold; ulysses = "
            f"{', '.join(map(str, fitting))} would work."
        )
    groups, ranks = call.ranks // degree, np.arange(call.ranks)
    # each rank's Ulysses group, and its ring: the ranks with the same share of the heads
    neighbours = options.inner_dim == "ulysses"
    group, ring = (ranks // degree, ranks % degree) if neighbours else (ranks % groups, ranks // groups)
    whole, query_group, key_group = split_by_owners(call, chunks_of_groups(call, group))
    area, row, share = split_heads(whole, degree, call.heads)
    query_group_of_row, origin = query_group[row], key_group[row]
    rank = query_group_of_row * degree + share if neighbours else share * groups + query_group_of_row
    tasks = make_columns(
        TASK_COLUMNS, step=1 + hops_in_rings(origin, query_group_of_row, groups), rank=rank, **vars(area)
    )
    moves = [
        send_direct(Payload.Q, remote_users(call, Payload.Q, tasks), 0),
        send_along_ring(Payload.KV, remote_users(call, Payload.KV, tasks), ring),
        reduce_direct(Payload.O, remote_users(call, Payload.O, tasks, latest=True)),
    ]
    return [Table(tasks, concat_rows(MOVE_COLUMNS, moves))]


def usp_backward(call: Call, cluster: AnyCluster | None, options: UspOptions) -> str:
    """Return the default backward policy: that of "ulysses" if one Ulysses group has all ranks, otherwise that of "ring"."""
    degree = _default_degree(call, cluster) if options.ulysses is None else options.ulysses
    return "keep" if degree == call.ranks else "refetch-follow"


def _default_degree(call: Call, cluster: AnyCluster | None) -> int:
    limit = min(call.kv_heads, call.ranks if cluster is None else cluster.devices)
    return max(u for u in range(1, limit + 1) if call.ranks % u == 0)
