"""Attention in head chunks: the same tasks and moves with fewer heads at a time, so that buffers are smaller.

Every rank's heads are cut into chunks. Each chunk repeats the entire table for some of the heads, a few steps later. Chunks may
overlap, so that one chunk's messages travel while another chunk is computed. Untied Ulysses does this for Ulysses (UPipe, arXiv
2602.21196); here it works for every strategy. A key/value head shared by query heads in several chunks is sent for the first of
these chunks and stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from distattn.ir.intervals import Ints
from distattn.ir.plan import (
    KEY_PAYLOADS,
    MOVE_COLUMNS,
    TASK_COLUMNS,
    Call,
    Columns,
    Payload,
    Table,
    concat_rows,
    select_rows,
)


class HeadChunks(NamedTuple):
    """A way to cut a table. chunks: the number of chunks. stride: the number of steps from the start of one chunk to the
    start of the next."""

    chunks: int
    stride: int


def possible_head_chunks(call: Call, table: Table) -> Iterator[HeadChunks]:
    """Yield ways to cut a forward table into head chunks, from the fastest to the most memory-efficient.

    The number of chunks increases. If a table only sends, computes and returns, its chunks overlap, except in the last two
    ways, where they overlap less or not at all. In longer tables, steps overlap anyway, so chunks follow one another.
    """
    low, high = _heads_of_ranks(call, table.tasks)
    most = int((high - low).max(initial=1))
    counts = [1 << i for i in range(1, most.bit_length()) if 1 << i < most] + [most] * (most > 1)
    if table.steps > 3:
        yield from (HeadChunks(count, table.steps - 1) for count in counts)
        return
    yield from (HeadChunks(count, 1) for count in counts)
    # stride 2: results travel with the next chunk's inputs; stride 3: they travel alone
    yield from (HeadChunks(count, stride) for count in counts[-1:] for stride in (2, 3))


def in_head_chunks(call: Call, table: Table, cut: HeadChunks) -> Table:
    """Cut a forward table's heads into chunks. A move is cut at the chunk bounds of the rank that uses the moved tensors or has
    computed them."""
    low, high = _heads_of_ranks(call, table.tasks)
    limits = low[:, None] + (high - low)[:, None] * np.arange(cut.chunks + 1) // cut.chunks
    # a KV head shared by several chunks is sent with the first of them
    group = call.gqa_group_size
    key_limits = np.maximum.accumulate(-(-limits // group), 1)
    key_limits[:, 0] = 0
    key_limits[:, -1] = call.kv_heads
    tasks = _cut(table.tasks, table.tasks["rank"], limits, cut.stride)
    moves = []
    for payload in Payload:
        rows = select_rows(table.moves, table.moves["payload"] == payload)
        user = rows["src" if payload == Payload.O else "dst"]
        moves.append(_cut(rows, user, key_limits if payload in KEY_PAYLOADS else limits, cut.stride))
    return Table(concat_rows(TASK_COLUMNS, [tasks]), concat_rows(MOVE_COLUMNS, moves))


def _heads_of_ranks(call: Call, tasks: Columns) -> tuple[Ints, Ints]:
    """Return the query heads [low, high) of each rank's tasks, (ranks,). Ranks without tasks get all heads."""
    low, high = np.full(call.ranks, call.heads), np.zeros(call.ranks, np.int64)
    np.minimum.at(low, tasks["rank"], tasks["h0"])
    np.maximum.at(high, tasks["rank"], tasks["h1"])
    idle = low >= high
    return np.where(idle, 0, low), np.where(idle, call.heads, high)


def _cut(rows: Columns, rank: Ints, limits: Ints, stride: int) -> Columns:
    """Cut each row at its rank's chunk bounds. limits: first head of each chunk and end of the last, (ranks, chunks + 1)."""
    parts = []
    for chunk in range(limits.shape[1] - 1):
        h0 = np.maximum(rows["h0"], limits[rank, chunk])
        h1 = np.minimum(rows["h1"], limits[rank, chunk + 1])
        part = {**rows, "h0": h0, "h1": h1, "step": rows["step"] + chunk * stride}
        parts.append(select_rows(part, h0 < h1))
    return concat_rows(tuple(rows), parts)
