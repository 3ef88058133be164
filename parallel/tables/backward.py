"""The backward table, derived from the forward one.

Same tasks. dO travels as Q did; dQ travels home as O did. For keys and values a policy decides:

    keep            what the forward received is still there: the forward transposed, time and arrows reversed
    refetch-home    Q and KV are sent again; every rank sends its dKV straight to the owner after its last deposit
    refetch-follow  Q and KV are sent again; dKV travels from its first user to its last, summing, then home
"""

from __future__ import annotations

import numpy as np

from distattn.cluster.spec import Machines
from distattn.ir.plan import MOVE_COLUMNS, Call, Columns, Payload, Table, concat, take
from distattn.parallel.tables.routes import follow, guests, straight_home

_TURNED = {Payload.Q: Payload.dQ, Payload.KV: Payload.dKV, Payload.O: Payload.dO}


def derive(call: Call, forward: Table, policy: str, cluster: Machines | None = None) -> Table:
    """The backward table of `forward` under `policy`. Given a cluster, dKV is summed inside a node before it leaves."""
    if policy == "keep":
        return _transposed(forward)
    moves = forward.moves
    there = take(moves, moves["payload"] != Payload.O)
    queries, outputs = take(moves, moves["payload"] == Payload.Q), take(moves, moves["payload"] == Payload.O)
    left = guests(call, Payload.dKV, forward.tasks, latest=True)
    send = follow if policy == "refetch-follow" else straight_home
    home = send(Payload.dKV, left, None if cluster is None else cluster.node)
    parts = [there, _renamed(queries, Payload.dO), _renamed(outputs, Payload.dQ), home]
    return Table(forward.tasks, concat(MOVE_COLUMNS, parts))


def _transposed(forward: Table) -> Table:
    last = forward.steps - 1
    tasks, moves = forward.tasks, forward.moves
    turned = np.array([_TURNED[payload] for payload in (Payload.Q, Payload.KV, Payload.O)])
    return Table(
        {**tasks, "step": last - tasks["step"]},
        {
            **moves,
            "step": last - moves["step"],
            "src": moves["dst"],
            "dst": moves["src"],
            "payload": turned[moves["payload"]],
        },
    )


def _renamed(moves: Columns, payload: Payload) -> Columns:
    return {**moves, "payload": np.full_like(moves["payload"], int(payload))}
