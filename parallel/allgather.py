"""All-gather attention: queries stay, every rank fetches the keys and values its own queries see.

Llama 3 (Dubey et al. 2024, arXiv 2407.21783, section 3.3.2) gathers all keys; here only those some local query needs
are sent, once each, straight from their owner. What needs no foreign key is computed while they travel.
"""

from __future__ import annotations

import numpy as np

from distattn.parallel.ownership import fetch, owned, pieces, split_by_query_owner
from distattn.plan import TASK_COLUMNS, Call, Payload, Table, columns


def allgather(call: Call) -> Table:
    """Tasks and moves of one all-gather pass: fetch at step 0, compute at steps 0 (own keys) and 1."""
    area, rank = split_by_query_owner(call, pieces(call))
    step = np.where(owned(call, rank, area.k0, area.k1), 0, 1)
    tasks = columns(TASK_COLUMNS, step=step, rank=rank, **vars(area), h0=0, h1=call.heads)
    return Table(tasks, fetch(call, Payload.KV, 0, rank, area.k0, area.k1, 0, call.kv_heads))
