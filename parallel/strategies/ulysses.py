"""Ulysses: every rank gathers all tokens for a few heads, computes whole sequences, and sends the outputs back.

Jacobs et al. 2023, arXiv 2309.14509. Query heads are split as evenly as possible, and a key/value head goes to
every rank that has a query head of its group. More ranks than query heads are an error.
"""

from __future__ import annotations

from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.plan import MOVE_COLUMNS, TASK_COLUMNS, Call, Payload, Table, concat_rows, make_columns
from distattn.parallel.tables.partition import mask_rectangles, split_heads
from distattn.parallel.tables.routes import remote_users, reversed_moves, send_direct


def ulysses(call: Call, cluster: AnyCluster | None = None) -> list[Table]:
    """Return one candidate table. Step 0 sends queries, keys and values, step 1 computes, step 2 returns outputs."""
    if call.ranks > call.heads:
        raise DistattnError(
            f"ulysses splits {call.heads} query heads over {call.ranks} ranks: at most {call.heads} ranks can take part. "
            f'Use strategy "usp", "ring" or "allgather", or at most {call.heads} ranks.'
        )
    area, _, rank = split_heads(mask_rectangles(call), call.ranks, call.heads)
    tasks = make_columns(TASK_COLUMNS, step=1, rank=rank, **vars(area))
    queries = send_direct(Payload.Q, remote_users(call, Payload.Q, tasks), 0)
    keys = send_direct(Payload.KV, remote_users(call, Payload.KV, tasks), 0)
    # in a recurrence, queries may have fewer heads than outputs
    outputs = send_direct(Payload.O, remote_users(call, Payload.O, tasks), 0)
    return [Table(tasks, concat_rows(MOVE_COLUMNS, [queries, keys, reversed_moves(outputs, Payload.O, 2)]))]
