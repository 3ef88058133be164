"""Routes: how tokens reach the ranks that use them, and how partial results get home.

A strategy says who computes what in which step; from its tasks follow, by token and head, the ranks that use it (or add
to it) without owning it. A route visits those and nobody else, so what moves is the least that the assignment of tasks
allows. Rows of equal users, called a *stretch*, travel together.
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
    """The ranks that use tokens of a payload without owning them: rows (stretch, owner, rank, t0, t1, h0, h1, step).

    step: the first, or with `latest` the last step in which `rank` does so. Sorted by stretch, step and rank; stretches
    are equal or disjoint, each of one owner.
    """
    chunks = call.layout.chunks
    cells = task_token_ranges(call, payload, tasks)
    # cut at chunks, so that no stretch crosses an owner
    i, j = overlapping_pairs(chunks["t0"], chunks["t1"], cells["t0"], cells["t1"])
    foreign = np.flatnonzero(tasks["rank"][i] != chunks["rank"][j])
    i, j = i[foreign], j[foreign]
    t0, t1 = np.maximum(cells["t0"][i], chunks["t0"][j]), np.minimum(cells["t1"][i], chunks["t1"][j])
    limits = sorted_unique(np.concatenate([cells["h0"][i], cells["h1"][i]]))
    each, head = expand_ranges(np.searchsorted(limits, cells["h0"][i]), np.searchsorted(limits, cells["h1"][i]))
    row, part, head, t0, t1 = elementary_intervals(head, t0[each], t1[each])
    row = each[row]
    owner = np.zeros(len(t0), np.int64)
    owner[part] = chunks["rank"][j[row]]
    row = i[row]
    # one row per (stretch, rank): its first or last step
    step = tasks["step"][row]
    order = lexicographic_argsort(part, tasks["rank"][row], -step if latest else step)
    part, rank, step = part[order], tasks["rank"][row][order], step[order]
    fresh = np.ones(len(part), bool)
    fresh[1:] = (part[1:] != part[:-1]) | (rank[1:] != rank[:-1])
    part, rank, step = part[fresh], rank[fresh], step[fresh]
    order = lexicographic_argsort(part, step, rank)
    part = part[order]
    place = {"t0": t0[part], "t1": t1[part], "h0": limits[head[part]], "h1": limits[head[part] + 1]}
    return {"stretch": part, "owner": owner[part], "rank": rank[order], "step": step[order], **place}


def send_direct(payload: Payload, seen: Columns, step: int | Ints) -> Columns:
    """From the owner straight to every guest."""
    return _make_moves(payload, seen, seen["owner"], seen["rank"], step)


def send_along_ring(payload: Payload, seen: Columns, lane: Ints | None = None) -> Columns:
    """From the owner to its first guest, from there to the next, always one step before it is used.

    Guests of a stretch have different steps; with `lane`, a number for each rank, those of the same lane, which form a
    chain of their own.
    """
    if lane is not None:
        seen = {**seen, "stretch": seen["stretch"] * (int(lane.max()) + 1) + lane[seen["rank"]]}
        seen = select_rows(seen, lexicographic_argsort(seen["stretch"], seen["step"]))
    previous = np.append(-1, seen["rank"][:-1])
    return _make_moves(
        payload,
        seen,
        np.where(differs_from_previous(seen["stretch"]), seen["owner"], previous),
        seen["rank"],
        seen["step"] - 1,
    )


def send_along_double_ring(payload: Payload, seen: Columns, node: Ints, devices: int) -> Columns:
    """From node to node, and inside each along its guests: a token crosses into a node once.

    Guests of hop o (counted in nodes) compute in steps [o * devices, (o + 1) * devices); what crosses leaves one hop ahead.
    """
    here, home = node[seen["rank"]], node[seen["owner"]]
    fresh = differs_from_previous(seen["stretch"])
    enters = (here != home) & (fresh | (here != np.append(-1, here[:-1])))
    # who holds the token first in each node: the guest it entered at, or the owner
    gate = np.where(enters, seen["rank"], seen["owner"])
    at = np.maximum.accumulate(np.where(enters | fresh, np.arange(len(here)), 0))
    before = np.append(0, at[:-1]) if len(at) else at
    previous = np.append(-1, seen["rank"][:-1])
    src = np.where(enters, np.where(fresh, seen["owner"], gate[before]), np.where(fresh, seen["owner"], previous))
    step = np.where(enters, np.maximum(seen["step"] // devices - 1, 0) * devices, seen["step"] - 1)
    return _make_moves(payload, seen, src, seen["rank"], step)


def send_hierarchical(payload: Payload, seen: Columns, node: Ints) -> tuple[Columns, Columns]:
    """From the owner to guests of its own node and to one of every other node (step 0), which passes it on (step 1).

    Returns (moves, the rows of `seen` that get theirs in the second step).
    """
    here, home = node[seen["rank"]], node[seen["owner"]]
    # the guest nearest to the owner's place in its node: so that gates are spread as owners are
    devices = int(np.bincount(node).max())
    order = lexicographic_argsort(seen["stretch"], here, (seen["rank"] - seen["owner"]) % devices)
    seen, here, home = select_rows(seen, order), here[order], home[order]
    gate = differs_from_previous(seen["stretch"], here)
    second = (here != home) & ~gate
    first = select_rows(seen, ~second)
    source = seen["rank"][np.maximum.accumulate(np.where(gate, np.arange(len(gate)), 0))] if len(gate) else here
    later = select_rows(seen, second)
    passed = _make_moves(payload, later, source[second], later["rank"], 1)
    return concat_rows(MOVE_COLUMNS, [send_direct(payload, first, 0), passed]), later


def reduce_direct(payload: Payload, left: Columns, node: Ints | None = None) -> Columns:
    """From every guest to the owner, after its last deposit. With `node`, guests of a foreign node are summed there first.

    `left`: guests by their latest step.
    """
    if node is None:
        return _make_moves(payload, left, left["rank"], left["owner"], left["step"] + 1)
    here, home = node[left["rank"]], node[left["owner"]]
    # of the last to deposit the one nearest to the owner's place in its node gathers what the others have: gates are
    # spread as owners are
    devices = int(np.bincount(node).max())
    order = lexicographic_argsort(left["stretch"], here, left["step"], -((left["rank"] - left["owner"]) % devices))
    left, here, home = select_rows(left, order), here[order], home[order]
    gathers = np.append(differs_from_previous(left["stretch"], here)[1:], True) if len(here) else np.ones(0, bool)
    index = np.where(gathers, np.arange(len(here)), len(here))
    gate = np.minimum.accumulate(index[::-1])[::-1]
    alone = gathers & differs_from_previous(left["stretch"], here)
    direct = (here == home) | gathers
    dst = np.where(direct, left["owner"], left["rank"][np.minimum(gate, max(len(here) - 1, 0))])
    step = left["step"] + np.where(gathers & ~alone & (here != home), 2, 1)
    return _make_moves(payload, left, left["rank"], dst, step)


def reduce_along_ring(payload: Payload, left: Columns, node: Ints | None = None) -> Columns:
    """Partial results visit the guests in the order of their last deposits, summing, then go home.

    With `node`, what the owner's own node adds goes home on its own, and the others are visited node by node, so that
    the sum crosses into no node twice. `left`: guests by their latest step.
    """
    rows = num_rows(left)
    if not rows:
        return concat_rows(MOVE_COLUMNS, [])
    if node is not None:
        away = (node[left["rank"]] - node[left["owner"]]) % (int(node.max()) + 1)
        left = {**left, "stretch": 2 * left["stretch"] + (away > 0)}
        left = select_rows(left, lexicographic_argsort(left["stretch"], away, left["step"], left["rank"]))
    fresh = differs_from_previous(left["stretch"])
    # leave after one's own last deposit and after the sum so far has arrived: step_i = max_j<=i (deposit_j + i - j) + 1
    index, stretch = np.arange(rows), np.cumsum(fresh)
    tide = int(left["step"].max()) + rows + 1
    step = np.maximum.accumulate(left["step"] - index + stretch * tide) - stretch * tide + index + 1
    last = np.append(fresh[1:], True)
    return _make_moves(
        payload, left, left["rank"], np.where(last, left["owner"], np.append(left["rank"][1:], -1)), step
    )


def differs_from_previous(*keys: Ints) -> np.ndarray:
    """Which rows differ from the row before in any of the keys."""
    fresh = np.ones(len(keys[0]), bool)
    if len(fresh):
        fresh[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return fresh


def reversed_moves(moves: Columns, payload: Payload, step: int | Ints) -> Columns:
    """The same rows with the arrow turned, carrying `payload` at `step`."""
    turned = {**moves, "src": moves["dst"], "dst": moves["src"], "payload": int(payload), "step": step}
    return make_columns(MOVE_COLUMNS, **turned)


def coalesce(moves: Columns) -> Columns:
    """Join moves that agree in all but touching token intervals, then those in all but touching head ranges."""
    return _joined(_joined(moves, "t0", "t1"), "h0", "h1")


def _joined(moves: Columns, low: str, high: str) -> Columns:
    names = [name for name in MOVE_COLUMNS if name not in (low, high)]
    rows = select_rows(moves, lexicographic_argsort(*(moves[name] for name in names), moves[low]))
    fresh = differs_from_previous(*(rows[name] for name in names))
    if num_rows(rows):
        fresh[1:] |= rows[low][1:] != rows[high][:-1]
    last = np.append(np.flatnonzero(fresh)[1:], num_rows(rows)) - 1
    return {**select_rows(rows, fresh), high: rows[high][last] if num_rows(rows) else rows[high]}


def _make_moves(payload: Payload, seen: Columns, src: Ints, dst: Ints, step: int | Ints) -> Columns:
    rows = {name: seen[name] for name in ("t0", "t1", "h0", "h1")}
    return coalesce(make_columns(MOVE_COLUMNS, step=step, src=src, dst=dst, payload=int(payload), **rows))
