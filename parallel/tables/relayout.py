"""Re-layout: run a layer's strategy on a working layout that differs from the layout of q, k, v and o.

The strategy plans on the working layout, and its table is then rewritten for the layout of the call. The rank that owns a token
in the working layout is its *working owner*. Tokens that the working owner uses itself are sent to it first, and its own
results go to the true owner last. Tokens that it would only forward travel directly between the user and the true owner. The
result is a table like any other: it is proven, and its backward table is derived, in the same way.
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
    """Rewrite a forward table for `working` into one for `call`, the same call on a different layout."""
    tasks = {**table.tasks, "step": table.tasks["step"] + 1}
    last = table.steps + 1
    moves_of_payloads = []
    for payload, owner_end, user_end in (
        (Payload.Q, "src", "dst"),
        (Payload.KV, "src", "dst"),
        (Payload.O, "dst", "src"),
    ):
        needed = _used_by_working_owners(working, tasks, payload)
        moves = _cut_at_owners(call, working, select_rows(table.moves, table.moves["payload"] == payload), needed)
        passed_on = (moves[owner_end] == moves["working_owner"]) & ~moves["is_used"].astype(bool)
        moves[owner_end] = np.where(passed_on, moves["owner"], moves[owner_end])
        # the owner already has its tokens and keeps its own results
        moves = select_rows(moves, moves[user_end] != moves["owner"])
        brought = _to_working_owners(call, payload, needed)
        moves_of_payloads += [
            {**{name: moves[name] for name in MOVE_COLUMNS}, "step": moves["step"] + 1},
            reversed_moves(brought, payload, last) if payload == Payload.O else brought,
        ]
    return Table(tasks, coalesce(concat_rows(MOVE_COLUMNS, moves_of_payloads)))


def _used_by_working_owners(working: Call, tasks: Columns, payload: Payload) -> Columns:
    """Return the tokens and heads that tasks use on their working owner, as disjoint rows (working_owner, t0, t1, h0, h1)."""
    ranges = task_token_ranges(working, payload, tasks)
    cut, working_owner, i = _cut_by_owner(working.layout, ranges["t0"], ranges["t1"])
    is_local = working_owner == tasks["rank"][i]
    i, working_owner, t0, t1 = i[is_local], working_owner[is_local], cut["t0"][is_local], cut["t1"][is_local]
    limits = sorted_unique(np.concatenate([ranges["h0"], ranges["h1"]]))
    row, head = expand_ranges(np.searchsorted(limits, ranges["h0"][i]), np.searchsorted(limits, ranges["h1"][i]))
    group, t0, t1 = merge_intervals(working_owner[row] * len(limits) + head, t0[row], t1[row])
    working_owner, head = np.divmod(group, max(len(limits), 1))
    return {
        "working_owner": working_owner,
        "t0": t0,
        "t1": t1,
        "h0": limits[head],
        "h1": limits[np.minimum(head + 1, len(limits) - 1)],
    }


def _cut_at_owners(call: Call, working: Call, moves: Columns, needed: Columns) -> Columns:
    """Cut moves where the owner, the working owner, or the working owner's use of the token changes.

    The result also has the columns `owner`, `working_owner` and `is_used` (0 or 1).
    """
    limits = sorted_unique(np.concatenate([needed["h0"], needed["h1"], moves["h0"], moves["h1"]]))
    i, head = expand_ranges(np.searchsorted(limits, moves["h0"]), np.searchsorted(limits, moves["h1"]))
    rows = {**select_rows(moves, i), "h0": limits[head], "h1": limits[np.minimum(head + 1, len(limits) - 1)]}
    # intervals in use and the gaps between them, on one line with all heads end to end
    j, line = expand_ranges(np.searchsorted(limits, needed["h0"]), np.searchsorted(limits, needed["h1"]))
    width = call.mask.n + 1
    _, low, high = merge_intervals(np.zeros_like(line), line * width + needed["t0"][j], line * width + needed["t1"][j])
    points = sorted_unique(np.concatenate([low, high, [0, len(limits) * width]]))
    used = np.isin(points[:-1], low).astype(np.int64)
    base = head * width
    i, j = overlapping_pairs(points[:-1], points[1:], base + rows["t0"], base + rows["t1"])
    cut = {
        "t0": np.maximum(base[i] + rows["t0"][i], points[j]),
        "t1": np.minimum(base[i] + rows["t1"][i], points[j + 1]),
    }
    rows = {**select_rows(rows, i), **{name: value - base[i] for name, value in cut.items()}, "is_used": used[j]}
    for layout, name in ((call.layout, "owner"), (working.layout, "working_owner")):
        cut, rank, i = _cut_by_owner(layout, rows["t0"], rows["t1"])
        rows = {**select_rows(rows, i), **cut, name: rank}
    return rows


def _to_working_owners(call: Call, payload: Payload, needed: Columns) -> Columns:
    """Return the moves of step 0, which bring to working owners the tokens that their own tasks use."""
    cut, owner, i = _cut_by_owner(call.layout, needed["t0"], needed["t1"])
    rows = {**select_rows(needed, i), **cut}
    place = {name: rows[name] for name in ("t0", "t1", "h0", "h1")}
    moves = make_columns(
        MOVE_COLUMNS,
        step=np.zeros(len(i), np.int64),
        src=owner,
        dst=rows["working_owner"],
        payload=int(payload),
        **place,
    )
    return select_rows(moves, moves["src"] != moves["dst"])


def _cut_by_owner(layout: Layout, t0: Ints, t1: Ints) -> tuple[Columns, Ints, Ints]:
    """Cut intervals where the owner changes. Return (columns t0 and t1, owner, input row)."""
    chunks = layout.chunks
    i, j = overlapping_pairs(chunks["t0"], chunks["t1"], t0, t1)
    cut = {"t0": np.maximum(t0[i], chunks["t0"][j]), "t1": np.minimum(t1[i], chunks["t1"][j])}
    return cut, chunks["rank"][j], i
