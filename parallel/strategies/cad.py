"""Core-attention disaggregation: ranks with too much attention hand some of it to ranks with too little.

Core attention has no weights, so any rank may compute any piece of it (Zhuang et al. 2025, arXiv 2510.18121). Queries, keys and
values travel to the server and outputs return; everything else stays with the tokens. Unlike that paper's greedy rule
(`cad_greedy`), this strategy bounds every server's work, divides work by head groups, rows and key ranges, and counts bytes
exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from distattn.cluster.spec import AnyCluster
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

# roughly the largest fraction of an item to move if there are other items: the first rows of an item have little work per byte
_DENSE_FRACTION = 0.75
_MILLION = 1_000_000
# the number of attempts to keep every rank within max_buffer_bytes
_MEMORY_ROUNDS = 6
# tolerances of additional candidates: the larger the tolerance, the less work moves
FALLBACK_TOLERANCES = (0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class CadOptions:
    """Options of strategy "cad".

    tolerance: no server gets more than (1 + tolerance) times its share of the work, except for the last block of cells. speeds:
    each rank's relative throughput, as an integer; a rank with speed 0 takes no work. max_buffer_bytes: the most bytes of other
    ranks' tensors that a rank may hold at any one time in a pass; ranks near the limit get less work. block: the number of rows
    and of keys in a kernel's tile; documents are cut at multiples of it.
    """

    tolerance: float = 0.02
    speeds: Sequence[int] | None = None
    max_buffer_bytes: int | None = None
    block: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.tolerance, int | float) or not 0 <= self.tolerance < 1000:
            raise DistattnError(f"tolerance must be a share of the mean, such as 0.02, not {self.tolerance}.")
        if int(as_int64(self.block, "block")) < 1:
            raise DistattnError(f"block must be at least 1 token, not {self.block}.")
        if self.max_buffer_bytes is not None and int(as_int64(self.max_buffer_bytes, "max_buffer_bytes")) < 0:
            raise DistattnError(f"max_buffer_bytes must be a number of bytes, not {self.max_buffer_bytes}.")


def cad(
    call: Call, cluster: AnyCluster | None = None, options: CadOptions = CadOptions(), direction: str = "forward"
) -> Iterator[Table]:
    """Yield candidate tables. Step 0 sends inputs and runs local work, step 1 runs moved work, step 2 returns outputs.

    Candidates are generated one by one: first with the work balanced within the tolerance, then with all work at home, then
    increasingly unbalanced. If ranks differ in speed, only the first candidate is generated, because a cluster's speed table
    does not describe such differences.
    """
    speeds = _checked_speeds(call, options)
    cost_model = CostModel.for_cluster(cluster, direction, call.head_dim, options.block)
    tasks = home_tasks(call, cost_model)
    node = np.zeros(call.ranks, np.int64) if cluster is None else cluster.node
    limits = _Limits(node, speeds, options.tolerance, options.max_buffer_bytes)
    yield route_tasks(call, _rebalance_within_memory(call, tasks, cost_model, limits))
    if (speeds != speeds[0]).any():
        return
    yield route_tasks(call, tasks)
    for tolerance in FALLBACK_TOLERANCES:
        if tolerance > options.tolerance:
            looser = limits._replace(tolerance=tolerance)
            yield route_tasks(call, _rebalance_within_memory(call, tasks, cost_model, looser))


def _checked_speeds(call: Call, options: CadOptions) -> Ints:
    """Return the speeds of all ranks. Raise DistattnError if they are invalid, or if the work does not fit in an int64."""
    speeds = np.ones(call.ranks, np.int64) if options.speeds is None else as_int64(options.speeds, "speeds")
    if speeds.shape != (call.ranks,) or (speeds < 0).any() or (speeds > _MILLION).any() or not speeds.any():
        raise DistattnError(
            f"speeds must be {call.ranks} whole numbers from 0 to {_MILLION:,}, one per rank and not all 0; got {options.speeds}."
        )
    block = options.block
    if call.mask.area() // block * (1 if call.mask.heads else call.heads) >= 1 << 61:
        raise DistattnError(f"this much work cannot be counted in blocks of {block} x {block}; use a larger block.")
    return speeds


class _Limits(NamedTuple):
    """Constraints on the distribution of work: each rank's node and speed, the tolerance, and the limit on bytes of buffers."""

    node: Ints
    speeds: Ints
    tolerance: float
    max_buffer_bytes: int | None


