"""Derive the backward table from the forward table.

The tasks are the same. In attention, dO travels as Q did, and dQ returns as O did. In a recurrence, queries may have fewer
heads than outputs, and several ranks may add to one dQ, so dO goes directly to its users, and dQ is summed like dKV. The policy
decides what happens to keys and values:

    keep            tensors received in the forward pass are kept; the table is the forward table with time and moves reversed
    refetch-home    Q and KV are sent again; every rank sends its dKV directly to the owner after its last task
    refetch-follow  Q and KV are sent again; dKV travels from its first user to its last, summed on the way, then to its owner
"""

from __future__ import annotations

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.plan import MOVE_COLUMNS, Call, Columns, Payload, Table, concat_rows, select_rows
from distattn.parallel.tables.routes import reduce_along_ring, reduce_direct, remote_users, send_direct

_TRANSPOSED = {Payload.Q: Payload.dQ, Payload.KV: Payload.dKV, Payload.O: Payload.dO}


def derive_backward(call: Call, forward: Table, policy: str, cluster: AnyCluster | None = None) -> Table:
    """Derive the backward table of `forward` under `policy`. Given a cluster, sum dKV within a node before it leaves the node."""
    if policy == "keep":
        return _transpose(forward)
    tasks, moves = forward.tasks, forward.moves
    inputs = select_rows(moves, moves["payload"] != Payload.O)

    def reduced(payload: Payload) -> Columns:
        reduce = reduce_along_ring if policy == "refetch-follow" else reduce_direct
        users = remote_users(call, payload, tasks, latest=True)
        return reduce(payload, users, None if cluster is None else cluster.node)

    if call.op.is_recurrent:
        users = remote_users(call, Payload.dO, tasks)
        gradients = [send_direct(Payload.dO, users, users["step"] - 1), reduced(Payload.dQ)]
    else:
        queries, outputs = (select_rows(moves, moves["payload"] == payload) for payload in (Payload.Q, Payload.O))
        gradients = [_with_payload(queries, Payload.dO), _with_payload(outputs, Payload.dQ)]
    return Table(tasks, concat_rows(MOVE_COLUMNS, [inputs, *gradients, reduced(Payload.dKV)]))


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
