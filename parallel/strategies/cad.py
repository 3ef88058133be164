"""Core-attention disaggregation: ranks with too much attention hand some of it to ranks with too little.

Core attention has no weights, so any rank may serve any piece of it (Zhuang et al. 2025, arXiv 2510.18121). Queries, keys
and values travel to the server, outputs home; all else stays where the tokens are. Unlike that paper's greedy rule
(`cad_greedy`) every server is bounded, shares are head groups, rows and ranges of keys, and what is counted is what moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distattn.cluster.spec import AnyCluster, ClusterSpec
from distattn.ir.bands import tighten
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints, as_int64, lexicographic_argsort, run_starts
from distattn.ir.plan import (
    MOVE_COLUMNS,
    REDUCED_PAYLOADS,
    TASK_COLUMNS,
    Call,
    Columns,
    Payload,
    Table,
    concat_rows,
    make_columns,
    move_bytes,
    select_rows,
    task_bands,
)
from distattn.parallel.analysis.simulate import simulate_pass
from distattn.parallel.strategies.cad_cut import (
    Transfers,
    WorkItems,
    assign_lanes,
    choose_cut,
    cut_into_lanes,
    num_head_groups,
)
from distattn.parallel.strategies.cad_match import match_work
from distattn.parallel.tables.backward import derive_backward
from distattn.parallel.tables.cost import CostModel, bytes_per_row_and_key
from distattn.parallel.tables.partition import mask_rectangles, owns_range, split_by_key_owner, split_by_query_owner
from distattn.parallel.tables.routes import reduce_direct, remote_users, send_direct

# beyond this share of an item its first rows, which hold little work for their bytes, have to leave as well
_DENSE_FRACTION = 0.75
_MILLION = 1_000_000
# attempts to keep every rank within the capacity
_MEMORY_ROUNDS = 6
# tolerances that are tried where the one asked for makes messages take longer than they save
FALLBACK_TOLERANCES = (0.1, 0.3, 1.0, 3.0)


def cad(
    call: Call,
    cluster: AnyCluster | None = None,
    *,
    direction: str = "forward",
    tolerance: float = 0.02,
    speeds: Sequence[int] | None = None,
    max_buffer_bytes: int | None = None,
    block: int = 128,
) -> list[Table]:
    """Tasks and moves of one pass: send at step 0, compute (at home at 0, away at 1), outputs home at 2.

    tolerance: no server gets more than (1 + tolerance) of its part of the work, but for the last block of cells.
    speeds: a whole number for each rank, what it does in the time the others take for theirs; 0 serves nothing.
    capacity: bytes of others' tensors a rank may hold at once in one pass; who is near it gets less.
    block: rows and keys that kernels take at once; documents are cut at multiples of it.
    Where the cluster is described and ranks are equally fast, work stays at home if moving it takes longer than it saves, or as
    much of it as makes the pass shortest.
    """
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < 1000:
        raise DistattnError(f"tolerance is a share of the mean, such as 0.02, not {tolerance}.")
    if int(as_int64(block, "block")) < 1:
        raise DistattnError(f"block is at least 1 token, not {block}.")
    rate = np.ones(call.ranks, np.int64) if speeds is None else as_int64(speeds, "speeds")
    if rate.shape != (call.ranks,) or (rate < 0).any() or (rate > _MILLION).any() or not rate.any():
        raise DistattnError(
            f"speeds are {call.ranks} whole numbers up to {_MILLION:,}, one for each rank, not all 0; not {speeds}."
        )
    if max_buffer_bytes is not None and int(as_int64(max_buffer_bytes, "max_buffer_bytes")) < 0:
        raise DistattnError(f"max_buffer_bytes is a number of bytes, not {max_buffer_bytes}.")
    if call.mask.area() // block * (1 if call.mask.heads else call.heads) >= 1 << 61:
        raise DistattnError(f"this much work cannot be counted in blocks of {block} x {block}; use a larger block.")
    cost_model = CostModel.for_cluster(cluster, direction, call.head_dim, block)
    tasks = home_tasks(call, cost_model)
    node = np.zeros(call.ranks, np.int64) if cluster is None else cluster.node
    bounds = _Limits(node, rate, tolerance, max_buffer_bytes)
    shared = route_tasks(call, _rebalance_within_memory(call, tasks, cost_model, bounds))
    # a table of speeds knows nothing of ranks that are slower than it says
    if not isinstance(cluster, ClusterSpec) or (rate != rate[0]).any():
        return [shared]

    def seconds(table: Table) -> float:
        # the backward pass moves what the forward pass does, and gradients
        whole = table if direction == "forward" else derive_backward(call, table, "refetch-home", cluster)
        return simulate_pass(call, cluster, direction, whole).seconds

    best, stay = (seconds(shared), shared), route_tasks(call, tasks)
    if (alone := seconds(stay)) > best[0]:
        return [shared]
    best = alone, stay
    # moving so much takes longer than it saves: perhaps moving less does not
    for looser in FALLBACK_TOLERANCES:
        if looser > tolerance:
            table = route_tasks(
                call, _rebalance_within_memory(call, tasks, cost_model, bounds._replace(tolerance=looser))
            )
            if (found := seconds(table)) < best[0]:
                best = found, table
    return [best[1]]


class _Limits(NamedTuple):
    """What shares have to keep to: nodes, speeds and capacity of ranks, and the tolerance."""

    node: Ints
    rate: Ints
    tolerance: float
    max_buffer_bytes: int | None


def _rebalance_within_memory(call: Call, tasks: Columns, cost_model: CostModel, bounds: _Limits) -> Columns:
    """The work shared out so that nobody holds more than the capacity; refused where that breaks the tolerance."""
    scale, max_buffer_bytes = np.ones(call.ranks), bounds.max_buffer_bytes
    held, left = np.zeros(call.ranks, np.int64), 0
    for _ in range(_MEMORY_ROUNDS):
        found, left = _rebalance(call, tasks, cost_model, bounds, scale)
        if max_buffer_bytes is None:
            return found
        table = route_tasks(call, found)
        held = _buffer_bytes(
            call, table if cost_model.direction == "forward" else derive_backward(call, table, "refetch-home")
        )
        if left or held.max() <= max_buffer_bytes:
            break
        scale *= np.where(held > max_buffer_bytes, 0.9 * max_buffer_bytes / np.maximum(held, 1), 1.0)
    if left or held.max() > max_buffer_bytes:
        raise DistattnError(
            f"cad cannot keep every rank within {bounds.tolerance} of its part of the work and within "
            f"{max_buffer_bytes:,} bytes of others' tensors in the {cost_model.direction} pass. "
            "Raise max_buffer_bytes or tolerance."
        )
    return found


def work_limits(work: int, rate: Ints, tolerance: float) -> Ints:
    """What each rank may have to do: its part of all work, by its rate, and the tolerance."""
    # Python integers: the product passes int64
    share = _MILLION + round(tolerance * _MILLION)
    parts = [-(-work * share * own // (int(rate.sum()) * _MILLION)) for own in rate.tolist()]
    return np.array(parts, np.int64)


def home_tasks(call: Call, cost_model: CostModel) -> Columns:
    """Every task at the rank of its queries; where other ways move fewer bytes, at that of its keys, or by groups of heads."""
    weights = bytes_per_row_and_key(call, cost_model.direction)
    area, rank = split_by_query_owner(call, mask_rectangles(call), call.layout.chunks)
    tasks = make_columns(TASK_COLUMNS, step=0, rank=rank, **vars(area))
    if owns_range(call, rank, area.k0, area.k1).all():
        return tasks
    part, row, key_owner = split_by_key_owner(call, area, call.layout.chunks)
    away = (key_owner != rank[row]) & (weights[0] * (part.q1 - part.q0) < weights[1] * (part.k1 - part.k0))
    split = np.zeros(len(rank), bool)
    split[row[away]] = True
    parts = make_columns(TASK_COLUMNS, step=0, rank=np.where(away, key_owner, rank[row]), **vars(part))
    tasks = concat_rows(TASK_COLUMNS, [select_rows(tasks, ~split), select_rows(parts, split[row])])
    return _split_by_heads(call, tasks, cost_model, weights)


def _split_by_heads(call: Call, tasks: Columns, cost_model: CostModel, weights: tuple[int, int]) -> Columns:
    """The same, but pieces of many owners by lanes (see `cutting`), an equal share for each, where that moves fewer bytes."""
    order = lexicographic_argsort(tasks["piece"], tasks["rank"])
    first = run_starts(tasks["piece"][order], tasks["rank"][order])
    piece, owner = tasks["piece"][order][first], tasks["rank"][order][first]
    seen = np.maximum.reduceat(tasks["k1"][order], first) - np.minimum.reduceat(tasks["k0"][order], first)
    here = np.add.reduceat((tasks["q1"] - tasks["q0"])[order], first)
    size = len(call.mask.pieces)
    owners, keys = np.bincount(piece, minlength=size), np.bincount(piece, np.maximum(seen - here, 0), size)
    wide = np.flatnonzero(owners > 2)
    if not len(wide):
        return tasks
    items = WorkItems(wide, tighten(call.mask.pieces[wide]), *call.piece_heads[wide].T)
    whole = np.ones(len(wide))
    *_, moved = choose_cut(items, num_head_groups(items, call.group), whole, owners[wide], cost_model, weights)
    # every owner has its own part of the rows and keys
    better = moved * (1 - 1 / owners[wide]) < weights[1] * keys[wide]
    wide, items = wide[better], items.at(better)
    if not len(wide):
        return tasks
    number = np.arange(len(wide))
    cut = cut_into_lanes(items, number, whole[better], owners[wide], cost_model, call.group, weights)
    mine = np.isin(piece, wide)
    sender = np.searchsorted(wide, piece[mine])
    total = np.zeros(len(wide), np.int64)
    np.add.at(total, cut.sender, cost_model.band_costs(cut.lanes.bands) * (cut.lanes.h1 - cut.lanes.h0))
    shares = Transfers(sender, -(-total[sender] // owners[wide][sender]), owner[mine])
    return concat_rows(
        TASK_COLUMNS, [select_rows(tasks, ~np.isin(tasks["piece"], wide)), assign_lanes(cut, shares, cost_model)]
    )


def route_tasks(call: Call, tasks: Columns) -> Table:
    """The table of these tasks: inputs straight from their owners, outputs straight home."""
    local = owns_range(call, tasks["rank"], tasks["q0"], tasks["q1"]) & owns_range(
        call, tasks["rank"], tasks["k0"], tasks["k1"]
    )
    tasks = {**tasks, "step": np.where(local, 0, 1)}
    # most tasks have all they need at home
    away = select_rows(tasks, ~local)
    moves = [
        send_direct(Payload.Q, remote_users(call, Payload.Q, away), 0),
        send_direct(Payload.KV, remote_users(call, Payload.KV, away), 0),
        reduce_direct(Payload.O, remote_users(call, Payload.O, away, latest=True)),
    ]
    return Table(tasks, concat_rows(MOVE_COLUMNS, moves))


def _rebalance(
    call: Call, tasks: Columns, cost_model: CostModel, bounds: _Limits, scale: np.ndarray
) -> tuple[Columns, int]:
    """(the same work, no rank above what it may have; what nobody would take).

    Takers take only this part of what they have room for.
    """
    node, rate, tolerance, _ = bounds
    weights = bytes_per_row_and_key(call, cost_model.direction)
    cost = cost_model.task_costs(call, tasks)
    load = np.zeros(call.ranks, np.int64)
    np.add.at(load, tasks["rank"], cost)
    limit = work_limits(int(load.sum()), rate, tolerance)
    excess, room = np.maximum(load - limit, 0), np.maximum(limit - load, 0)
    if not excess.any():
        return tasks, 0
    chosen = _most_work_per_byte(tasks, cost, excess, weights)
    home, given = tasks["rank"][chosen], select_rows(tasks, chosen)
    items = WorkItems(given["piece"], task_bands(call.mask, given), given["h0"], given["h1"])
    fraction = np.minimum(excess / np.maximum(np.bincount(home, cost[chosen], call.ranks), 1), 1.0)[home]
    # a typical taker has room for so much
    typical = max(sum(space * space for space in room.tolist()) // int(room.sum()), 1)
    cut = cut_into_lanes(items, home, fraction, -(-excess[home] // typical), cost_model, call.group, weights)
    # what is cut costs more: everybody may have a little more
    extra = np.append(cut.extra, np.zeros(call.ranks - len(cut.extra), np.int64))
    limit = work_limits(int(load.sum() + extra.sum()), rate, tolerance)
    excess = np.where(excess > 0, np.maximum(load - limit, 0) + extra, 0)
    room = (np.maximum(limit - load, 0) * scale).astype(np.int64)
    main = {rank: piece for rank, piece in zip(home[::-1].tolist(), given["piece"][::-1].tolist(), strict=True)}
    peers = {rank: tasks["rank"][tasks["piece"] == piece] for rank, piece in main.items()}
    shares = Transfers(*match_work(excess, room, node, peers))
    rest = np.ones(len(cost), bool)
    rest[chosen] = False
    left = int(excess.sum() - shares.cost.sum())
    return concat_rows(TASK_COLUMNS, [select_rows(tasks, rest), assign_lanes(cut, shares, cost_model)]), left


def _buffer_bytes(call: Call, table: Table) -> Ints:
    """Bytes of others' tensors, and of results for others, that each rank has at most."""
    size = move_bytes(call, table.moves)
    arriving = np.bincount(table.moves["dst"], size, call.ranks)
    made = np.isin(table.moves["payload"], REDUCED_PAYLOADS)
    return (arriving + np.bincount(table.moves["src"], size * made, call.ranks)).astype(np.int64)


def _most_work_per_byte(tasks: Columns, cost: Ints, excess: Ints, weights: tuple[int, int]) -> Ints:
    """The tasks that ranks with an excess give from, by rank: those with most work for their bytes."""
    mine = np.flatnonzero(excess[tasks["rank"]] > 0)
    rows, keys = tasks["q1"][mine] - tasks["q0"][mine], tasks["k1"][mine] - tasks["k0"][mine]
    worth = cost[mine] / (weights[0] * rows + weights[1] * keys)
    order = mine[np.lexsort((-worth, tasks["rank"][mine]))]
    rank, size = tasks["rank"][order], cost[order]
    before = np.cumsum(size) - size
    before -= before[np.searchsorted(rank, rank)]
    return order[before * _DENSE_FRACTION < excess[rank]]
