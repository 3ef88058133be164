"""The kernel launches created from a table's tasks on one rank, and the tokens that each launch needs."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from distattn.ir.bands import K0, K1, OK, OQ, Q0, Q1
from distattn.ir.intervals import Ints, expand_ranges, merge_intervals, sorted_unique, stable_argsort
from distattn.ir.plan import KEY_PAYLOADS, Columns, Payload, select_rows
from distattn.kernels.launch_mask import LaunchMask
from distattn.parallel.runtime.lowering.views import ViewParts

# A step is one launch only if its working tensors are at most _MAX_PADDING times as large as its tasks require. Query rows in
# several buffers share a launch unless that makes query tensors more than _MAX_HOLES times as large.
_MAX_PADDING, _MAX_HOLES = 2, 1.1


class TokenIntervals(NamedTuple):
    """The tokens that each launch's tasks need, end to end in a working tensor, and the heads that need each token."""

    # intervals sorted by launch and token: tokens [t0, t1) start at row `row` of the launch's tensor
    launch: Ints
    t0: Ints
    t1: Ints
    row: Ints
    # heads [h0, h1) of each launch
    h0: Ints
    h1: Ints
    # one part per elementary head range, with its launch and heads [h0, h1), followed by all token intervals, each with its
    # part
    part_launch: Ints
    part_h0: Ints
    part_h1: Ints
    part: Ints
    part_t0: Ints
    part_t1: Ints

    @staticmethod
    def of(launch: Ints, t0: Ints, t1: Ints, low: Ints, high: Ints) -> TokenIntervals:
        """Build the intervals for tasks that are sorted by launch. Task i needs tokens [t0_i, t1_i) in heads [low_i, high_i)."""
        where, begin, end = merge_intervals(launch, t0, t1)
        before = np.cumsum(end - begin) - (end - begin)
        row = before - before[np.searchsorted(where, where)]
        first = np.searchsorted(launch, np.arange(int(launch.max(initial=-1)) + 1))
        h0, h1 = (f.reduceat(x, first) if len(x) else x for f, x in ((np.minimum, low), (np.maximum, high)))
        limits = sorted_unique(np.concatenate([low, high]))
        task, head = expand_ranges(np.searchsorted(limits, low), np.searchsorted(limits, high))
        key, part_t0, part_t1 = merge_intervals(launch[task] * len(limits) + head, t0[task], t1[task])
        distinct_keys, part = np.unique(key, return_inverse=True)
        part_launch, part_head = np.divmod(distinct_keys, max(len(limits), 1))
        bounds = limits[part_head], limits[part_head + 1]
        return TokenIntervals(where, begin, end, row, h0, h1, part_launch, *bounds, part, part_t0, part_t1)

    def parts(self, payload: Payload) -> ViewParts:
        """Return one view of a payload for each launch, as parts."""
        launch, h0 = self.part_launch, self.part_h0
        row = self.part_t0 + self.to_row(launch[self.part], self.part_t0)
        heads = launch, np.full(len(launch), int(payload)), h0, self.part_h1, h0 - self.h0[launch]
        return ViewParts(*heads, self.part, self.part_t0, self.part_t1, row)

    def to_row(self, launch: Ints, token: Ints) -> Ints:
        """Return row - token for each (launch, token). Some task of the launch must need the token."""
        span = int(self.t1.max(initial=0)) + 1
        i = np.searchsorted(self.launch * span + self.t0, launch * span + token, "right") - 1
        return self.row[i] - self.t0[i]

    def rows(self) -> Ints:
        """Return the number of rows of each launch's tensor."""
        total = np.zeros(len(self.h0), np.int64)
        np.add.at(total, self.launch, self.t1 - self.t0)
        return total

    def padding(self) -> np.ndarray:
        """Return the ratio of each launch's tensor size to the size that its tasks require."""
        needed = np.zeros(len(self.h0), np.int64)
        heads = (self.part_h1 - self.part_h0)[self.part]
        np.add.at(needed, self.part_launch[self.part], heads * (self.part_t1 - self.part_t0))
        return self.rows() * (self.h1 - self.h0) / np.maximum(needed, 1)


