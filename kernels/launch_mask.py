"""Which cells of the score matrix one kernel call computes, as bands per head range in the coordinates of its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from distattn.ir.intervals import Ints
from distattn.ir.mask import Mask

# of rows that are written in part, into stretches that are or are not
_MOST_CUTS = 4


class LaunchMask(NamedTuple):
    """The cells that all tasks of one step compute in one kernel call.

    Query head h of the call uses key/value head (first_head + h) // group_size.
    Operands outside the bands of their head are zeros or other tokens' numbers: finite, but without a meaning.
    """

    # (M, 10) bands in the coordinates of the call's tensors, see distattn.ir.bands
    bands: Ints
    # (M, 2): query heads [h0, h1) of each band
    band_heads: Ints
    # (M,): in band i, key s and row t are s - t + distance_shift[i] tokens apart on the axis
    distance_shift: Ints
    rows: int
    keys: int
    heads: int
    kv_heads: int
    # query heads per key/value head, and where the call's first query head lies in its group
    group_size: int
    first_head: int = 0
    # whether messages of the same step are in flight while the call runs: the communicator's kernels then hold some
    # multiprocessors
    overlaps_messages: bool = False
    # whether messages may be in flight that the plan does not know, of FSDP or of other micro-batches: the job has several ranks
    in_larger_job: bool = False

    @staticmethod
    def from_mask(mask: Mask, heads: int, kv_heads: int) -> LaunchMask:
        """The whole mask in one call on one device."""
        pieces, n = mask.pieces, mask.n
        all_heads = np.tile(np.array([0, heads]), (len(pieces), 1))
        band_heads = all_heads if mask.piece_heads is None else mask.piece_heads
        distance_shift = np.zeros(len(pieces), np.int64)
        return LaunchMask(pieces, band_heads, distance_shift, n, n, heads, kv_heads, heads // kv_heads)

    def cache_key(self) -> tuple[object, ...]:
        """A hashable key; launch masks with equal keys are equal."""
        return *(column.tobytes() for column in self[:3]), *self[3:]


def split_even_groups(h0: int, h1: int, group_size: int, first_head: int = 0) -> list[tuple[int, int]]:
    """Cut query heads [h0, h1) into ranges in which every key/value head serves equally many query heads."""
    low, high = first_head + h0, first_head + h1
    if low // group_size == (high - 1) // group_size or (low % group_size == 0 and high % group_size == 0):
        return [(h0, h1)]
    cuts = sorted({low, -(-low // group_size) * group_size, high // group_size * group_size, high})
    return [(a - first_head, b - first_head) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


class WrittenRows:
    """Which rows of which heads of a tensor have been written, so that the first write need not add."""

    def __init__(self, rows: int, head_bounds: Iterable[int]):
        """head_bounds: both ends of every head range that will be written."""
        cuts = sorted(set(head_bounds))
        self.index = {head: i for i, head in enumerate(cuts)}
        self.written = np.zeros((len(cuts) - 1, rows), bool)
        # number of (row, head) that no first write has reached; where it is 0 nothing needs clearing beforehand
        self.unwritten = rows * (cuts[-1] - cuts[0])

    def stretches(self, heads: slice, rows: slice) -> list[slice]:
        """Rows cut where some that have been written meet others that have not; as they are where that is often."""
        before: Ints = np.logical_or.reduce(self.written[self.index[heads.start] : self.index[heads.stop], rows])
        cuts = (rows.start + 1 + np.flatnonzero(before[1:] != before[:-1])).tolist()
        bounds = [rows.start, *(cuts if len(cuts) <= _MOST_CUTS else ()), rows.stop]
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def mark(self, heads: slice, rows: slice | Ints) -> bool:
        """Record a write; returns True when nothing of it had been written before."""
        place = slice(self.index[heads.start], self.index[heads.stop]), rows
        before = self.written[place]
        is_first = not before.any()
        if is_first:
            self.unwritten -= before.shape[1] * (heads.stop - heads.start)
        self.written[place] = True
        return is_first
