"""Routes: how tokens reach the ranks that use them, and how partial results are reduced to their owners.

A strategy decides which rank computes what in which step. For each token and head, its tasks determine the *remote users*: the
ranks that use it (or add to it) without owning it. Routes visit only remote users, so they move the fewest bytes that the
assignment of tasks allows. Tokens and heads with the same users form a *segment* and travel together.
"""

from __future__ import annotations

import numpy as np

from distattn.ir.intervals import (
    Ints,
    elementary_intervals,
    expand_ranges,
    lexicographic_argsort,
    overlapping_pairs,
    sorted_unique,
)
from distattn.ir.plan import (
    MOVE_COLUMNS,
    Call,
    Columns,
    Payload,
    concat_rows,
    make_columns,
    num_rows,
    select_rows,
    task_token_ranges,
)


def remote_users(call: Call, payload: Payload, tasks: Columns, latest: bool = False) -> Columns:
    """Return the ranks that use tokens of a payload without owning them, as rows (segment, owner, rank, t0, t1, h0, h1, step).

    step: the first step in which `rank` uses the segment, or the last if `latest`. Rows are sorted by segment, step and rank.
    Segments are disjoint, and each has one owner.
    """
    chunks = call.layout.chunks
    ranges = task_token_ranges(call, payload, tasks)
    some = ranges["t0"] < ranges["t1"]
    if not some.all():
        # tasks of a recurrence that only compute a state have no results
        tasks, ranges = select_rows(tasks, some), {name: column[some] for name, column in ranges.items()}
    # cut at chunks, so that each segment has one owner
    i, j = overlapping_pairs(chunks["t0"], chunks["t1"], ranges["t0"], ranges["t1"])
    foreign = np.flatnonzero(tasks["rank"][i] != chunks["rank"][j])
    i, j = i[foreign], j[foreign]
    t0, t1 = np.maximum(ranges["t0"][i], chunks["t0"][j]), np.minimum(ranges["t1"][i], chunks["t1"][j])
    limits = sorted_unique(np.concatenate([ranges["h0"][i], ranges["h1"][i]]))
    each, head = expand_ranges(np.searchsorted(limits, ranges["h0"][i]), np.searchsorted(limits, ranges["h1"][i]))
    row, segment, head, t0, t1 = elementary_intervals(head, t0[each], t1[each])
    row = each[row]
    owner = np.zeros(len(t0), np.int64)
    owner[segment] = chunks["rank"][j[row]]
    row = i[row]
    # one row per (segment, rank): its first or last step
    step = tasks["step"][row]
    order = lexicographic_argsort(segment, tasks["rank"][row], -step if latest else step)
    segment, rank, step = segment[order], tasks["rank"][row][order], step[order]
    is_first = differs_from_previous(segment, rank)
    segment, rank, step = segment[is_first], rank[is_first], step[is_first]
    order = lexicographic_argsort(segment, step, rank)
    segment = segment[order]
    extent = {"t0": t0[segment], "t1": t1[segment], "h0": limits[head[segment]], "h1": limits[head[segment] + 1]}
    return {"segment": segment, "owner": owner[segment], "rank": rank[order], "step": step[order], **extent}


def send_direct(payload: Payload, users: Columns, step: int | Ints) -> Columns:
    """Return moves from the owner directly to every remote user."""
    return _make_moves(payload, users, users["owner"], users["rank"], step)


def send_along_ring(payload: Payload, users: Columns, ring: Ints | None = None) -> Columns:
    """Return moves from the owner to the first user, from that user to the next, and so on, each one step before the receiver
    uses the tokens.

    The users of a segment must have different steps. ring: the ring number of each rank; if given, users receive from users in
    the same ring, and the first user of each ring receives from the owner.
    """
    if ring is not None:
        users = {**users, "segment": users["segment"] * (int(ring.max()) + 1) + ring[users["rank"]]}
        users = select_rows(users, lexicographic_argsort(users["segment"], users["step"]))
    previous = np.append(-1, users["rank"][:-1])
    src = np.where(differs_from_previous(users["segment"]), users["owner"], previous)
    return _make_moves(payload, users, src, users["rank"], users["step"] - 1)


