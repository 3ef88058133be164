"""The backward table, derived from the forward one.

The tasks are the same. dO travels as Q did; dQ travels home as O did. For keys and values a policy decides:

    keep            what the forward received is still there: the forward transposed, time and arrows reversed
    refetch-home    Q and KV are sent again; every rank sends its dKV straight to the owner after its last deposit
    refetch-follow  Q and KV are sent again; dKV travels from its first user to its last, summing, then home
"""

from __future__ import annotations

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.plan import MOVE_COLUMNS, Call, Columns, Payload, Table, concat_rows, select_rows
from distattn.parallel.tables.routes import reduce_along_ring, reduce_direct, remote_users

_TRANSPOSED = {Payload.Q: Payload.dQ, Payload.KV: Payload.dKV, Payload.O: Payload.dO}


def derive_backward(call: Call, forward: Table, policy: str, cluster: AnyCluster | None = None) -> Table:
    """The backward table of `forward` under `policy`. Given a cluster, dKV is summed inside a node before it leaves."""
    if policy == "keep":
        return _transpose(forward)
    moves = forward.moves
    inputs = select_rows(moves, moves["payload"] != Payload.O)
    queries, outputs = (
        select_rows(moves, moves["payload"] == Payload.Q),
        select_rows(moves, moves["payload"] == Payload.O),
    )
    users = remote_users(call, Payload.dKV, forward.tasks, latest=True)
    reduce = reduce_along_ring if policy == "refetch-follow" else reduce_direct
    reduced = reduce(Payload.dKV, users, None if cluster is None else cluster.node)
    parts = [inputs, _with_payload(queries, Payload.dO), _with_payload(outputs, Payload.dQ), reduced]
    return Table(forward.tasks, concat_rows(MOVE_COLUMNS, parts))


def _transpose(forward: Table) -> Table:
    last = forward.steps - 1
    tasks, moves = forward.tasks, forward.moves
    payload = np.array([_TRANSPOSED[payload] for payload in (Payload.Q, Payload.KV, Payload.O)])
    return Table(
        {**tasks, "step": last - tasks["step"]},
        {
            **moves,
            "step": last - moves["step"],
            "src": moves["dst"],
            "dst": moves["src"],
            "payload": payload[moves["payload"]],
        },
    )


def _with_payload(moves: Columns, payload: Payload) -> Columns:
    return {**moves, "payload": np.full_like(moves["payload"], int(payload))}
