"""Double ring: keys and values circulate within a node while those of the next node are on their way.

Gu et al. 2024, LoongTrain, arXiv 2406.18485, section 4.4. The inner ring connects the ranks of a node, the outer ring the
nodes. If every inner ring is an entire node, a token enters a node at most once, one outer hop before it is used there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import as_int64
from distattn.ir.plan import TASK_COLUMNS, Call, Payload, Table, make_columns
from distattn.parallel.tables.partition import split_by_owners
from distattn.parallel.tables.rings import connected_members, hops_in_rings
from distattn.parallel.tables.routes import remote_users, send_along_double_ring


@dataclass(frozen=True)
class DoubleRingOptions:
    """Options of "double_ring".

    inner_ring_size: the number of ranks in an inner ring. The default is the number of ranks per node, or about the square
    root of all ranks if no cluster is given.
    """

    inner_ring_size: int | None = None

    def __post_init__(self) -> None:
        size = self.inner_ring_size
        if size is not None and int(as_int64(size, "inner_ring_size")) < 1:
            raise DistattnError(f"inner_ring_size must be at least 1 rank, not {size}.")


def double_ring(
    call: Call, cluster: AnyCluster | None = None, options: DoubleRingOptions = DoubleRingOptions()
) -> list[Table]:
    """Return one candidate table: tokens from o outer and i inner hops away are used in step o * inner_ring_size + i."""
    size = options.inner_ring_size
    if size is None:
        size = _near_root(call.ranks) if cluster is None else cluster.devices
    if call.ranks % size:
        raise DistattnError(f"an inner ring of {size} does not divide {call.ranks} ranks.")
    area, query_owner, key_owner = split_by_owners(call)
    node = np.arange(call.ranks) // size
    key_node, query_node = node[key_owner], node[query_owner]
    outer_hops = hops_in_rings(key_node, query_node, call.ranks // size)
    # nodes that exchange tokens use the same order of inner hops, which are counted by position within a node
    place = connected_members(key_node, query_node, call.ranks // size)[query_node] * size
    inner_hops = hops_in_rings(place + key_owner % size, place + query_owner % size, call.ranks)
    tasks = make_columns(TASK_COLUMNS, step=outer_hops * size + inner_hops, rank=query_owner, **vars(area))
    users = remote_users(call, Payload.KV, tasks)
    return [Table(tasks, send_along_double_ring(Payload.KV, users, node, size))]


def _near_root(ranks: int) -> int:
    """Return the largest divisor of `ranks` that is at most its square root."""
    return max(divisor for divisor in range(1, isqrt(ranks) + 1) if ranks % divisor == 0)
