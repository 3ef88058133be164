"""The cells of the score matrix that one kernel call computes, as bands per head range in the coordinates of its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from distattn.ir.intervals import Ints
from distattn.ir.mask import Mask

# the most segments that partly written rows are cut into
_MOST_CUTS = 4


class LaunchMask(NamedTuple):
    """Cells that all tasks of one step compute in one kernel call.

    Query head h of the call uses key/value head (first_head + h) // group_size. Operands outside the bands of their head are
    zeros or numbers of other tokens: finite, but meaningless.
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
    # query heads per key/value head, and the position of the call's first query head in its group
    group_size: int
    first_head: int = 0
    # messages of the same step are in flight while the call runs, so the communicator's kernels hold some multiprocessors
    overlaps_messages: bool = False
    # the job has several ranks, so messages that the plan does not know may be in flight, of FSDP or of other micro-batches
    in_larger_job: bool = False

    @staticmethod
    def from_mask(mask: Mask, heads: int, kv_heads: int) -> LaunchMask:
        """Return the whole mask as one call on one device."""
        pieces, n = mask.pieces, mask.n
        all_heads = np.tile(np.array([0, heads]), (len(pieces), 1))
        band_heads = all_heads if mask.piece_heads is None else mask.piece_heads
        distance_shift = np.zeros(len(pieces), np.int64)
        return LaunchMask(pieces, band_heads, distance_shift, n, n, heads, kv_heads, heads // kv_heads)

    def cache_key(self) -> tuple[object, ...]:
        """Return a hashable key. Launch masks with equal keys are equal."""
        return *(column.tobytes() for column in self[:3]), *self[3:]


def split_even_groups(h0: int, h1: int, group_size: int, first_head: int = 0) -> list[tuple[int, int]]:
    """Cut query heads [h0, h1) into ranges in which all key/value heads serve the same number of query heads."""
    low, high = first_head + h0, first_head + h1
    if low // group_size == (high - 1) // group_size or (low % group_size == 0 and high % group_size == 0):
        return [(h0, h1)]
    cuts = sorted({low, -(-low // group_size) * group_size, high // group_size * group_size, high})
    return [(a - first_head, b - first_head) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


class WrittenRows:
    """Record of the rows and heads of a tensor that have been written, so that the first write need not add."""

    def __init__(self, rows: int, head_bounds: Iterable[int]):
        """Begin with nothing written. head_bounds: both ends of every head range that will be written."""
        cuts = sorted(set(head_bounds))
        self.index = {head: i for i, head in enumerate(cuts)}
        self.written = np.zeros((len(cuts) - 1, rows), bool)
        # number of (row, head) that no first write has reached; if it is 0, the tensor need not be cleared first
        self.unwritten = rows * (cuts[-1] - cuts[0])

    def segments(self, heads: slice, rows: slice) -> list[slice]:
        """Cut rows at the borders between written and unwritten ones. Return them uncut if there are too many borders."""
        before: Ints = np.logical_or.reduce(self.written[self.index[heads.start] : self.index[heads.stop], rows])
        cuts = (rows.start + 1 + np.flatnonzero(before[1:] != before[:-1])).tolist()
        bounds = [rows.start, *(cuts if len(cuts) <= _MOST_CUTS else ()), rows.stop]
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def mark(self, heads: slice, rows: slice | Ints) -> bool:
        """Record a write. Return True if none of these rows had been written before."""
        place = slice(self.index[heads.start], self.index[heads.stop]), rows
        before = self.written[place]
        is_first = not before.any()
        if is_first:
            self.unwritten -= before.shape[1] * (heads.stop - heads.start)
        self.written[place] = True
        return is_first
