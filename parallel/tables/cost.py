"""The cost model with which strategies balance work. Its integers let every rank compute the same plan, bit for bit.

It is the model of kernel times in `distattn.cluster.cost`, rounded to integers. A kernel works on full blocks of rows, and each
row costs as much as `overhead` additional keys. A document shorter than a block therefore costs as much as a full block, and
short documents cost more than their cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from distattn.cluster.cost import attention_speed, flops_per_cell, overhead_keys, padded_cells
from distattn.cluster.spec import AnyCluster, ClusterSpec, load
from distattn.ir.bands import K0, K1, Q0, Q1, areas, clip
from distattn.ir.intervals import Ints
from distattn.ir.plan import Call, Columns, Payload, task_bands

# the device assumed if a cluster has no table of kernel speeds
_DEFAULT_DEVICES = "h100-1x1"
# a length beyond which no kernel in a speed table gets any faster
_LONG = 1 << 20
# the number of candidates tested in each round of the search
_PROBES = 16


@dataclass(frozen=True)
class CostModel:
    """Costs in one direction ("forward" or "backward"). The unit is a block of cells: `block` rows x 1 key of one head.

    block: the rows in a kernel's tile. overhead: the fixed cost of a row, expressed as a number of keys.
    """

    direction: str
    block: int
    overhead: int

    @staticmethod
    def for_cluster(cluster: AnyCluster | None, direction: str, head_dim: int, block: int) -> CostModel:
        """Return the cost model for a cluster's kernels, or for an H100 at head dim 128 if their speeds are unknown."""
        if isinstance(cluster, ClusterSpec):
            return CostModel(direction, block, overhead_keys(cluster, direction, head_dim))
        return CostModel(direction, block, _default_overhead(direction))

    def band_costs(self, bands: Ints) -> Ints:
        """Return the cost of each tightened band (M, 10) for one head."""
        return -(-padded_cells(bands, self.block, self.overhead) // self.block)

    def task_costs(self, call: Call, tasks: Columns) -> Ints:
        """Return the cost of each task over all its heads."""
        return self.band_costs(task_bands(call.mask, tasks)) * (tasks["h1"] - tasks["h0"])

    def rank_costs(self, call: Call, tasks: Columns) -> Ints:
        """Return the total cost of each rank's tasks, (ranks,)."""
        out = np.zeros(call.ranks, np.int64)
        np.add.at(out, tasks["rank"], self.task_costs(call, tasks))
        return out

    def seconds(self, call: Call, cluster: ClusterSpec, cost: int) -> float:
        """Convert a cost to kernel seconds on a cluster, at the speed for long sequences, since costs contain the overheads."""
        long = np.array([_LONG])
        speed = float(attention_speed(cluster, self.direction, call.head_dim, long, long)[0])
        return cost * self.block * flops_per_cell(self.direction, call.head_dim, call.v_head_dim) / speed

    def last_rows_of_cost(self, bands: Ints, wanted: Ints) -> tuple[Ints, Ints]:
        """Find the fewest full blocks of rows at the end of each band that cost at least `wanted`.

        Return (first row, end of the first block), both (M,).
        """
        q0, q1 = bands[:, Q0], bands[:, Q1]

        def is_enough(i: Ints, blocks: Ints) -> np.ndarray:
            rows = clip(bands[i], q1[i] - blocks * self.block, q1[i], 0, bands[i, K1])
            return self.band_costs(rows) >= wanted[i]

        blocks = _smallest_sufficient(-(-(q1 - q0) // self.block), is_enough)
        return np.maximum(q1 - blocks * self.block, q0), q1 - (blocks - 1) * self.block

    def last_keys_of_area(self, bands: Ints, wanted: Ints) -> Ints:
        """Find the fewest full blocks of keys at the end of each band that hold at least `wanted` cells. Return their first
        keys, (M,)."""
        k0, k1 = bands[:, K0], bands[:, K1]

        def is_enough(i: Ints, blocks: Ints) -> np.ndarray:
            return areas(clip(bands[i], 0, bands[i, Q1], k1[i] - blocks * self.block, k1[i])) >= wanted[i]

        return np.maximum(k1 - _smallest_sufficient(-(-(k1 - k0) // self.block), is_enough) * self.block, k0)


def bytes_per_row_and_key(call: Call, direction: str) -> tuple[int, int]:
    """Return the bytes moved per row and per key that a task needs from other ranks, over all heads."""
    queries, keys = {
        "forward": ((Payload.Q, Payload.O), (Payload.KV,)),
        "backward": ((Payload.Q, Payload.dO, Payload.dQ), (Payload.KV, Payload.dKV)),
    }[direction]
    return (
        call.heads * sum(call.token_head_bytes(payload) for payload in queries),
        call.kv_heads * sum(call.token_head_bytes(payload) for payload in keys),
    )


@cache
def _default_overhead(direction: str) -> int:
    return overhead_keys(load(_DEFAULT_DEVICES), direction, 128)


def _smallest_sufficient(limit: Ints, is_enough: Callable[[Ints, Ints], np.ndarray]) -> Ints:
    """Return, for each i, the least x in 1 .. limit_i with is_enough(i, x), or limit_i if no x qualifies. is_enough must be
    monotonic in x."""
    low, high = np.minimum(1, limit), limit
    i = np.repeat(np.arange(len(limit)), _PROBES)
    # use few rounds with many probes each, because the time per round in NumPy hardly depends on the number of probes
    while (low < high).any():
        probes = low[:, None] + (high - low)[:, None] * np.arange(_PROBES) // _PROBES
        sufficient = is_enough(i, probes.ravel()).reshape(probes.shape)
        failed = (~sufficient).sum(1)
        # the first probe that did not fail, or the upper limit
        above = np.append(probes, high[:, None], 1)[np.arange(len(limit)), failed]
        low, high = np.where(failed > 0, probes[np.arange(len(limit)), failed - 1] + 1, low), above
        low = np.minimum(low, high)
    return low
