"""How good a plan is: the busiest server, what moves, and how far that is from what any plan as even would have to move."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distattn.cluster.cost import attention_speed, flops_per_cell
from distattn.cluster.spec import AnyCluster, ClusterSpec
from distattn.ir.intervals import Ints
from distattn.ir.plan import TASK_COLUMNS, Payload, Plan, Table, make_columns, move_bytes, select_rows, task_areas
from distattn.parallel.tables.cost import CostModel, bytes_per_row_and_key
from distattn.parallel.tables.partition import mask_rectangles, owns_range, split_by_query_owner

_BLOCK = 128


@dataclass(frozen=True)
class PassStats:
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


def quality(plan: Plan, cluster: AnyCluster | None = None) -> dict[str, PassStats]:
    """By direction ("forward", "backward")."""
    return {name: _pass_stats(plan, name, getattr(plan, name), cluster) for name in ("forward", "backward")}


def as_dict(found: dict[str, PassStats]) -> dict[str, dict[str, Any]]:
    """The same as plain numbers."""
    return {direction: asdict(half) for direction, half in found.items()}


def _pass_stats(plan: Plan, direction: str, table: Table, cluster: AnyCluster | None) -> PassStats:
    call, moves = plan.call, table.moves
    cost_model = CostModel.for_cluster(cluster, direction, call.head_dim, _BLOCK)
    cost = cost_model.rank_loads(call, table.tasks)
    cells = np.bincount(table.tasks["rank"], task_areas(call, table.tasks).astype(float), call.ranks)
    seconds = None
    if isinstance(cluster, ClusterSpec):
        lengths = np.array([1 << 20])
        speed = float(attention_speed(cluster, direction, call.head_dim, lengths, lengths)[0])
        seconds = int(cost.max(initial=0)) * _BLOCK * flops_per_cell(direction, call.head_dim, call.v_head_dim) / speed
    size = move_bytes(call, moves)
    node = np.zeros(call.ranks, np.int64) if cluster is None else cluster.node
    return PassStats(
        _uneven(cells),
        _uneven(cost),
        seconds,
        int(size.sum()),
        int(np.bincount(moves["src"], size, call.ranks).max()),
        int(size[node[moves["src"]] != node[moves["dst"]]].sum()),
        int(_lower_bound_bytes(plan, direction, cells.max(initial=0.0)).sum()),
    )


def _lower_bound_bytes(plan: Plan, direction: str, most: float) -> np.ndarray:
    """Bytes that have to move for work each rank could do without moving any, if none does more than `most` cells x heads.

    What passes `most` has to be computed elsewhere. A server that computes w cells of one group of g heads needs R rows and
    C keys of it with R * C >= w / g, and so at least 2 * sqrt(R * C * bytes of a row * bytes of a key) bytes of this group.
    The root is concave: least moves when few servers get as much as they can, and nobody gets more than `most`, or
    than all that a rank has of one group.
    """
    call = plan.call
    area, rank = split_by_query_owner(call, mask_rectangles(call), call.layout.chunks)
    tasks = make_columns(TASK_COLUMNS, step=0, rank=rank, **vars(area))
    tasks = select_rows(tasks, owns_range(call, rank, area.k0, area.k1))
    cells = task_areas(call, tasks).astype(float)
    excess = np.maximum(np.bincount(tasks["rank"], cells, call.ranks) - most, 0)
    # of one group; where heads differ, no less than that
    largest = np.bincount(tasks["rank"], cells / (tasks["h1"] - tasks["h0"]) * call.group, call.ranks)
    portion = np.maximum(np.minimum(largest, most), 1.0)
    row, key = bytes_per_row_and_key(call, direction)
    if direction == "backward" and plan.policy == "keep":
        # queries, keys and values are still there
        row -= call.heads * call.token_head_bytes(Payload.Q)
        key -= call.kv_heads * call.token_head_bytes(Payload.KV)
    # bytes of a row and a key of one group
    both = (row / call.kv_heads) * (key / call.kv_heads)
    whole = np.floor(excess / portion)
    return 2 * (whole * np.sqrt(both * portion / call.group) + np.sqrt(both * (excess - whole * portion) / call.group))


def _uneven(load: np.ndarray | Ints) -> float:
    return float(load.max() / load.mean()) if load.any() else 1.0
