"""The cells of the score matrix that a kernel call computes: bands by head range, in the coordinates of the call's tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from distattn.ir.intervals import Ints
from distattn.ir.mask import Mask

# maximum number of cuts between written and unwritten rows of one range
_MOST_CUTS = 4


class LaunchMask(NamedTuple):
    """The cells that one kernel call computes, for all tasks of one step.

    Query head h of the call uses KV head (first_head + h) // group_size. Operands outside a head's bands are zeros or
    belong to other tokens, so they are finite but meaningless.
    """

    # (M, 10): bands in the coordinates of the call's tensors; see distattn.ir.bands
    bands: Ints
    # (M, 2): query heads [h0, h1) of each band
    band_heads: Ints
    # (M,): in band i, key s and row t are s - t + distance_shift[i] tokens apart on the axis
    distance_shift: Ints
    rows: int
    keys: int
    heads: int
    kv_heads: int
    # query heads per KV head, and the position of the call's first query head among those of its KV head
    group_size: int
    first_head: int = 0
    # True if messages of the same step are in flight during the call: communication kernels then occupy some multiprocessors
    overlaps_messages: bool = False
    # True if the job has several ranks, so that messages unknown to the plan may be in flight, from FSDP or other micro-batches
    in_larger_job: bool = False

    @staticmethod
    def from_mask(mask: Mask, heads: int, kv_heads: int) -> LaunchMask:
        """Return a launch mask for computing the entire mask in one call on one device."""
        pieces, n = mask.pieces, mask.n
        all_heads = np.tile(np.array([0, heads]), (len(pieces), 1))
        band_heads = all_heads if mask.piece_heads is None else mask.piece_heads
        distance_shift = np.zeros(len(pieces), np.int64)
        return LaunchMask(pieces, band_heads, distance_shift, n, n, heads, kv_heads, heads // kv_heads)

    def cache_key(self) -> tuple[object, ...]:
        """Return a hashable key that identifies the launch mask: equal keys mean equal masks."""
        return *(column.tobytes() for column in self[:3]), *self[3:]


def split_even_groups(h0: int, h1: int, group_size: int, first_head: int = 0) -> list[tuple[int, int]]:
    """Split query heads [h0, h1) into ranges in which all KV heads serve the same number of query heads."""
    low, high = first_head + h0, first_head + h1
    if low // group_size == (high - 1) // group_size or (low % group_size == 0 and high % group_size == 0):
        return [(h0, h1)]
    cuts = sorted({low, -(-low // group_size) * group_size, high // group_size * group_size, high})
    return [(a - first_head, b - first_head) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


class WrittenRows:
    """A record of which rows and heads of a tensor have been written, so that first writes can overwrite instead of adding."""

    def __init__(self, rows: int, head_bounds: Iterable[int]):
        """Record that no row has been written. head_bounds: both ends of every range of heads that will be written."""
        cuts = sorted(set(head_bounds))
        self.index = {head: i for i, head in enumerate(cuts)}
        self.written = np.zeros((len(cuts) - 1, rows), bool)
        # the number of (row, head) pairs that no first write covers; if it is 0, the tensor need not be cleared beforehand
        self.unwritten = rows * (cuts[-1] - cuts[0])

    def segments(self, heads: slice, rows: slice) -> list[slice]:
        """Split rows at the borders between written and unwritten rows. Return them unsplit if there are too many borders."""
        before: Ints = np.logical_or.reduce(self.written[self.index[heads.start] : self.index[heads.stop], rows])
        cuts = (rows.start + 1 + np.flatnonzero(before[1:] != before[:-1])).tolist()
        bounds = [rows.start, *(cuts if len(cuts) <= _MOST_CUTS else ()), rows.stop]
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def mark(self, heads: slice, rows: slice | Ints) -> bool:
        """Record a write. Return True if it overlaps no earlier write."""
        place = slice(self.index[heads.start], self.index[heads.stop]), rows
        before = self.written[place]
        is_first = not before.any()
        if is_first:
            self.unwritten -= before.shape[1] * (heads.stop - heads.start)
        self.written[place] = True
        return is_first
