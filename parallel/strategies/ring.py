"""Ring attention: tokens travel around the ranks, one hop per step, and each rank uses them as they pass.

Liu, Zaharia, Abbeel 2023, arXiv 2310.01889. Either keys and values travel and queries stay, or queries travel and
outputs return to their owners (as in BurstAttention, Sun et al. 2024, arXiv 2403.09347). Both are candidates, in the forward and
the backward pass. Ranks that do not use a token are skipped, and ranks that share no documents form separate rings. Balance
comes from the layout (zigzag), not from this strategy.
"""

from __future__ import annotations

from dataclasses import dataclass

from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints
from distattn.ir.plan import MOVE_COLUMNS, TASK_COLUMNS, Call, Payload, Table, concat_rows, make_columns
from distattn.parallel.tables.partition import Rectangles, split_by_owners
from distattn.parallel.tables.rings import hops_in_rings
from distattn.parallel.tables.routes import reduce_along_ring, remote_users, send_along_ring

_ROTATIONS = ("fewest bytes", "keys", "queries")


@dataclass(frozen=True)
class RingOptions:
    """Options of "ring".

    rotate: the tokens that travel: "keys" (with their values), "queries", or "fewest bytes" for whichever moves less data.
    """

    rotate: str = "fewest bytes"

    def __post_init__(self) -> None:
        if self.rotate not in _ROTATIONS:
            raise DistattnError(f"ring rotates one of {', '.join(_ROTATIONS)}, not {self.rotate!r}.")


def ring(call: Call, cluster: AnyCluster | None = None, options: RingOptions = RingOptions()) -> list[Table]:
    """Return a candidate table for each allowed rotation. Tokens from d hops away are used in step d."""
    parts = split_by_owners(call)
    candidates = {"keys": _rotate_keys, "queries": _rotate_queries}
    return [make(call, *parts) for name, make in candidates.items() if options.rotate in (name, "fewest bytes")]


def _rotate_keys(call: Call, area: Rectangles, query_owner: Ints, key_owner: Ints) -> Table:
    hops = hops_in_rings(key_owner, query_owner, call.ranks)
    tasks = make_columns(TASK_COLUMNS, step=hops, rank=query_owner, **vars(area))
    return Table(tasks, send_along_ring(Payload.KV, remote_users(call, Payload.KV, tasks)))


def _rotate_queries(call: Call, area: Rectangles, query_owner: Ints, key_owner: Ints) -> Table:
    hops = hops_in_rings(query_owner, key_owner, call.ranks)
    tasks = make_columns(TASK_COLUMNS, step=hops, rank=key_owner, **vars(area))
    queries = send_along_ring(Payload.Q, remote_users(call, Payload.Q, tasks))
    outputs = reduce_along_ring(Payload.O, remote_users(call, Payload.O, tasks, latest=True))
    return Table(tasks, concat_rows(MOVE_COLUMNS, [queries, outputs]))