def work_limits(work: int, speeds: Ints, tolerance: float) -> Ints:
    """Return the most work that each rank may have: its share of `work`, in proportion to its speed, times 1 + tolerance."""
    # use Python integers, because the product may overflow int64
    scale = _MILLION + round(tolerance * _MILLION)
    parts = [-(-work * scale * rank_speed // (int(speeds.sum()) * _MILLION)) for rank_speed in speeds.tolist()]
    return np.array(parts, np.int64)


def home_tasks(call: Call, cost_model: CostModel) -> Columns:
    """Assign every task to its queries' owner, unless moving it to its keys' owner or splitting it by heads moves fewer bytes."""
    weights = bytes_per_row_and_key(call, cost_model.direction)
    area, rank = split_by_query_owner(call, mask_rectangles(call), call.layout.chunks)
    tasks = make_columns(TASK_COLUMNS, step=0, rank=rank, **vars(area))
    if owns_range(call, rank, area.k0, area.k1).all():
        return tasks
    part, row, key_owner = split_by_key_owner(call, area, call.layout.chunks)
    to_keys = (key_owner != rank[row]) & (weights[0] * (part.q1 - part.q0) < weights[1] * (part.k1 - part.k0))
    split = np.zeros(len(rank), bool)
    split[row[to_keys]] = True
    parts = make_columns(TASK_COLUMNS, step=0, rank=np.where(to_keys, key_owner, rank[row]), **vars(part))
    tasks = concat_rows(TASK_COLUMNS, [select_rows(tasks, ~split), select_rows(parts, split[row])])
    return _split_by_heads(call, tasks, cost_model, weights)


def _split_by_heads(call: Call, tasks: Columns, cost_model: CostModel, weights: tuple[int, int]) -> Columns:
    """Cut mask pieces with many owners into head groups, with an equal share for each owner, where that moves fewer bytes."""
    order = lexicographic_argsort(tasks["piece"], tasks["rank"])
    first = run_starts(tasks["piece"][order], tasks["rank"][order])
    piece, owner = tasks["piece"][order][first], tasks["rank"][order][first]
    num_keys = np.maximum.reduceat(tasks["k1"][order], first) - np.minimum.reduceat(tasks["k0"][order], first)
    num_rows = np.add.reduceat((tasks["q1"] - tasks["q0"])[order], first)
    size = len(call.mask.pieces)
    owners, keys = np.bincount(piece, minlength=size), np.bincount(piece, np.maximum(num_keys - num_rows, 0), size)
    wide = np.flatnonzero(owners > 2)
    if not len(wide):
        return tasks
    items = WorkItems(wide, tighten(call.mask.pieces[wide]), *call.piece_heads[wide].T)
    everything = np.ones(len(wide))
    groups = num_head_groups(items, call.gqa_group_size)
    moved = choose_cut(items, groups, everything, owners[wide], cost_model, weights).moved_bytes
    # every owner already has its own rows and keys
    better = moved * (1 - 1 / owners[wide]) < weights[1] * keys[wide]
    wide, items = wide[better], items.at(better)
    if not len(wide):
        return tasks
    number = np.arange(len(wide))
    cut = cut_into_lanes(items, number, everything[better], owners[wide], cost_model, call.gqa_group_size, weights)
    mine = np.isin(piece, wide)
    sender = np.searchsorted(wide, piece[mine])
    total = np.zeros(len(wide), np.int64)
    np.add.at(total, cut.sender, cost_model.band_costs(cut.lanes.bands) * (cut.lanes.h1 - cut.lanes.h0))
    transfers = Transfers(sender, -(-total[sender] // owners[wide][sender]), owner[mine])
    other_tasks = select_rows(tasks, ~np.isin(tasks["piece"], wide))
    return concat_rows(TASK_COLUMNS, [other_tasks, assign_lanes(cut, transfers, cost_model)])


def route_tasks(call: Call, tasks: Columns) -> Table:
    """Return a table of `tasks` in which inputs come directly from their owners, and outputs return directly to their owners."""
    owns_rows = owns_range(call, tasks["rank"], tasks["q0"], tasks["q1"])
    local = owns_rows & owns_range(call, tasks["rank"], tasks["k0"], tasks["k1"])
    tasks = {**tasks, "step": np.where(local, 0, 1)}
    # skip the tasks that need only local tensors, which are the majority
    away = select_rows(tasks, ~local)
    moves = [
        send_direct(Payload.Q, remote_users(call, Payload.Q, away), 0),
        send_direct(Payload.KV, remote_users(call, Payload.KV, away), 0),
        reduce_direct(Payload.O, remote_users(call, Payload.O, away, latest=True)),
    ]
    return Table(tasks, concat_rows(MOVE_COLUMNS, moves))


def _rebalance_within_memory(call: Call, tasks: Columns, cost_model: CostModel, limits: _Limits) -> Columns:
    """Balance the work so that no rank holds more than max_buffer_bytes. Raise DistattnError if the tolerance makes this
    impossible."""
    direction, budget = cost_model.direction, limits.max_buffer_bytes
    if budget is None:
        return _rebalance(call, tasks, cost_model, limits, np.ones(call.ranks))[0]
    room_fraction = np.ones(call.ranks)
    held, rest = np.zeros(call.ranks, np.int64), 0
    for _ in range(_MEMORY_ROUNDS):
        balanced_tasks, rest = _rebalance(call, tasks, cost_model, limits, room_fraction)
        table = route_tasks(call, balanced_tasks)
        held = _buffer_bytes(call, table if direction == "forward" else derive_backward(call, table, "refetch-home"))
        if rest or held.max() <= budget:
            break
        room_fraction *= np.where(held > budget, 0.9 * budget / np.maximum(held, 1), 1.0)
    if rest or held.max() > budget:
        raise DistattnError(
            f"cad cannot keep every rank within {limits.tolerance} of its part of the work and within {budget:,} bytes of "
            f"others' tensors in the {direction} pass. Raise max_buffer_bytes or tolerance."
        )
    return balanced_tasks


def _rebalance(
    call: Call, tasks: Columns, cost_model: CostModel, limits: _Limits, room_fraction: np.ndarray
) -> tuple[Columns, int]:
    """Return tasks for the same work, with ranks within their limits where possible, and the cost that remains above the
    limits.

    room_fraction: the fraction of its room that each receiver may use, (ranks,).
    """
    weights = bytes_per_row_and_key(call, cost_model.direction)
    cost = cost_model.task_costs(call, tasks)
    load = np.zeros(call.ranks, np.int64)
    np.add.at(load, tasks["rank"], cost)
    limit = work_limits(int(load.sum()), limits.speeds, limits.tolerance)
    excess, room = np.maximum(load - limit, 0), np.maximum(limit - load, 0)
    if not excess.any():
        return tasks, 0
    chosen = _most_work_per_byte(tasks, cost, excess, weights)
    home, leaving = tasks["rank"][chosen], select_rows(tasks, chosen)
    items = WorkItems(leaving["piece"], task_bands(call.mask, leaving), leaving["h0"], leaving["h1"])
    fraction = np.minimum(excess / np.maximum(np.bincount(home, cost[chosen], call.ranks), 1), 1.0)[home]
    # a typical receiver's room
    typical = max(sum(space * space for space in room.tolist()) // int(room.sum()), 1)
    receivers = -(-excess[home] // typical)
    cut = cut_into_lanes(items, home, fraction, receivers, cost_model, call.gqa_group_size, weights)
    # cutting work raises its cost, so all limits rise a little
    extra = np.append(cut.extra, np.zeros(call.ranks - len(cut.extra), np.int64))
    limit = work_limits(int(load.sum() + extra.sum()), limits.speeds, limits.tolerance)
    excess = np.where(excess > 0, np.maximum(load - limit, 0) + extra, 0)
    room = (np.maximum(limit - load, 0) * room_fraction).astype(np.int64)
    densest = {rank: piece for rank, piece in zip(home[::-1].tolist(), leaving["piece"][::-1].tolist(), strict=True)}
    peers = {rank: tasks["rank"][tasks["piece"] == piece] for rank, piece in densest.items()}
    transfers = Transfers(*match_work(excess, room, limits.node, peers))
    stays = np.ones(len(cost), bool)
    stays[chosen] = False
    rest = int(excess.sum() - transfers.cost.sum())
    moved = assign_lanes(cut, transfers, cost_model)
    return concat_rows(TASK_COLUMNS, [select_rows(tasks, stays), moved]), rest


def _buffer_bytes(call: Call, table: Table) -> Ints:
    """Return an upper bound on the bytes that each rank holds of other ranks' tensors and of results for other ranks."""
    size = move_bytes(call, table.moves)
    arriving = np.bincount(table.moves["dst"], size, call.ranks)
    is_result = np.isin(table.moves["payload"], REDUCED_PAYLOADS)
    return (arriving + np.bincount(table.moves["src"], size * is_result, call.ranks)).astype(np.int64)


def _most_work_per_byte(tasks: Columns, cost: Ints, excess: Ints, weights: tuple[int, int]) -> Ints:
    """Return the tasks from which overloaded ranks hand off work: those with the most work per byte, sorted by rank."""
    mine = np.flatnonzero(excess[tasks["rank"]] > 0)
    rows, keys = tasks["q1"][mine] - tasks["q0"][mine], tasks["k1"][mine] - tasks["k0"][mine]
    work_per_byte = cost[mine] / (weights[0] * rows + weights[1] * keys)
    order = mine[np.lexsort((-work_per_byte, tasks["rank"][mine]))]
    rank, size = tasks["rank"][order], cost[order]
    before = np.cumsum(size) - size
    before -= before[np.searchsorted(rank, rank)]
    return order[before * _DENSE_FRACTION < excess[rank]]
