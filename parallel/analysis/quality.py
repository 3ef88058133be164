"""How good a plan is: the busiest server, what moves, and how far that is from what any plan as even would have to move."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distattn.cluster.cost import attention_speed, flops_of
from distattn.cluster.spec import Description, Machines
from distattn.ir.intervals import Ints
from distattn.ir.plan import TASK_COLUMNS, Payload, Plan, Table, areas_of_tasks, bytes_of_moves, columns, take
from distattn.parallel.tables.cost import Price, bytes_each
from distattn.parallel.tables.partition import owned, pieces, split_by_query_owner

_BLOCK = 128


@dataclass(frozen=True)
class Half:
    """One direction of a plan.

    cells, cost: the busiest rank over the mean, in cells x heads and in what kernels take for them (`work.Price`).
    seconds: of the busiest rank's kernels, by the cluster's table (None without one). moved: bytes in all; busiest_sender, of one
    rank; crossing, between nodes. least: bytes that any plan as even in cells has to move.
    """

    cells: float
    cost: float
    seconds: float | None
    moved: int
    busiest_sender: int
    crossing: int
    least: int

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f" ({self.seconds * 1e3:.2f} ms of kernels)"
        return (
            f"busiest {self.cells:.3f} of the mean in cells, {self.cost:.3f} in cost{seconds}; moved {self.moved / 1e9:.3f} "
            f"GB, {self.busiest_sender / 1e9:.3f} by one rank, {self.crossing / 1e9:.3f} between nodes; at least "
            f"{self.least / 1e9:.3f}"
        )


def quality(plan: Plan, cluster: Machines | None = None) -> dict[str, Half]:
    """By direction ("forward", "backward")."""
    return {name: _half(plan, name, getattr(plan, name), cluster) for name in ("forward", "backward")}


def as_dict(found: dict[str, Half]) -> dict[str, dict[str, Any]]:
    """The same as plain numbers."""
    return {direction: asdict(half) for direction, half in found.items()}


def _half(plan: Plan, direction: str, table: Table, cluster: Machines | None) -> Half:
    call, moves = plan.call, table.moves
    price = Price.on(cluster, direction, call.head_dim, _BLOCK)
    cost = price.loads(call, table.tasks)
    cells = np.bincount(table.tasks["rank"], areas_of_tasks(call, table.tasks).astype(float), call.ranks)
    seconds = None
    if isinstance(cluster, Description):
        lengths = np.array([1 << 20])
        speed = float(attention_speed(cluster, direction, call.head_dim, lengths, lengths)[0])
        seconds = int(cost.max(initial=0)) * _BLOCK * flops_of(direction, call.head_dim, call.v_head_dim) / speed
    size = bytes_of_moves(call, moves)
    node = np.zeros(call.ranks, np.int64) if cluster is None else cluster.node
    return Half(
        _uneven(cells),
        _uneven(cost),
        seconds,
        int(size.sum()),
        int(np.bincount(moves["src"], size, call.ranks).max()),
        int(size[node[moves["src"]] != node[moves["dst"]]].sum()),
        int(_least(plan, direction, cells.max(initial=0.0)).sum()),
    )


def _least(plan: Plan, direction: str, most: float) -> np.ndarray:
    """Bytes that have to move for work each rank could do without moving any, if none does more than `most` cells x heads.

    What passes `most` has to be computed elsewhere. A server that computes w cells of one group of g heads needs R rows and
    C keys of it with R * C >= w / g, and so at least 2 * sqrt(R * C * bytes of a row * bytes of a key) bytes of this group.
    The root is concave: least moves when few servers get as much as they can, and nobody gets more than `most`, or
    than all that a rank has of one group.
    """
    call = plan.call
    area, rank = split_by_query_owner(call, pieces(call), call.layout.chunks)
    tasks = columns(TASK_COLUMNS, step=0, rank=rank, **vars(area))
    tasks = take(tasks, owned(call, rank, area.k0, area.k1))
    cells = areas_of_tasks(call, tasks).astype(float)
    excess = np.maximum(np.bincount(tasks["rank"], cells, call.ranks) - most, 0)
    # of one group; where heads differ, no less than that
    largest = np.bincount(tasks["rank"], cells / (tasks["h1"] - tasks["h0"]) * call.group, call.ranks)
    portion = np.maximum(np.minimum(largest, most), 1.0)
    row, key = bytes_each(call, direction)
    if direction == "backward" and plan.policy == "keep":
        # queries, keys and values are still there
        row -= call.heads * call.cell_bytes(Payload.Q)
        key -= call.kv_heads * call.cell_bytes(Payload.KV)
    # bytes of a row and a key of one group
    both = (row / call.kv_heads) * (key / call.kv_heads)
    whole = np.floor(excess / portion)
    return 2 * (whole * np.sqrt(both * portion / call.group) + np.sqrt(both * (excess - whole * portion) / call.group))


def _uneven(load: np.ndarray | Ints) -> float:
    return float(load.max() / load.mean()) if load.any() else 1.0
