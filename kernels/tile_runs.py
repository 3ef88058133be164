"""The tiles that a Triton program visits: runs of key tiles for every query tile, as short int32 lists.

A *run* is an interval of keys that some rows of a query tile attend to. The tiles at its ends contain masked cells; the
tiles in the middle contain only allowed cells, so their mask is never evaluated. A query tile has at most as many runs
as bands, no matter how many key tiles they cover. A transposed band (queries swapped with keys) is a band, so the same
lists serve kernels that own a key tile and loop over queries.

Other kinds of pieces (block lists, neighbourhood tiles) could be added as runs of one tile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.ir.bands import BK, BQ, HI, K0, K1, LO, OK, OQ, Q0, Q1, row_key_ranges, tighten
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints, expand_ranges, lexicographic_argsort, sorted_unique
from distattn.kernels.launch_mask import LaunchMask

# columns of a run: keys [begin, full) and [rest, end) need the mask, keys [full, rest) do not; the band of its rows;
# and the offset in `row_band` of the bands of individual rows (-1 if all rows have the same band)
RUN = ("begin", "full", "rest", "end", "band", "rows")
# columns of a band: row r in [q0, q1) allows keys from max(k0, low + s) up to min(k1, high + s), s = bk * ((r - oq) // bq)
BAND = ("q0", "q1", "k0", "k1", "low", "high", "bq", "bk", "oq", "shift")
# runs start at multiples of this number, so that loads of rows and keys are aligned
RUN_ALIGNMENT = 16
_LIMIT = 1 << 30


class TileRuns(NamedTuple):
    """The runs of all query tiles, int32. Tile t of head group g has runs [first[i], first[i + 1]), where i = g * tiles + t."""

    # (groups * tiles + 1,)
    first: Ints
    # (runs, 6)
    run: Ints
    # (bands, 10)
    band: Ints
    # bands of individual rows: `block_rows` entries for every run with several bands
    row_band: Ints
    # the head group of each head
    group: Ints
    # tile indices in launch order: tiles with the most keys first
    order: Ints
    # the number of keys in all visited tiles, summed over all heads
    visited: int

    @property
    def tiles(self) -> int:
        """The number of query tiles."""
        return len(self.order)

    def work(self, step: int) -> Ints:
        """Return the number of steps of `step` keys that a tile takes for one head of each group, (head groups, tiles)."""
        run = self.run.astype(np.int64)
        places = len(self.first) - 1
        size = -(-(run[:, 3] - run[:, 0]) // step)
        total = np.bincount(np.repeat(np.arange(places), np.diff(self.first)), size, places)
        return total.astype(np.int64).reshape(-1, max(self.tiles, 1))


def tile_runs(mask: LaunchMask, block_rows: int, block_keys: int) -> TileRuns:
    """Return the runs for programs that own `block_rows` query rows of one head and process `block_keys` keys at a time."""
    return _runs_of(mask.bands, mask, mask.rows, block_rows, block_keys)


def transposed_runs(mask: LaunchMask, block_keys: int, block_rows: int) -> TileRuns:
    """Return the runs for programs that own `block_keys` keys and process `block_rows` query rows of one head at a time."""
    turned = mask.bands[:, [K0, K1, Q0, Q1, HI, LO, BK, BQ, OK, OQ]]
    turned[:, [LO, HI]] *= -1
    return _runs_of(turned, mask, mask.keys, block_keys, block_rows)


def _runs_of(bands: Ints, mask: LaunchMask, rows: int, block_rows: int, block_keys: int) -> TileRuns:
    tight = tighten(bands)
    kept = np.flatnonzero(tight[:, Q0] < tight[:, Q1])
    tight, shift, heads = tight[kept], mask.distance_shift[kept], mask.band_heads[kept]
    cuts = sorted_unique(np.concatenate([[0, mask.heads], heads.ravel()]))
    tiles = -(-rows // block_rows)
    # list one entry for each combination of a band, a head group and a query tile that overlap
    band, group = expand_ranges(np.searchsorted(cuts, heads[:, 0]), np.searchsorted(cuts, heads[:, 1]))
    i, tile = expand_ranges(tight[band, Q0] // block_rows, (tight[band, Q1] - 1) // block_rows + 1)
    band, group = band[i], group[i]
    q0, q1 = np.maximum(tile * block_rows, tight[band, Q0]), np.minimum((tile + 1) * block_rows, tight[band, Q1])
    begin, first_end = row_key_ranges(tight[band], q0)
    last_begin, end = row_key_ranges(tight[band], q1 - 1)
    # if the band covers all rows of the tile, nothing is masked between the last row's first key and the first row's last
    # key. Rows past the end of the tensor are zeros and need the mask
    whole = (q0 == tile * block_rows) & (q1 == (tile + 1) * block_rows)
    order = lexicographic_argsort(group, tile, q0, begin)
    band, group, tile, q0, q1, begin, end = (x[order] for x in (band, group, tile, q0, q1, begin, end))
    whole, last_begin, first_end = whole[order], last_begin[order], first_end[order]
    first = _joined_bands(group * tiles + tile, q0, q1, begin, end)
    size = np.diff(np.append(first, len(band)))
    alone = size == 1
    run_begin = begin[first] // RUN_ALIGNMENT * RUN_ALIGNMENT
    run_end = np.maximum.reduceat(end, first) if len(first) else end
    left = -(-(last_begin[first] - run_begin) // block_keys) * block_keys
    full = np.minimum(run_begin + left, run_end)
    rest = full + np.maximum((first_end[first] - full) // block_keys, 0) * block_keys
    plain = alone & whole[first] & (rest > full)
    full, rest = np.where(plain, full, run_begin), np.where(plain, rest, run_begin)
    row_at = np.where(alone, -1, (np.cumsum(~alone) - 1) * block_rows)
    run = np.stack([run_begin, full, rest, run_end, band[first], row_at], 1)
    visited = full - run_begin + rest - full + -(-(run_end - rest) // block_keys) * block_keys
    place = group[first] * tiles + tile[first]
    groups = len(cuts) - 1
    return TileRuns(
        np.searchsorted(place, np.arange(groups * tiles + 1)).astype(np.int32),
        run.astype(np.int32),
        _to_int32(tight, shift),
        _row_bands(first, size, alone, band, tile * block_rows, q0, q1, block_rows),
        np.repeat(np.arange(groups), np.diff(cuts)).astype(np.int32),
        np.argsort(-np.bincount(tile[first], visited, tiles), kind="stable").astype(np.int32),
        int((visited * np.diff(cuts)[group[first]]).sum()),
    )


def _joined_bands(place: Ints, q0: Ints, q1: Ints, begin: Ints, end: Ints) -> Ints:
    """Return the index of each run's first band. Bands of a tile with contiguous rows and keys (short documents) form
    one run."""
    is_first = np.ones(len(place), bool)
    on = (place[1:] == place[:-1]) & (q0[1:] >= q1[:-1]) & (begin[1:] >= begin[:-1]) & (begin[1:] <= end[:-1])
    is_first[1:] = ~on
    return np.flatnonzero(is_first)


def _row_bands(
    first: Ints, size: Ints, alone: Ints, band: Ints, tile_row: Ints, q0: Ints, q1: Ints, block_rows: int
) -> Ints:
    """Return the band of every row for runs with several bands. Rows without a band get the run's first band, which
    excludes them."""
    multi_band = np.flatnonzero(~alone)
    out = np.repeat(band[first[multi_band]], block_rows)
    number, member = expand_ranges(first[multi_band], first[multi_band] + size[multi_band])
    base = number * block_rows - tile_row[member]
    i, at = expand_ranges(base + q0[member], base + q1[member])
    out[at] = band[member][i]
    return out.astype(np.int32)


def _to_int32(bands: Ints, shift: Ints) -> Ints:
    """Return the bands as int32 (columns: BAND). Blocks are counted from the first row, so that no product overflows."""
    q0, q1, k0, k1, lo, hi, bq, bk, oq, ok = bands.T
    skipped = (q0 - oq) // bq
    oq = oq + bq * skipped
    if len(bands) and int((bk * ((q1 - 1 - oq) // bq)).max()) >= _LIMIT:
        raise DistattnError(
            "a block staircase climbs more than 2^30 keys in one call; the triton kernels count in 32 bits."
        )
    low, high = (np.clip(ok + bk * (edge + skipped), -_LIMIT, _LIMIT - 1) for edge in (lo, hi + 1))
    # a block larger than the call must also fit into 32 bits
    small = np.minimum(bq, 1 << 30), np.minimum(bk, 1 << 30)
    return np.stack([q0, q1, k0, k1, low, high, *small, oq, shift], 1).astype(np.int32)
