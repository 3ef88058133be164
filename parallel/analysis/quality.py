"""The quality of a plan: the busiest rank's load, the bytes moved, and a lower bound on the bytes of equally balanced plans."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distattn.cluster.cost import recurrence_seconds
from distattn.cluster.spec import AnyCluster, ClusterSpec, resolve_cluster
from distattn.ir.arguments import checked
from distattn.ir.intervals import Ints
from distattn.ir.plan import (
    TASK_COLUMNS,
    Payload,
    Plan,
    has_rows_and_keys,
    make_columns,
    move_bytes,
    select_rows,
    task_areas,
)
from distattn.ir.text_format import readable_bytes
from distattn.parallel.tables.cost import CostModel, bytes_per_row_and_key
from distattn.parallel.tables.partition import mask_rectangles, owns_range, split_by_query_owner

_BLOCK = 128


@dataclass(frozen=True)
class PassStats:
    """Statistics for one direction of a plan.

    cells_imbalance, cost_imbalance: the busiest rank's load divided by the mean load, in cells x heads and in kernel cost
    (`CostModel`). kernel_seconds: kernel time of the busiest rank, or None if the cluster's speeds are unknown. moved_bytes:
    total over all ranks. max_sent_bytes: the most bytes sent by one rank. inter_node_bytes: bytes moved between nodes.
    lower_bound_bytes: the fewest bytes that a plan with equally balanced cells can move.
    """

    cells_imbalance: float
    cost_imbalance: float
    kernel_seconds: float | None
    moved_bytes: int
    max_sent_bytes: int
    inter_node_bytes: int
    lower_bound_bytes: int

    def __str__(self) -> str:
        seconds = "" if self.kernel_seconds is None else f" ({self.kernel_seconds * 1e3:.2f} ms of kernels)"
        return (
            f"busiest {self.cells_imbalance:.3f} of the mean in cells, {self.cost_imbalance:.3f} in cost{seconds}; moved "
            f"{readable_bytes(self.moved_bytes)}, {readable_bytes(self.max_sent_bytes)} by one rank, "
            f"{readable_bytes(self.inter_node_bytes)} between nodes; any plan as even moves at least "
            f"{readable_bytes(self.lower_bound_bytes)}"
        )


@checked
def quality(plan: Plan, cluster: AnyCluster | str | None = None) -> dict[str, PassStats]:
    """Return the statistics of both passes, keyed by direction ("forward", "backward"). cluster: a cluster or its name
    ("h200-8x8")."""
    cluster = resolve_cluster(cluster)
    return {name: _pass_stats(plan, name, cluster) for name in ("forward", "backward")}


def as_dict(stats: dict[str, PassStats]) -> dict[str, dict[str, Any]]:
    """Return the statistics as dicts of plain numbers."""
    return {direction: asdict(pass_stats) for direction, pass_stats in stats.items()}


def _pass_stats(plan: Plan, direction: str, cluster: AnyCluster | None) -> PassStats:
    call, table = plan.call, getattr(plan, direction)
    cells = np.bincount(table.tasks["rank"], task_areas(call, table.tasks).astype(float), call.ranks)
    seconds, cost = None, cells
    if call.op.is_recurrent:
        if isinstance(cluster, ClusterSpec):
            tasks, shape = table.tasks, (call.head_dim, call.v_head_dim)
            tokens, heads, whole = tasks["k1"] - tasks["q0"], tasks["h1"] - tasks["h0"], has_rows_and_keys(tasks)
            by_task = recurrence_seconds(cluster, direction, *shape, tokens, heads, whole)
            cost = np.bincount(tasks["rank"], by_task, call.ranks)
            seconds = float(cost.max(initial=0.0))
    else:
        cost_model = CostModel.for_cluster(cluster, direction, call.head_dim, _BLOCK)
        cost = cost_model.rank_costs(call, table.tasks)
        if isinstance(cluster, ClusterSpec):
            seconds = cost_model.seconds(call, cluster, int(cost.max(initial=0)))
    moves, size = table.moves, move_bytes(call, table.moves)
    node = np.zeros(call.ranks, np.int64) if cluster is None else cluster.node
    return PassStats(
        cells_imbalance=max_over_mean(cells),
        cost_imbalance=max_over_mean(cost),
        kernel_seconds=seconds,
        moved_bytes=int(size.sum()),
        max_sent_bytes=int(np.bincount(moves["src"], size, call.ranks).max()),
        inter_node_bytes=int(size[node[moves["src"]] != node[moves["dst"]]].sum()),
        lower_bound_bytes=int(_lower_bound_bytes(plan, direction, cells.max(initial=0.0)).sum()),
    )


def _lower_bound_bytes(plan: Plan, direction: str, most: float) -> np.ndarray:
    """Return the fewest bytes that each rank must move, (ranks,), if no rank computes more than `most` cells x heads.

    Work above `most` has to be computed by other ranks (servers), which hold none of its rows and keys. A server that computes
    w cells for a group of g heads needs R rows and C keys of that group, where R * C >= w / g. It therefore moves at least 2 *
    sqrt(R * C * bytes per row * bytes per key) bytes. The square root is concave, so the minimum is reached when as few servers
    as possible get as much as possible. No server gets more than `most`, or more than a rank's entire work in one group.
    """
    call = plan.call
    if call.op.is_recurrent:
        # no bound for recurrences: they are balanced by moving states, whose size does not depend on the work
        return np.zeros(call.ranks)
    area, rank = split_by_query_owner(call, mask_rectangles(call), call.layout.chunks)
    tasks = make_columns(TASK_COLUMNS, step=0, rank=rank, **vars(area))
    tasks = select_rows(tasks, owns_range(call, rank, area.k0, area.k1))
    cells = task_areas(call, tasks).astype(float)
    excess = np.maximum(np.bincount(tasks["rank"], cells, call.ranks) - most, 0)
    # the most cells that each rank has in one group; an overestimate if heads have different masks
    group_size = call.gqa_group_size
    largest = np.bincount(tasks["rank"], cells / (tasks["h1"] - tasks["h0"]) * group_size, call.ranks)
    portion = np.maximum(np.minimum(largest, most), 1.0)
    row, key = bytes_per_row_and_key(call, direction)
    if direction == "backward" and plan.policy == "keep":
        # kept queries, keys and values are not moved again
        row -= call.heads * call.token_head_bytes(Payload.Q)
        key -= call.kv_heads * call.token_head_bytes(Payload.KV)
    # bytes per row times bytes per key, for one group
    row_times_key = (row / call.kv_heads) * (key / call.kv_heads)
    whole = np.floor(excess / portion)
    rest = excess - whole * portion
    return 2 * (whole * np.sqrt(row_times_key * portion / group_size) + np.sqrt(row_times_key * rest / group_size))


def max_over_mean(load: np.ndarray | Ints) -> float:
    """Return the busiest rank's load divided by the mean load, or 1 if no rank has any load. load: (ranks,)."""
    return float(load.max() / load.mean()) if load.any() else 1.0
