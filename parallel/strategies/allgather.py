"""All-gather attention: queries stay, every rank fetches the keys and values its own queries see.

Llama 3 (Dubey et al. 2024, arXiv 2407.21783, section 3.3.2) gathers all keys; here only those some local query needs
are sent, once each, from their owner. Given a cluster, what several ranks of another node need crosses once and is
passed on inside that node. What needs no foreign key is computed while they travel.
"""

from __future__ import annotations

import numpy as np

from distattn.cluster.spec import Machines
from distattn.ir.intervals import Ints, expand, union
from distattn.ir.plan import TASK_COLUMNS, Call, Columns, Payload, Table, cells_of_tasks, columns
from distattn.parallel.tables.partition import owned, pieces, split_by_query_owner
from distattn.parallel.tables.routes import guests, relay, star


def allgather(call: Call, cluster: Machines | None = None) -> list[Table]:
    """Tasks and moves of one pass: fetch at step 0, pass on at 1; compute at 0 (own keys), 1, and 2 (passed-on keys)."""
    area, rank = split_by_query_owner(call, pieces(call), call.layout.chunks)
    step = np.where(owned(call, rank, area.k0, area.k1), 0, 1)
    tasks = columns(TASK_COLUMNS, step=step, rank=rank, **vars(area))
    seen = guests(call, Payload.KV, tasks)
    if cluster is None:
        return [Table(tasks, star(Payload.KV, seen, 0))]
    moves, late = relay(Payload.KV, seen, cluster.node)
    return [Table({**tasks, "step": step + _needs(call, tasks, late)}, moves)]


def _needs(call: Call, tasks: Columns, late: Columns) -> Ints:
    """1 for each task that needs some (rank, head, token) of `late`."""
    cells = cells_of_tasks(call, Payload.KV, tasks)
    task, task_head = expand(cells["h0"], cells["h1"])
    row, head = expand(late["h0"], late["h1"])
    line, low, high = union(late["rank"][row] * call.kv_heads + head, late["t0"][row], late["t1"][row])
    width = call.mask.n + 1
    base = (tasks["rank"][task] * call.kv_heads + task_head) * width
    before = np.searchsorted(line * width + high, base + cells["t0"][task], "right")
    hit = before < np.searchsorted(line * width + low, base + cells["t1"][task], "left")
    out = np.zeros(len(cells["t0"]), np.int64)
    np.maximum.at(out, task, hit.astype(np.int64))
    return out