class LaunchTable(NamedTuple):
    """All kernel launches of a table, sorted by step.

    The tasks of a step form one launch, one launch per buffer of query rows, or one launch per head range.
    """

    # for each launch: its step and its query heads [h0, h1)
    steps: list[int]
    heads: list[tuple[int, int]]
    # all tasks, and the index of the launch of each
    tasks: Columns
    launch: Ints
    rows: TokenIntervals
    keys: TokenIntervals
    group_size: int

    @staticmethod
    def of(tasks: Columns, group_size: int, buffer: Ints) -> LaunchTable:
        """Group one rank's tasks into launches.

        buffer: the index of the buffer that holds each task's query rows, or -1 if no single buffer does.
        """
        head_range = np.unique(np.stack([tasks["h0"], tasks["h1"]], 1), axis=0, return_inverse=True)[1].reshape(-1)
        tasks = {**tasks, "buffer": buffer, "head_range": head_range}
        # a tensor that combines the rank's own rows with rows received for fewer heads would consist mostly of unused heads
        table = LaunchTable._numbered(tasks, group_size, tasks["step"])
        table = table._divided(table._smaller_by_buffer(), "buffer")
        # head ranges that need very different tokens get separate launches
        wasteful = (table.rows.padding() > _MAX_PADDING) | (table.keys.padding() > _MAX_PADDING)
        return table._divided(wasteful, "head_range")

    def parts(self, payload: Payload) -> ViewParts:
        """Return one view of a payload for each launch, as parts."""
        return (self.keys if payload in KEY_PAYLOADS else self.rows).parts(payload)

    def uses(self, number: int, payload: Payload) -> bool:
        """Return True: every launch of attention reads or produces every payload."""
        return True

    def _divided(self, which: np.ndarray, column: str) -> LaunchTable:
        """Divide the selected launches by the values of a task column."""
        if not which.any():
            return self
        value = np.where(which[self.launch], self.tasks[column], 0)
        return LaunchTable._numbered(self.tasks, self.group_size, self.launch * (int(value.max()) + 1) + value)

    def _smaller_by_buffer(self) -> np.ndarray:
        """Return which launches would have much smaller query tensors in total if each buffer got its own launch."""
        low, high = (np.full(len(self.steps), edge) for edge in (np.iinfo(np.int64).max, -1))
        np.minimum.at(low, self.launch, self.tasks["buffer"])
        np.maximum.at(high, self.launch, self.tasks["buffer"])
        has_several = (low >= 0) & (low < high)
        apart = self._divided(has_several, "buffer")
        if apart is self:
            return has_several
        # until now each step had a single launch, so a launch's step identifies the launch that it was split from
        parent = np.searchsorted(self.steps, apart.steps)
        return has_several & (
            np.bincount(parent, apart._query_cells(), len(self.steps)) * _MAX_HOLES < self._query_cells()
        )

    def _query_cells(self) -> Ints:
        """Return the number of (row, head) cells of each launch's query tensor."""
        return self.rows.rows() * (self.rows.h1 - self.rows.h0)

    @staticmethod
    def _numbered(tasks: Columns, group_size: int, label: Ints) -> LaunchTable:
        """Create one launch per distinct label, in label order."""
        tasks = select_rows(tasks, stable_argsort(label))
        _, first, launch = np.unique(np.sort(label), return_index=True, return_inverse=True)
        low, high = tasks["h0"], tasks["h1"]
        rows = TokenIntervals.of(launch, tasks["q0"], tasks["q1"], low, high)
        keys = TokenIntervals.of(launch, tasks["k0"], tasks["k1"], low // group_size, -(-high // group_size))
        heads = list(zip(rows.h0.tolist(), rows.h1.tolist(), strict=True))
        return LaunchTable(tasks["step"][first].tolist(), heads, tasks, launch, rows, keys, group_size)

    def launch_masks(self, bands: Ints) -> list[LaunchMask]:
        """Return the mask of each launch in the coordinates of its tensors. bands: the tasks' bands in token-axis coordinates."""
        rows, keys, bands = self.rows, self.keys, bands.copy()
        # each task lies within one interval, so all its tokens are shifted by the same amount
        to_row, to_key = rows.to_row(self.launch, self.tasks["q0"]), keys.to_row(self.launch, self.tasks["k0"])
        bands[:, [Q0, Q1, OQ]] += to_row[:, None]
        bands[:, [K0, K1, OK]] += to_key[:, None]
        heads = np.stack([self.tasks["h0"], self.tasks["h1"]], 1) - rows.h0[self.launch][:, None]
        first = np.searchsorted(self.launch, np.arange(len(self.steps) + 1)).tolist()
        shift, group_size = to_row - to_key, self.group_size
        sizes = rows.rows(), keys.rows(), rows.h1 - rows.h0, keys.h1 - keys.h0
        return [
            LaunchMask(bands[a:b], heads[a:b], shift[a:b], n, s, h, kv, group_size, h0 % group_size)
            for (a, b), (n, s, h, kv), (h0, _) in zip(
                itertools.pairwise(first), np.stack(sizes, 1).tolist(), self.heads, strict=True
            )
        ]