def send_along_double_ring(payload: Payload, users: Columns, node: Ints, devices: int) -> Columns:
    """Return moves from node to node, and within each node from user to user, so that a token enters each node once.

    Users o nodes away from the owner compute in steps [o * devices, (o + 1) * devices). A token enters a node one outer hop
    before it is used there.
    """
    user_node, owner_node = node[users["rank"]], node[users["owner"]]
    is_first = differs_from_previous(users["segment"])
    enters = (user_node != owner_node) & (is_first | (user_node != np.append(-1, user_node[:-1])))
    # the first rank in each node to have the token: the user that receives it from another node, or the owner
    leader = np.where(enters, users["rank"], users["owner"])
    entry = np.maximum.accumulate(np.where(enters | is_first, np.arange(len(user_node)), 0))
    previous_entry = np.append(0, entry[:-1]) if len(entry) else entry
    previous = np.append(-1, users["rank"][:-1])
    from_previous = np.where(enters, leader[previous_entry], previous)
    src = np.where(is_first, users["owner"], from_previous)
    step = np.where(enters, np.maximum(users["step"] // devices - 1, 0) * devices, users["step"] - 1)
    return _make_moves(payload, users, src, users["rank"], step)


def send_hierarchical(payload: Payload, users: Columns, node: Ints) -> tuple[Columns, Columns]:
    """Return (moves, rows of `users` whose ranks receive the tokens in step 1).

    In step 0, tokens go to the users in the owner's node and to one leader in every other node. In step 1, leaders forward them
    within their nodes.
    """
    user_node, owner_node = node[users["rank"]], node[users["owner"]]
    # the leader is the user whose position in its node is nearest to the owner's, which spreads leaders as evenly as owners
    devices = int(np.bincount(node).max())
    order = lexicographic_argsort(users["segment"], user_node, (users["rank"] - users["owner"]) % devices)
    users, user_node, owner_node = select_rows(users, order), user_node[order], owner_node[order]
    leads = differs_from_previous(users["segment"], user_node)
    passed_on = (user_node != owner_node) & ~leads
    leader = np.maximum.accumulate(np.where(leads, np.arange(len(leads)), 0))
    late = select_rows(users, passed_on)
    second = _make_moves(payload, late, users["rank"][leader][passed_on], late["rank"], 1)
    return concat_rows(MOVE_COLUMNS, [send_direct(payload, select_rows(users, ~passed_on), 0), second]), late


def reduce_direct(payload: Payload, users: Columns, node: Ints | None = None) -> Columns:
    """Return moves of partial results from every user to the owner, one step after the user's last contribution.

    node: the node of each rank; if given, the results of users in each node other than the owner's are first summed at a leader
    in that node. users: the remote users, with their last steps.
    """
    if node is None:
        return _make_moves(payload, users, users["rank"], users["owner"], users["step"] + 1)
    user_node, owner_node = node[users["rank"]], node[users["owner"]]
    # the leader is one of the last users to contribute: the user whose position in its node is nearest to the owner's, which
    # spreads leaders as evenly as owners
    devices = int(np.bincount(node).max())
    nearness = -((users["rank"] - users["owner"]) % devices)
    order = lexicographic_argsort(users["segment"], user_node, users["step"], nearness)
    users, user_node, owner_node = select_rows(users, order), user_node[order], owner_node[order]
    is_first = differs_from_previous(users["segment"], user_node)
    rows = len(user_node)
    leads = np.append(is_first[1:], True) if rows else np.ones(0, bool)
    leader = np.minimum.accumulate(np.where(leads, np.arange(rows), rows)[::-1])[::-1]
    to_owner = (user_node == owner_node) | leads
    dst = np.where(to_owner, users["owner"], users["rank"][np.minimum(leader, max(rows - 1, 0))])
    # a leader waits one step for the other users in its node
    waits = leads & ~is_first & (user_node != owner_node)
    return _make_moves(payload, users, users["rank"], dst, users["step"] + np.where(waits, 2, 1))


def reduce_along_ring(payload: Payload, users: Columns, node: Ints | None = None) -> Columns:
    """Return moves of partial results along the users in the order of their last steps, summed on the way, and then to the
    owner.

    node: the node of each rank. If given, the sum over the owner's own node goes to the owner separately, and the other users
    are visited node by node, so that no node is entered twice. users: the remote users, with their last steps.
    """
    rows = num_rows(users)
    if not rows:
        return concat_rows(MOVE_COLUMNS, [])
    if node is not None:
        distance = (node[users["rank"]] - node[users["owner"]]) % (int(node.max()) + 1)
        users = {**users, "segment": 2 * users["segment"] + (distance > 0)}
        users = select_rows(users, lexicographic_argsort(users["segment"], distance, users["step"], users["rank"]))
    is_first = differs_from_previous(users["segment"])
    # a sum leaves after its arrival and the user's last contribution: step_i = max_j<=i (last_j + i - j) + 1; an offset per
    # segment keeps the running maximum within the segment
    index, segment = np.arange(rows), np.cumsum(is_first)
    offset = int(users["step"].max()) + rows + 1
    step = np.maximum.accumulate(users["step"] - index + segment * offset) - segment * offset + index + 1
    is_last = np.append(is_first[1:], True)
    dst = np.where(is_last, users["owner"], np.append(users["rank"][1:], -1))
    return _make_moves(payload, users, users["rank"], dst, step)


def differs_from_previous(*keys: Ints) -> np.ndarray:
    """Return which rows differ from the previous row in any of the keys, bool. The first row always does."""
    differs = np.ones(len(keys[0]), bool)
    if len(differs):
        differs[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return differs


def reversed_moves(moves: Columns, payload: Payload, step: int | Ints) -> Columns:
    """Return the moves with source and destination exchanged, and with the given payload and step."""
    turned = {**moves, "src": moves["dst"], "dst": moves["src"], "payload": int(payload), "step": step}
    return make_columns(MOVE_COLUMNS, **turned)


def coalesce(moves: Columns) -> Columns:
    """Join moves that differ only in having adjacent token intervals, then those that differ only in having adjacent head
    ranges."""
    return _joined(_joined(moves, "t0", "t1"), "h0", "h1")


def _joined(moves: Columns, low: str, high: str) -> Columns:
    names = [name for name in MOVE_COLUMNS if name not in (low, high)]
    rows = select_rows(moves, lexicographic_argsort(*(moves[name] for name in names), moves[low]))
    is_first = differs_from_previous(*(rows[name] for name in names))
    if num_rows(rows):
        is_first[1:] |= rows[low][1:] != rows[high][:-1]
    last = np.append(np.flatnonzero(is_first)[1:], num_rows(rows)) - 1
    return {**select_rows(rows, is_first), high: rows[high][last] if num_rows(rows) else rows[high]}


def _make_moves(payload: Payload, users: Columns, src: Ints, dst: Ints, step: int | Ints) -> Columns:
    extent = {name: users[name] for name in ("t0", "t1", "h0", "h1")}
    return coalesce(make_columns(MOVE_COLUMNS, step=step, src=src, dst=dst, payload=int(payload), **extent))
