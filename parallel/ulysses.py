"""Ulysses: every rank gathers all tokens of a few heads, computes whole sequences, and sends the outputs back.

Jacobs et al. 2023, arXiv 2309.14509. Query heads are split as evenly as whole heads allow; a key/value head goes to
every rank that has a query head of its group. More ranks than query heads are refused.
"""

from __future__ import annotations

import numpy as np

from distattn.errors import DistattnError
from distattn.parallel.ownership import fetch, pieces, reversed_as
from distattn.plan import MOVE_COLUMNS, TASK_COLUMNS, Call, Payload, Table, columns, concat


def ulysses(call: Call) -> Table:
    """Tasks and moves of one Ulysses pass: queries, keys and values out at step 0, compute at 1, outputs home at 2."""
    if call.ranks > call.heads:
        raise DistattnError(
            f"ulysses splits {call.heads} query heads over {call.ranks} ranks: at most {call.heads} ranks can take part. "
            f'Use strategy "ring" or "allgather", or at most {call.heads} ranks.'
        )
    area = pieces(call)
    bounds = np.arange(call.ranks + 1) * call.heads // call.ranks
    tasks, moves = [], []
    for rank in range(call.ranks):
        h0, h1 = int(bounds[rank]), int(bounds[rank + 1])
        here = np.full(len(area.piece), rank)
        queries = fetch(call, Payload.Q, 0, here, area.q0, area.q1, h0, h1)
        keys = fetch(call, Payload.KV, 0, here, area.k0, area.k1, h0 // call.group, -(-h1 // call.group))
        tasks.append(columns(TASK_COLUMNS, step=1, rank=rank, **vars(area), h0=h0, h1=h1))
        moves += [queries, keys, reversed_as(queries, Payload.O, 2)]
    return Table(concat(TASK_COLUMNS, tasks), concat(MOVE_COLUMNS, moves))
