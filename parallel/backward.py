"""The backward table, derived from the forward one.

Same tasks. dO travels as Q did; dQ travels home as O did. For keys and values a policy decides:

    keep            what the forward received is still there: the forward transposed, time and arrows reversed
    refetch-home    Q and KV are sent again; every rank sends its dKV straight to the owner after its last deposit
    refetch-follow  Q and KV are sent again; dKV travels from its first user to its last, summing, then home
"""

from __future__ import annotations

import numpy as np

from distattn.intervals import Ints, elementary, expand
from distattn.parallel.ownership import coalesce
from distattn.plan import MOVE_COLUMNS, Call, Columns, Payload, Table, columns, concat, take

_TURNED = {Payload.Q: Payload.dQ, Payload.KV: Payload.dKV, Payload.O: Payload.dO}


def derive(call: Call, forward: Table, policy: str) -> Table:
    """The backward table of `forward` under `policy`."""
    if policy == "keep":
        return _transposed(forward)
    moves = forward.moves
    there = take(moves, moves["payload"] != Payload.O)
    queries, outputs = take(moves, moves["payload"] == Payload.Q), take(moves, moves["payload"] == Payload.O)
    seen = _key_deposits(call, forward.tasks)
    home = _straight_home(call, seen) if policy == "refetch-home" else _follow_users(call, seen)
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


def _key_deposits(call: Call, tasks: Columns) -> Columns:
    """Where dKV of foreign tokens arises: rows (owner, rank, kv head, t0, t1, step) with the rank's last deposit step.

    One row per elementary stretch of tokens between any two deposits' ends, so that stretches are equal or disjoint.
    """
    chunks = call.layout.chunks
    h0, h1 = tasks["h0"] // call.group, -(-tasks["h1"] // call.group)
    limits = np.unique(np.concatenate([h0, h1]))
    i, head = expand(np.searchsorted(limits, h0), np.searchsorted(limits, h1))
    rank, step, k0, k1 = (tasks[name][i] for name in ("rank", "step", "k0", "k1"))
    # chunks take part as rows of rank -1, so that no stretch crosses an owner
    heads = np.arange(max(len(limits) - 1, 0))
    own = len(chunks["t0"])
    group = np.concatenate([head, np.repeat(heads, own)])
    low = np.concatenate([k0, np.tile(chunks["t0"], len(heads))])
    high = np.concatenate([k1, np.tile(chunks["t1"], len(heads))])
    row, part, head, t0, t1 = elementary(group, low, high)
    kept = row < len(k0)
    row, part = row[kept], part[kept]
    # one row per (stretch, rank): its last deposit
    user, position = np.unique(part * call.ranks + rank[row], return_inverse=True)
    last = np.zeros(len(user), np.int64)
    np.maximum.at(last, position, step[row])
    part, rank = user // call.ranks, user % call.ranks
    owner = chunks["rank"][np.searchsorted(chunks["t1"], t0[part], "right")]
    seen = {"owner": owner, "rank": rank, "t0": t0[part], "t1": t1[part], "step": last}
    seen |= {"h0": limits[head[part]], "h1": limits[head[part] + 1]}
    return take(seen, owner != rank)


def _straight_home(call: Call, seen: Columns) -> Columns:
    return _moves(seen, seen["step"] + 1, seen["owner"])


def _follow_users(call: Call, seen: Columns) -> Columns:
    """Each stretch visits its users in the order of their last deposits, then its owner."""
    seen = take(seen, np.lexsort((seen["rank"], seen["step"], seen["t0"], seen["h0"])))
    rows = len(seen["step"])
    if not rows:
        return concat(MOVE_COLUMNS, [])
    fresh = np.ones(rows, bool)
    fresh[1:] = (seen["t0"][1:] != seen["t0"][:-1]) | (seen["h0"][1:] != seen["h0"][:-1])
    # leave after one's own last deposit and after the sum so far has arrived: step_i = max_j<=i (deposit_j + i - j) + 1
    index = np.arange(rows)
    stretch = np.cumsum(fresh)
    tide = int(seen["step"].max()) + rows + 1
    step = np.maximum.accumulate(seen["step"] - index + stretch * tide) - stretch * tide + index + 1
    follower = np.append(seen["rank"][1:], -1)
    last = np.append(fresh[1:], True)
    return _moves(seen, step, np.where(last, seen["owner"], follower))


def _moves(seen: Columns, step: Ints, dst: Ints) -> Columns:
    rows = {name: seen[name] for name in ("t0", "t1", "h0", "h1")}
    return coalesce(columns(MOVE_COLUMNS, step=step, src=seen["rank"], dst=dst, payload=int(Payload.dKV), **rows))
