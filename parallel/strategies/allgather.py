"""All-gather attention: queries stay, and every rank fetches the keys and values that its own queries attend to.

Llama 3 (Dubey et al. 2024, arXiv 2407.21783, section 3.3.2) gathers all keys. Here, only the keys that a rank's queries need are
sent to it, once each, from their owner. Given a cluster, keys that several ranks of another node need enter that node once and
are forwarded within it. Tasks that need only local keys run while other keys travel, but only if they are a large enough part of
the rank's work, because a second kernel call requires copies that split the rows and join them again.
"""

from __future__ import annotations

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.intervals import Ints, expand_ranges, merge_intervals
from distattn.ir.plan import (
    TASK_COLUMNS,
    Call,
    Columns,
    Payload,
    Table,
    make_columns,
    task_areas,
    task_bands,
    task_token_ranges,
)
from distattn.parallel.tables.partition import mask_rectangles, owns_range, split_by_query_owner
from distattn.parallel.tables.routes import remote_users, send_direct, send_hierarchical

# the smallest fraction of a rank's work for which tasks on local keys get their own kernel call
_LEAST_EARLY = 1 / 8


def allgather(call: Call, cluster: AnyCluster | None = None) -> list[Table]:
    """Return one candidate table. Step 0 fetches keys, and step 1 forwards them within nodes.

    Tasks run in step 0 (local keys, if that is enough work), step 1, or step 2 (forwarded keys)."""
    area, rank = split_by_query_owner(call, mask_rectangles(call), call.layout.chunks)
    early = owns_range(call, rank, area.k0, area.k1)
    tasks = make_columns(TASK_COLUMNS, step=np.where(early, 0, 1), rank=rank, **vars(area))
    step = np.where(early & _many_are_early(call, tasks)[rank], 0, 1)
    tasks = {**tasks, "step": step}
    users = remote_users(call, Payload.KV, tasks)
    if cluster is None:
        return [Table(tasks, send_direct(Payload.KV, users, 0))]
    moves, late = send_hierarchical(Payload.KV, users, cluster.node)
    return [Table({**tasks, "step": step + _uses_late_keys(call, tasks, late)}, moves)]


def _many_are_early(call: Call, tasks: Columns) -> np.ndarray:
    """Return which ranks have at least `_LEAST_EARLY` of their work in tasks of step 0, bool (ranks,)."""
    work = task_areas(call, tasks, task_bands(call.mask, tasks)).astype(np.float64)
    whole, early = (
        np.bincount(tasks["rank"], work * chosen, call.ranks) for chosen in (np.ones(len(work)), tasks["step"] == 0)
    )
    return early >= _LEAST_EARLY * whole


def _uses_late_keys(call: Call, tasks: Columns, late: Columns) -> Ints:
    """Return 1 for each task that needs keys in `late`, which its rank receives in step 1, and 0 for all other tasks."""
    ranges = task_token_ranges(call, Payload.KV, tasks)
    task, task_head = expand_ranges(ranges["h0"], ranges["h1"])
    row, head = expand_ranges(late["h0"], late["h1"])
    line, low, high = merge_intervals(late["rank"][row] * call.kv_heads + head, late["t0"][row], late["t1"][row])
    width = call.mask.n + 1
    base = (tasks["rank"][task] * call.kv_heads + task_head) * width
    before = np.searchsorted(line * width + high, base + ranges["t0"][task], "right")
    hit = before < np.searchsorted(line * width + low, base + ranges["t1"][task], "left")
    out = np.zeros(len(ranges["t0"]), np.int64)
    np.maximum.at(out, task, hit.astype(np.int64))
    return out
