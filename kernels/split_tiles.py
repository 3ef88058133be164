"""Splitting of key tiles with far more work than others, so that no multiprocessor keeps working long after the rest.

Keys that all rows attend to (sink tokens, the tokens of a global window) are few tiles with much of a launch's work.
Their runs are split along the query rows. Each part is a separate program that writes its sums to a scratch tensor. A
small last launch adds them up, always in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.ir.intervals import Ints, expand_ranges
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.tile_runs import TileRuns

# a tile is split if its work exceeds _LONG times the mean work of a multiprocessor, into parts of about _SHARE times that mean,
# but at least _LEAST query tiles, enough to justify a program's fixed costs (benchmarks/LOG.md)
_LONG, _SHARE, _LEAST = 0.75, 0.25, 8


class SplitTiles(NamedTuple):
    """The runs of each part. Parts replace the tiles of `TileRuns`; most tiles have only one part.

    part: (parts, 2), each part's tile and its slot in the scratch tensor, or -1 if it writes the result itself. sums:
    (split tiles, 3), each split tile, its first slot and its number of slots. slots: the number of slots in the scratch
    tensor.
    """

    runs: TileRuns
    part: Ints
    sums: Ints
    slots: int


def split_long_tiles(runs: TileRuns, mask: LaunchMask, step: int, processors: int) -> SplitTiles:
    """Split the long tiles of `transposed_runs`. step: the query rows that a program processes at a time."""
    tiles = runs.tiles
    if not tiles:
        return SplitTiles(runs, np.zeros((0, 2), np.int32), np.zeros((0, 3), np.int32), 0)
    groups = (len(runs.first) - 1) // tiles
    run = runs.run.astype(np.int64)
    place = np.repeat(np.arange(groups * tiles), np.diff(runs.first))
    size = -(-(run[:, 3] - run[:, 0]) // step)
    blocks = runs.work(step)
    count = _parts_of(blocks, runs, mask, processors)
    first_part = np.cumsum(count) - count
    parts = int(count.sum())
    tile = np.repeat(np.arange(tiles), count)
    split = np.flatnonzero(count > 1)
    slots = int(count[split].sum())
    slot = np.full(parts, -1)
    slot[np.isin(tile, split)] = np.arange(slots)
    sums = np.stack([split, slot[first_part[split]], count[split]], 1)
    # divide the row blocks of a tile and head group equally among the tile's parts
    group, tile_of = np.divmod(place, tiles)
    before = np.cumsum(size) - size
    begin = before - before[runs.first[place]]
    end, total, among = begin + size, blocks[group, tile_of], count[tile_of]
    i, number = expand_ranges(((begin + 1) * among - 1) // total, (end * among - 1) // total + 1)
    low = np.maximum(begin[i], number * total[i] // among[i]) - begin[i]
    high = np.minimum(end[i], (number + 1) * total[i] // among[i]) - begin[i]
    cut = run[i]
    cut[:, 0] = run[i, 0] + low * step
    cut[:, 3] = np.minimum(run[i, 3], run[i, 0] + high * step)
    cut[:, 1:3] = np.clip(cut[:, 1:3], cut[:, [0]], cut[:, [3]])
    place = group[i] * parts + first_part[tile_of[i]] + number
    order = np.argsort(place, kind="stable")
    by_part = TileRuns(
        np.searchsorted(place[order], np.arange(groups * parts + 1)).astype(np.int32),
        cut[order].astype(np.int32),
        runs.band,
        runs.row_band,
        runs.group,
        np.argsort(-(blocks.sum(0) / count)[tile], kind="stable").astype(np.int32),
        runs.visited,
    )
    return SplitTiles(by_part, np.stack([tile, slot], 1).astype(np.int32), sums.astype(np.int32), slots)


def _parts_of(blocks: Ints, runs: TileRuns, mask: LaunchMask, processors: int) -> Ints:
    """Return the number of parts of each tile. blocks: (head groups, tiles), the number of row blocks per query head of
    a group."""
    kv_head = (np.arange(mask.heads) + mask.first_head) // mask.group_size
    heads = np.zeros((mask.kv_heads, len(blocks)), np.int64)
    np.add.at(heads, (kv_head, runs.group), 1)
    work = heads @ blocks
    share = work.sum() / processors
    largest = work.max(0, initial=0)
    count = -(-largest // int(max(_SHARE * share, _LEAST)))
    is_long = largest > max(_LONG * share, 2 * _LEAST)
    return np.where(is_long, np.clip(count, 1, np.maximum(blocks.max(0, initial=0), 1)), 1)
