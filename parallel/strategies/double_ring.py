"""Double ring: keys and values go round inside a node while the next node's are on their way.

Gu et al. 2024, LoongTrain, arXiv 2406.18485, section 4.4. The inner ring has one node's ranks, the outer ring the nodes.
Where inner rings are whole nodes, a token crosses into a node at most once, one outer hop ahead of its use there.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import as_int64
from distattn.ir.plan import TASK_COLUMNS, Call, Payload, Table, make_columns
from distattn.parallel.tables.partition import split_by_owners
from distattn.parallel.tables.routes import remote_users, send_along_double_ring


def double_ring(call: Call, cluster: AnyCluster | None = None, *, inner: int | None = None) -> list[Table]:
    """Tasks and moves of one pass: what is o nodes and i seats away is used in step o * inner + i.

    inner: ranks in an inner ring, by default those of a node, or the largest divisor of the ranks not above their root.
    """
    if inner is None:
        inner = _near_root(call.ranks) if cluster is None else cluster.devices
    if int(as_int64(inner, "inner")) < 1 or call.ranks % inner:
        raise DistattnError(f"an inner ring of {inner} does not divide {call.ranks} ranks.")
    area, query_owner, key_owner = split_by_owners(call)
    node = np.arange(call.ranks) // inner
    outer = (node[query_owner] - node[key_owner]) % (call.ranks // inner)
    hop = (query_owner - key_owner) % inner
    tasks = make_columns(TASK_COLUMNS, step=outer * inner + hop, rank=query_owner, **vars(area))
    return [Table(tasks, send_along_double_ring(Payload.KV, remote_users(call, Payload.KV, tasks), node, inner))]


def _near_root(ranks: int) -> int:
    return max(divisor for divisor in range(1, isqrt(ranks) + 1) if ranks % divisor == 0)
