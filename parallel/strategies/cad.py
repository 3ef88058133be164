"""Core-attention disaggregation: ranks with too much attention hand some of it to ranks with too little.

Core attention has no weights, so any rank may serve any piece of it (Zhuang et al. 2025, arXiv 2510.18121). Queries, keys
and values travel to the server, outputs home; all else stays where the tokens are. Unlike that paper's greedy rule
(`cad_greedy`) every server is bounded, shares are head groups, rows and ranges of keys, and what is counted is what moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distattn.cluster.spec import Description, Machines
from distattn.ir.bands import tighten
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints, lexical_order, runs, whole_numbers
from distattn.ir.plan import (
    ACCUMULATING,
    MOVE_COLUMNS,
    TASK_COLUMNS,
    Call,
    Columns,
    Payload,
    Table,
    bytes_of_moves,
    columns,
    concat,
    take,
    task_bands,
)
from distattn.parallel.analysis.simulate import timed
from distattn.parallel.strategies.cad_cut import Rows, Shares, cut_off, groups_of, open_up, shape
from distattn.parallel.strategies.cad_match import give
from distattn.parallel.tables.backward import derive
from distattn.parallel.tables.cost import Price, bytes_each
from distattn.parallel.tables.partition import owned, pieces, split_by_key_owner, split_by_query_owner
from distattn.parallel.tables.routes import guests, star, straight_home

# beyond this share of an item its first rows, which hold little work for their bytes, have to leave as well
_CHEAP = 0.75
_MILLION = 1_000_000
# attempts to keep every rank within the capacity
_ROUNDS = 6
# tolerances that are tried where the one asked for makes messages take longer than they save
_LOOSER = (0.1, 0.3, 1.0, 3.0)


def cad(
    call: Call,
    cluster: Machines | None = None,
    *,
    direction: str = "forward",
    tolerance: float = 0.02,
    speeds: Sequence[int] | None = None,
    capacity: int | None = None,
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
    if int(whole_numbers(block, "block")) < 1:
        raise DistattnError(f"block is at least 1 token, not {block}.")
    rate = np.ones(call.ranks, np.int64) if speeds is None else whole_numbers(speeds, "speeds")
    if rate.shape != (call.ranks,) or (rate < 0).any() or (rate > _MILLION).any() or not rate.any():
        raise DistattnError(
            f"speeds are {call.ranks} whole numbers up to {_MILLION:,}, one for each rank, not all 0; not {speeds}."
        )
    if capacity is not None and int(whole_numbers(capacity, "capacity")) < 0:
        raise DistattnError(f"capacity is a number of bytes, not {capacity}.")
    if call.mask.area() // block * (1 if call.mask.heads else call.heads) >= 1 << 61:
        raise DistattnError(f"this much work cannot be counted in blocks of {block} x {block}; use a larger block.")
    price = Price.on(cluster, direction, call.head_dim, block)
    tasks = at_home(call, price)
    node = np.zeros(call.ranks, np.int64) if cluster is None else cluster.node
    bounds = _Bounds(node, rate, tolerance, capacity)
    shared = routed(call, _within_capacity(call, tasks, price, bounds))
    # a table of speeds knows nothing of ranks that are slower than it says
    if not isinstance(cluster, Description) or (rate != rate[0]).any():
        return [shared]

    def seconds(table: Table) -> float:
        # the backward pass moves what the forward pass does, and gradients
        whole = table if direction == "forward" else derive(call, table, "refetch-home", cluster)
        return timed(call, cluster, direction, whole).seconds

    best, stay = (seconds(shared), shared), routed(call, tasks)
    if (alone := seconds(stay)) > best[0]:
        return [shared]
    best = alone, stay
    # moving so much takes longer than it saves: perhaps moving less does not
    for looser in _LOOSER:
        if looser > tolerance:
            table = routed(call, _within_capacity(call, tasks, price, bounds._replace(tolerance=looser)))
            if (found := seconds(table)) < best[0]:
                best = found, table
    return [best[1]]


class _Bounds(NamedTuple):
    """What shares have to keep to: nodes, speeds and capacity of ranks, and the tolerance."""

    node: Ints
    rate: Ints
    tolerance: float
    capacity: int | None


def _within_capacity(call: Call, tasks: Columns, price: Price, bounds: _Bounds) -> Columns:
    """The work shared out so that nobody holds more than the capacity; refused where that breaks the tolerance."""
    scale, capacity = np.ones(call.ranks), bounds.capacity
    held, left = np.zeros(call.ranks, np.int64), 0
    for _ in range(_ROUNDS):
        found, left = _shared_out(call, tasks, price, bounds, scale)
        if capacity is None:
            return found
        table = routed(call, found)
        held = _held(call, table if price.direction == "forward" else derive(call, table, "refetch-home"))
        if left or held.max() <= capacity:
            break
        scale *= np.where(held > capacity, 0.9 * capacity / np.maximum(held, 1), 1.0)
    if left or held.max() > capacity:
        raise DistattnError(
            f"cad cannot keep every rank within {bounds.tolerance} of its part of the work and within {capacity:,} bytes of "
            f"others' tensors in the {price.direction} pass. Raise capacity or tolerance."
        )
    return found


def allowed(work: int, rate: Ints, tolerance: float) -> Ints:
    """What each rank may have to do: its part of all work, by its rate, and the tolerance."""
    # Python integers: the product passes int64
    share = _MILLION + round(tolerance * _MILLION)
    parts = [-(-work * share * own // (int(rate.sum()) * _MILLION)) for own in rate.tolist()]
    return np.array(parts, np.int64)


def at_home(call: Call, price: Price) -> Columns:
    """Every task at the rank of its queries; where other ways move fewer bytes, at that of its keys, or by groups of heads."""
    weights = bytes_each(call, price.direction)
    area, rank = split_by_query_owner(call, pieces(call), call.layout.chunks)
    tasks = columns(TASK_COLUMNS, step=0, rank=rank, **vars(area))
    if owned(call, rank, area.k0, area.k1).all():
        return tasks
    part, row, key_owner = split_by_key_owner(call, area, call.layout.chunks)
    away = (key_owner != rank[row]) & (weights[0] * (part.q1 - part.q0) < weights[1] * (part.k1 - part.k0))
    split = np.zeros(len(rank), bool)
    split[row[away]] = True
    parts = columns(TASK_COLUMNS, step=0, rank=np.where(away, key_owner, rank[row]), **vars(part))
    tasks = concat(TASK_COLUMNS, [take(tasks, ~split), take(parts, split[row])])
    return _by_heads(call, tasks, price, weights)


def _by_heads(call: Call, tasks: Columns, price: Price, weights: tuple[int, int]) -> Columns:
    """The same, but pieces of many owners by lanes (see `cutting`), an equal share for each, where that moves fewer bytes."""
    order = lexical_order(tasks["piece"], tasks["rank"])
    first = runs(tasks["piece"][order], tasks["rank"][order])
    piece, owner = tasks["piece"][order][first], tasks["rank"][order][first]
    seen = np.maximum.reduceat(tasks["k1"][order], first) - np.minimum.reduceat(tasks["k0"][order], first)
    here = np.add.reduceat((tasks["q1"] - tasks["q0"])[order], first)
    size = len(call.mask.pieces)
    owners, keys = np.bincount(piece, minlength=size), np.bincount(piece, np.maximum(seen - here, 0), size)
    wide = np.flatnonzero(owners > 2)
    if not len(wide):
        return tasks
    items = Rows(wide, tighten(call.mask.pieces[wide]), *call.piece_heads[wide].T)
    whole = np.ones(len(wide))
    *_, moved = shape(items, groups_of(items, call.group), whole, owners[wide], price, weights)
    # every owner has its own part of the rows and keys
    better = moved * (1 - 1 / owners[wide]) < weights[1] * keys[wide]
    wide, items = wide[better], items.at(better)
    if not len(wide):
        return tasks
    number = np.arange(len(wide))
    cut = open_up(items, number, whole[better], owners[wide], price, call.group, weights)
    mine = np.isin(piece, wide)
    giver = np.searchsorted(wide, piece[mine])
    total = np.zeros(len(wide), np.int64)
    np.add.at(total, cut.giver, price.of(cut.lanes.bands) * (cut.lanes.h1 - cut.lanes.h0))
    shares = Shares(giver, -(-total[giver] // owners[wide][giver]), owner[mine])
    return concat(TASK_COLUMNS, [take(tasks, ~np.isin(tasks["piece"], wide)), cut_off(cut, shares, price)])


def routed(call: Call, tasks: Columns) -> Table:
    """The table of these tasks: inputs straight from their owners, outputs straight home."""
    local = owned(call, tasks["rank"], tasks["q0"], tasks["q1"]) & owned(call, tasks["rank"], tasks["k0"], tasks["k1"])
    tasks = {**tasks, "step": np.where(local, 0, 1)}
    # most tasks have all they need at home
    away = take(tasks, ~local)
    moves = [
        star(Payload.Q, guests(call, Payload.Q, away), 0),
        star(Payload.KV, guests(call, Payload.KV, away), 0),
        straight_home(Payload.O, guests(call, Payload.O, away, latest=True)),
    ]
    return Table(tasks, concat(MOVE_COLUMNS, moves))


def _shared_out(call: Call, tasks: Columns, price: Price, bounds: _Bounds, scale: np.ndarray) -> tuple[Columns, int]:
    """(the same work, no rank above what it may have; what nobody would take).

    Takers take only this part of what they have room for.
    """
    node, rate, tolerance, _ = bounds
    weights = bytes_each(call, price.direction)
    cost = price.of_tasks(call, tasks)
    load = np.zeros(call.ranks, np.int64)
    np.add.at(load, tasks["rank"], cost)
    limit = allowed(int(load.sum()), rate, tolerance)
    excess, room = np.maximum(load - limit, 0), np.maximum(limit - load, 0)
    if not excess.any():
        return tasks, 0
    chosen = _worth_moving(tasks, cost, excess, weights)
    home, given = tasks["rank"][chosen], take(tasks, chosen)
    items = Rows(given["piece"], task_bands(call.mask, given), given["h0"], given["h1"])
    fraction = np.minimum(excess / np.maximum(np.bincount(home, cost[chosen], call.ranks), 1), 1.0)[home]
    # a typical taker has room for so much
    typical = max(sum(space * space for space in room.tolist()) // int(room.sum()), 1)
    cut = open_up(items, home, fraction, -(-excess[home] // typical), price, call.group, weights)
    # what is cut costs more: everybody may have a little more
    extra = np.append(cut.extra, np.zeros(call.ranks - len(cut.extra), np.int64))
    limit = allowed(int(load.sum() + extra.sum()), rate, tolerance)
    excess = np.where(excess > 0, np.maximum(load - limit, 0) + extra, 0)
    room = (np.maximum(limit - load, 0) * scale).astype(np.int64)
    main = {rank: piece for rank, piece in zip(home[::-1].tolist(), given["piece"][::-1].tolist(), strict=True)}
    peers = {rank: tasks["rank"][tasks["piece"] == piece] for rank, piece in main.items()}
    shares = Shares(*give(excess, room, node, peers))
    rest = np.ones(len(cost), bool)
    rest[chosen] = False
    left = int(excess.sum() - shares.cost.sum())
    return concat(TASK_COLUMNS, [take(tasks, rest), cut_off(cut, shares, price)]), left


def _held(call: Call, table: Table) -> Ints:
    """Bytes of others' tensors, and of results for others, that each rank has at most."""
    size = bytes_of_moves(call, table.moves)
    arriving = np.bincount(table.moves["dst"], size, call.ranks)
    made = np.isin(table.moves["payload"], ACCUMULATING)
    return (arriving + np.bincount(table.moves["src"], size * made, call.ranks)).astype(np.int64)


def _worth_moving(tasks: Columns, cost: Ints, excess: Ints, weights: tuple[int, int]) -> Ints:
    """The tasks that ranks with an excess give from, by rank: those with most work for their bytes."""
    mine = np.flatnonzero(excess[tasks["rank"]] > 0)
    rows, keys = tasks["q1"][mine] - tasks["q0"][mine], tasks["k1"][mine] - tasks["k0"][mine]
    worth = cost[mine] / (weights[0] * rows + weights[1] * keys)
    order = mine[np.lexsort((-worth, tasks["rank"][mine]))]
    rank, size = tasks["rank"][order], cost[order]
    before = np.cumsum(size) - size
    before -= before[np.searchsorted(rank, rank)]
    return order[before * _CHEAP < excess[rank]]
