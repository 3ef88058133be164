"""Yardsticks for the bytes that a plan moves: the fewest possible for its tasks, and those that a plain ring moves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.plan import (
    MOVE_COLUMNS,
    REDUCED_PAYLOADS,
    STATE_PAYLOADS,
    Call,
    Payload,
    Plan,
    concat_rows,
    move_bytes,
    select_rows,
)
from distattn.parallel.tables.routes import differs_from_previous, remote_users


class Traffic(NamedTuple):
    """The bytes that one attention call moves, forward plus backward: in total, and between nodes."""

    total_bytes: int
    inter_node_bytes: int


def plan_traffic(plan: Plan, cluster: AnyCluster) -> Traffic:
    """Return the bytes that a plan moves."""
    moves = concat_rows(MOVE_COLUMNS, [plan.forward.moves, plan.backward.moves])
    size = move_bytes(plan.call, moves)
    node = cluster.node
    return Traffic(int(size.sum()), int(size[node[moves["src"]] != node[moves["dst"]]].sum()))


def lower_bound(plan: Plan, cluster: AnyCluster) -> Traffic:
    """Return the fewest bytes that any plan with the same tasks on the same ranks, and the same policy, can move.

    Every rank that uses a token it does not own receives it at least once, and the token enters that rank's node at least
    once, unless the owner is in the same node. Every partial result leaves its rank, and its node, at least once.
    """
    total = inter_node = 0
    for direction, table in (("forward", plan.forward), ("backward", plan.backward)):
        moved_states = np.isin(table.moves["payload"], STATE_PAYLOADS)
        if moved_states.any():
            # the plan decides how states are combined, so count all of its moves of states
            states = select_rows(table.moves, moved_states)
            size = move_bytes(plan.call, states)
            total += int(size.sum())
            inter_node += int(size[cluster.node[states["src"]] != cluster.node[states["dst"]]].sum())
        for payload in plan.call.payloads(direction):
            if payload in STATE_PAYLOADS:
                continue
            # with this policy, tokens received in the forward pass are kept, not sent again
            if table is plan.backward and plan.policy == "keep" and payload in (Payload.Q, Payload.KV):
                continue
            users = remote_users(plan.call, payload, table.tasks, latest=payload in REDUCED_PAYLOADS)
            size = (users["t1"] - users["t0"]) * (users["h1"] - users["h0"]) * plan.call.token_head_bytes(payload)
            total += int(size.sum())
            user_node, owner_node = cluster.node[users["rank"]], cluster.node[users["owner"]]
            order = np.lexsort((user_node, users["segment"]))
            entered = (
                differs_from_previous(users["segment"][order], user_node[order]) & (user_node != owner_node)[order]
            )
            inter_node += int(size[order][entered].sum())
    return Traffic(total, inter_node)


def plain_ring_traffic(call: Call, cluster: AnyCluster) -> Traffic:
    """Return the bytes moved by a ring that sends all keys and values to every rank that has tokens, in both passes, and dKV
    all the way around in the backward pass."""
    tokens = call.layout.shard_sizes()
    members = np.flatnonzero(tokens)
    ring_size = len(members)
    if ring_size == 1:
        return Traffic(0, 0)
    keys, grads = (call.kv_heads * call.token_head_bytes(payload) for payload in (Payload.KV, Payload.dKV))
    node = cluster.node[members]
    # edge i leads from member i to the next; keys of member i travel along all edges except the one that leads to i
    crosses = node != np.roll(node, -1)
    travelled = int(crosses.sum()) - np.roll(crosses, 1)
    total = int(tokens.sum()) * (2 * (ring_size - 1) * keys + ring_size * grads)
    return Traffic(total, int((tokens[members] * (2 * travelled * keys + int(crosses.sum()) * grads)).sum()))
