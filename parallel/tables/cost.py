"""What tasks cost a server, in whole numbers: every rank that plans arrives at the same plan, bit for bit.

A kernel takes whole blocks of rows, and beginning and ending a block costs as much as some keys: so a document of fewer rows
than a block costs as much as a whole one, and short documents cost more than their cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from distattn.cluster.cost import overhead_keys
from distattn.cluster.spec import AnyCluster, ClusterSpec
from distattn.ir.bands import K0, K1, Q0, Q1, areas, clip
from distattn.ir.intervals import Ints
from distattn.ir.plan import Call, Columns, Payload, task_bands

# what a cluster without a table of speeds is taken for: the overheads of FlashAttention 3 on an H100 at head dim 128
_OVERHEAD = {"forward": 262, "backward": 675}


_PROBES = 16


@dataclass(frozen=True)
class CostModel:
    """Costs in one direction. block: rows a kernel takes at once; overhead: cells' worth of time that each row takes besides."""

    direction: str
    block: int
    overhead: int

    @staticmethod
    def for_cluster(cluster: AnyCluster | None, direction: str, head_dim: int, block: int) -> CostModel:
        """By the cluster's table of kernel speeds, where it has one."""
        if isinstance(cluster, ClusterSpec):
            return CostModel(direction, block, overhead_keys(cluster, direction, head_dim))
        return CostModel(direction, block, _OVERHEAD[direction])

    def band_costs(self, bands: Ints) -> Ints:
        """What each tightened band (M, 10) costs for one head, in blocks of cells."""
        rows = np.maximum(bands[:, Q1] - bands[:, Q0], 0)
        tall = -(-rows // self.block) * self.block
        each, rest = np.divmod(areas(bands), np.maximum(rows, 1))
        cells = (each + self.overhead) * tall + rest * tall // np.maximum(rows, 1)
        return -(-cells // self.block)

    def task_costs(self, call: Call, tasks: Columns) -> Ints:
        """What each task costs, all its heads."""
        return self.band_costs(task_bands(call.mask, tasks)) * (tasks["h1"] - tasks["h0"])

    def rank_loads(self, call: Call, tasks: Columns) -> Ints:
        """What each rank has to do."""
        out = np.zeros(call.ranks, np.int64)
        np.add.at(out, tasks["rank"], self.task_costs(call, tasks))
        return out

    def rows_to(self, bands: Ints, wanted: Ints) -> tuple[Ints, Ints]:
        """The fewest whole blocks of rows at the end of each band that cost `wanted`: (first row, end of their first block)."""
        q0, q1 = bands[:, Q0], bands[:, Q1]

        def enough(i: Ints, blocks: Ints) -> np.ndarray:
            return self.band_costs(clip(bands[i], q1[i] - blocks * self.block, q1[i], 0, bands[i, K1])) >= wanted[i]

        blocks = _smallest_sufficient(-(-(q1 - q0) // self.block), enough)
        return np.maximum(q1 - blocks * self.block, q0), q1 - (blocks - 1) * self.block

    def keys_to(self, bands: Ints, wanted: Ints) -> Ints:
        """From which key on each band holds `wanted` cells: whole blocks of keys from its end."""
        k0, k1 = bands[:, K0], bands[:, K1]

        def enough(i: Ints, blocks: Ints) -> np.ndarray:
            return areas(clip(bands[i], 0, bands[i, Q1], k1[i] - blocks * self.block, k1[i])) >= wanted[i]

        return np.maximum(k1 - _smallest_sufficient(-(-(k1 - k0) // self.block), enough) * self.block, k0)


def bytes_per_row_and_key(call: Call, direction: str) -> tuple[int, int]:
    """Bytes that move for each row, and for each key, that a task needs away from home: all heads of the call."""
    queries, keys = {
        "forward": ((Payload.Q, Payload.O), (Payload.KV,)),
        "backward": ((Payload.Q, Payload.dO, Payload.dQ), (Payload.KV, Payload.dKV)),
    }[direction]
    return (
        call.heads * sum(call.token_head_bytes(payload) for payload in queries),
        call.kv_heads * sum(call.token_head_bytes(payload) for payload in keys),
    )


def _smallest_sufficient(most: Ints, enough: Callable[[Ints, Ints], np.ndarray]) -> Ints:
    """For each i the least x of 1, 2, ... most_i with enough(i, x), which holds from then on; most_i if there is none."""
    low, high = np.minimum(1, most), most
    i = np.repeat(np.arange(len(most)), _PROBES)
    # few rounds of many probes: a round costs hardly more for them
    while (low < high).any():
        probes = low[:, None] + (high - low)[:, None] * np.arange(_PROBES) // _PROBES
        good = enough(i, probes.ravel()).reshape(probes.shape)
        failed = (~good).sum(1)
        # the probe after the last that failed, if any
        above = np.append(probes, high[:, None], 1)[np.arange(len(most)), failed]
        low, high = np.where(failed > 0, probes[np.arange(len(most)), failed - 1] + 1, low), above
        low = np.minimum(low, high)
    return low
