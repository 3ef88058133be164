"""Make the tables of `scan`: turn chains of segments and their schedules into the tasks and moves of one direction."""

# R ranks, N tokens on the axis, H heads

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from distattn.ir.intervals import Ints
from distattn.ir.layout import Layout
from distattn.ir.plan import (
    MOVE_COLUMNS,
    TASK_COLUMNS,
    Call,
    Columns,
    Payload,
    Table,
    concat_rows,
    has_rows_and_keys,
    select_rows,
)
from distattn.parallel.strategies.scan_schedules import Chain, Schedule, Segment, needed_sends
from distattn.parallel.tables.routes import remote_users, reversed_moves, send_direct

# tasks (A, 9) and moves (B, 8), with the columns of a table
TableRows = tuple[Ints, Ints]


def layout_chains(call: Call, layout: Layout) -> list[Chain]:
    """Return the chain of each document when every rank computes the tokens that `layout` assigns to it."""
    chunks = layout.chunks
    order = np.argsort(chunks["t0"])
    t0, t1, rank = (chunks[name][order] for name in ("t0", "t1", "rank"))
    chains = []
    for piece, (begin, end) in enumerate(call.documents.tolist()):
        inside = slice(np.searchsorted(t1, begin, "right"), np.searchsorted(t0, end))
        rows = zip(t0[inside].tolist(), t1[inside].tolist(), rank[inside].tolist(), strict=True)
        segments = [Segment(max(a, begin), min(b, end), at) for a, b, at in rows]
        chains.append(Chain(piece, begin, end, 0, call.heads, segments))
    return chains


def ranks_of_chains(chains: Iterable[Chain]) -> list[int]:
    """Return the ranks that have tokens.

    The other ranks take no part in recurrences. They may be servers, which compute only attention.
    """
    return sorted({segment.rank for chain in chains for segment in chain.segments})


def chain_rows(chain: Chain, schedule: Schedule, ranks: Sequence[int], direction: str) -> TableRows:
    """Return the tasks of a chain and the moves of its states."""
    back = direction == "backward"
    payload = int(Payload.dS if back else Payload.S)
    path = chain.mirrored() if back else chain
    computes, sends = schedule(path, ranks)
    tasks, moves = [], []
    for step, number, whole in computes:
        t0, t1, rank = path.segments[number]
        if whole:
            box = (t0, chain.t1 if back else t1, chain.t0, t1)
        else:
            box = (t0, t1, t1, t1) if back else (t0, t0, t0, t1)
        # step 0 is reserved for moving tokens
        tasks.append((step + 1, rank, chain.piece, *box, chain.h0, chain.h1))
    for step, src, dst, first, end, h0, h1 in needed_sends(path, computes, sends):
        edges = path.segments[first], path.segments[end - 1]
        interval = min(edge.t0 for edge in edges), max(edge.t1 for edge in edges)
        moves.append((step + 1, src, dst, payload, *interval, h0, h1))
    return (
        np.array(tasks, np.int64).reshape(-1, len(TASK_COLUMNS)),
        np.array(moves, np.int64).reshape(-1, len(MOVE_COLUMNS)),
    )


def concatenate_rows(rows: Iterable[TableRows]) -> TableRows:
    """Concatenate the rows of several chains."""
    nothing = np.zeros((0, len(TASK_COLUMNS)), np.int64), np.zeros((0, len(MOVE_COLUMNS)), np.int64)
    tasks, moves = (np.concatenate(parts) for parts in zip(nothing, *rows, strict=True))
    return tasks, moves


def table_of_rows(
    call: Call, rows: Iterable[TableRows], direction: str, label: str = "", tokens_move: bool = True
) -> Table:
    """Return a table with the rows of all chains, the moves of tokens to the ranks that compute them, and the moves of
    results back.

    tokens_move: False if all tokens are computed by their owners, so that only states move.
    """
    tasks, moves = concatenate_rows(rows)
    table = Table.from_rows(tasks, moves, label)
    if not tokens_move:
        return table
    tokens = _token_moves(call, table, direction == "backward")
    return Table(table.tasks, concat_rows(MOVE_COLUMNS, [table.moves, *tokens]), label)


def _token_moves(call: Call, table: Table, back: bool) -> list[Columns]:
    """Return the moves of tokens to the ranks that compute them and of results back. Tokens computed at home do not move."""
    tasks, last = table.tasks, table.steps
    whole = select_rows(tasks, has_rows_and_keys(tasks))

    def outward(payload: Payload, some: Columns) -> Columns:
        return send_direct(payload, remote_users(call, payload, some), 0)

    if back:
        home = [reversed_moves(outward(payload, whole), payload, last) for payload in (Payload.dQ, Payload.dKV)]
        return [outward(Payload.dO, tasks), *home]
    inputs = [outward(payload, tasks) for payload in (Payload.Q, Payload.KV)]
    return [*inputs, reversed_moves(outward(Payload.O, whole), Payload.O, last)]
