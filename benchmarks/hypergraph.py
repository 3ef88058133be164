"""Core attention assigned by a general hypergraph partitioner, mtkahypar, with tokens left in place, for comparison.

The vertices are blocks of the score matrix, weighted by cells, and blocks of tokens, fixed to their owners. A net
connects a block of queries, or of keys, with the blocks of the score matrix that need it, and is weighted by bytes. The
partitioner is an offline heuristic; its result is not a bound.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import distattn as da
from distattn.ir.bands import areas, clip, tighten
from distattn.ir.plan import TASK_COLUMNS, Call, Plan, make_columns, nonempty_bands
from distattn.parallel.strategies.cad import route_tasks
from distattn.parallel.tables.backward import derive_backward
from distattn.parallel.tables.cost import bytes_per_row_and_key

BLOCK = 2048
# upper limit of the sum of vertex weights and of the sum of net weights, which mtkahypar computes in 32 bits
MOST = 1 << 29


@functools.cache
def _library() -> Any:
    try:
        import mtkahypar
    except ImportError:
        return None
    return mtkahypar.initialize(1)


def partitioned(mask: da.Mask, lengths: list[int], ranks: int, shape: dict[str, Any], tolerance: float) -> Plan | None:
    """Return a plan based on mtkahypar's partition, or None if mtkahypar is not installed."""
    if _library() is None:
        return None
    import mtkahypar

    layout = da.Layout.contiguous(lengths, ranks)
    call = Call(
        mask,
        layout,
        shape["heads"],
        shape["kv_heads"],
        shape["head_dim"],
        shape["head_dim"],
        shape["dtype"],
        shape["comm_dtype"],
    )
    bands = mask.pieces
    # divide each piece into blocks, starting at its first row and key
    parts = []
    for piece, band in enumerate(bands.tolist()):
        q = np.append(np.arange(band[0], band[1], BLOCK), band[1])
        k = np.append(np.arange(band[2], band[3], BLOCK), band[3])
        i, j = (x.ravel() for x in np.meshgrid(np.arange(len(q) - 1), np.arange(len(k) - 1), indexing="ij"))
        parts.append(np.stack([np.full(len(i), piece), q[i], q[i + 1], k[j], k[j + 1]], 1))
    rows = np.concatenate(parts)
    tight = tighten(clip(bands[rows[:, 0]], *rows[:, 1:].T))
    kept = nonempty_bands(tight)
    rows, tight = rows[kept], tight[kept]
    cells = areas(tight)
    row_bytes, key_bytes = bytes_per_row_and_key(call, "forward")
    # make each block of tokens a vertex, fixed to its owner
    starts = np.unique(np.concatenate([rows[:, 1], rows[:, 3]]))
    owner = layout.chunks["rank"][np.searchsorted(layout.chunks["t1"], starts, "right")]
    first = len(rows)
    nets, weights = [], []
    for low, high, each in ((1, 2, row_bytes), (3, 4, key_bytes)):
        for token in np.unique(rows[:, low]).tolist():
            users = np.flatnonzero(rows[:, low] == token)
            nets.append([first + int(np.searchsorted(starts, token)), *users.tolist()])
            weights.append(int(rows[users[0], high] - token) * each)
    scale = max(sum(weights) // MOST, 1)
    work = np.append(np.maximum(cells * (MOST // 2) // cells.sum(), 1), np.ones(len(starts), np.int64))
    library = _library()
    context = library.context_from_preset(mtkahypar.PresetType.DEFAULT)
    context.set_partitioning_parameters(ranks, tolerance, mtkahypar.Objective.KM1)
    mtkahypar.set_seed(0)
    context.logging = False
    graph = library.create_hypergraph(
        context, len(work), len(nets), nets, work.tolist(), [max(w // scale, 1) for w in weights]
    )
    fixed = np.full(len(work), -1)
    fixed[first:] = owner
    graph.add_fixed_vertices(fixed.tolist(), ranks)
    blocks = graph.partition(context)
    at = np.array([blocks.block_id(i) for i in range(first)])
    heads = call.piece_heads[rows[:, 0]]
    names = dict(zip(("q0", "q1", "k0", "k1"), tight[:, :4].T, strict=True))
    tasks = make_columns(TASK_COLUMNS, step=0, rank=at, piece=rows[:, 0], h0=heads[:, 0], h1=heads[:, 1], **names)
    forward = route_tasks(call, tasks)
    return Plan(call, forward, derive_backward(call, forward, "refetch-home"), "refetch-home", "mtkahypar")
