"""Ulysses: every rank gathers all tokens of a few heads, computes whole sequences, and sends the outputs back.

Jacobs et al. 2023, arXiv 2309.14509. Query heads are split as evenly as whole heads allow; a key/value head goes to
every rank that has a query head of its group. More ranks than query heads are refused.
"""

from __future__ import annotations

from distattn.cluster.spec import Machines
from distattn.ir.errors import DistattnError
from distattn.ir.plan import MOVE_COLUMNS, TASK_COLUMNS, Call, Payload, Table, columns, concat
from distattn.parallel.tables.partition import pieces, split_heads
from distattn.parallel.tables.routes import guests, reversed_as, star


def ulysses(call: Call, cluster: Machines | None = None) -> list[Table]:
    """Tasks and moves of one Ulysses pass: queries, keys and values out at step 0, compute at 1, outputs home at 2."""
    if call.ranks > call.heads:
        raise DistattnError(
            f"ulysses splits {call.heads} query heads over {call.ranks} ranks: at most {call.heads} ranks can take part. "
            f'Use strategy "usp", "ring" or "allgather", or at most {call.heads} ranks.'
        )
    area, _, rank = split_heads(pieces(call), call.ranks, call.heads)
    tasks = columns(TASK_COLUMNS, step=1, rank=rank, **vars(area))
    queries = star(Payload.Q, guests(call, Payload.Q, tasks), 0)
    keys = star(Payload.KV, guests(call, Payload.KV, tasks), 0)
    return [Table(tasks, concat(MOVE_COLUMNS, [queries, keys, reversed_as(queries, Payload.O, 2)]))]
