"""Re-layout: a layer whose strategy works on another layout than the one q, k, v and o are in.

The strategy plans on its working layout; its table is then bent to the layout of the call. A rank that would own a token
there is a *host*: what it uses itself is brought to it first, and its own results go home last; what it would only pass
on goes to and from the true owner directly. The outcome is a table like any other, derived backward and proven the same way.
"""

from __future__ import annotations

import numpy as np

from distattn.ir.intervals import Ints, expand_ranges, merge_intervals, overlapping_pairs, sorted_unique
from distattn.ir.layout import Layout
from distattn.ir.plan import (
    MOVE_COLUMNS,
    Call,
    Columns,
    Payload,
    Table,
    concat_rows,
    make_columns,
    select_rows,
    task_token_ranges,
)
from distattn.parallel.tables.routes import coalesce, reversed_moves


def relayout_table(call: Call, working: Call, table: Table) -> Table:
    """A forward table for `call` from one for `working`, a call that differs from it in the layout only."""
    tasks = {**table.tasks, "step": table.tasks["step"] + 1}
    last = table.steps + 1
    parts = []
    for payload, host_end, far_end in (
        (Payload.Q, "src", "dst"),
        (Payload.KV, "src", "dst"),
        (Payload.O, "dst", "src"),
    ):
        hosted = _used_by_hosts(working, tasks, payload)
        moves = _at_owners(call, working, select_rows(table.moves, table.moves["payload"] == payload), hosted)
        passed_on = (moves[host_end] == moves["host"]) & ~moves["hosted"].astype(bool)
        moves[host_end] = np.where(passed_on, moves["owner"], moves[host_end])
        # the owner has its token already, and keeps its own results
        moves = select_rows(moves, moves[far_end] != moves["owner"])
        there = _to_hosts(call, payload, hosted)
        parts += [
            {**{name: moves[name] for name in MOVE_COLUMNS}, "step": moves["step"] + 1},
            reversed_moves(there, payload, last) if payload == Payload.O else there,
        ]
    return Table(tasks, coalesce(concat_rows(MOVE_COLUMNS, parts)))


def _used_by_hosts(working: Call, tasks: Columns, payload: Payload) -> Columns:
    """Tokens and heads that the tasks of their own host read or add to: disjoint rows (host, t0, t1, h0, h1)."""
    cells = task_token_ranges(working, payload, tasks)
    cut, host, i = _cut(working.layout, cells["t0"], cells["t1"])
    own = host == tasks["rank"][i]
    i, host, t0, t1 = i[own], host[own], cut["t0"][own], cut["t1"][own]
    limits = sorted_unique(np.concatenate([cells["h0"], cells["h1"]]))
    row, head = expand_ranges(np.searchsorted(limits, cells["h0"][i]), np.searchsorted(limits, cells["h1"][i]))
    group, t0, t1 = merge_intervals(host[row] * len(limits) + head, t0[row], t1[row])
    host, head = np.divmod(group, max(len(limits), 1))
    return {"host": host, "t0": t0, "t1": t1, "h0": limits[head], "h1": limits[np.minimum(head + 1, len(limits) - 1)]}


def _at_owners(call: Call, working: Call, moves: Columns, hosted: Columns) -> Columns:
    """Moves cut where the owner, the host, or whether the host uses the token changes; three columns tell these."""
    limits = sorted_unique(np.concatenate([hosted["h0"], hosted["h1"], moves["h0"], moves["h1"]]))
    i, head = expand_ranges(np.searchsorted(limits, moves["h0"]), np.searchsorted(limits, moves["h1"]))
    rows = {**select_rows(moves, i), "h0": limits[head], "h1": limits[np.minimum(head + 1, len(limits) - 1)]}
    # used stretches of each head and the gaps between them, on one line
    j, line = expand_ranges(np.searchsorted(limits, hosted["h0"]), np.searchsorted(limits, hosted["h1"]))
    width = call.mask.n + 1
    _, low, high = merge_intervals(np.zeros_like(line), line * width + hosted["t0"][j], line * width + hosted["t1"][j])
    points = sorted_unique(np.concatenate([low, high, [0, len(limits) * width]]))
    used = np.isin(points[:-1], low).astype(np.int64)
    base = head * width
    i, j = overlapping_pairs(points[:-1], points[1:], base + rows["t0"], base + rows["t1"])
    cut = {
        "t0": np.maximum(base[i] + rows["t0"][i], points[j]),
        "t1": np.minimum(base[i] + rows["t1"][i], points[j + 1]),
    }
    rows = {**select_rows(rows, i), **{name: value - base[i] for name, value in cut.items()}, "hosted": used[j]}
    for layout, name in ((call.layout, "owner"), (working.layout, "host")):
        cut, rank, i = _cut(layout, rows["t0"], rows["t1"])
        rows = {**select_rows(rows, i), **cut, name: rank}
    return rows


def _to_hosts(call: Call, payload: Payload, hosted: Columns) -> Columns:
    """Moves that bring what hosts use from its owners, at step 0."""
    cut, owner, i = _cut(call.layout, hosted["t0"], hosted["t1"])
    rows = {**select_rows(hosted, i), **cut}
    place = {name: rows[name] for name in ("t0", "t1", "h0", "h1")}
    moves = make_columns(
        MOVE_COLUMNS, step=np.zeros(len(i), np.int64), src=owner, dst=rows["host"], payload=int(payload), **place
    )
    return select_rows(moves, moves["src"] != moves["dst"])


def _cut(layout: Layout, t0: Ints, t1: Ints) -> tuple[Columns, Ints, Ints]:
    """Intervals cut where the owner changes: (t0 and t1, owner, input row)."""
    chunks = layout.chunks
    i, j = overlapping_pairs(chunks["t0"], chunks["t1"], t0, t1)
    cut = {"t0": np.maximum(t0[i], chunks["t0"][j]), "t1": np.minimum(t1[i], chunks["t1"][j])}
    return cut, chunks["rank"][j], i
