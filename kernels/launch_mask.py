"""Which cells of the score matrix one kernel call computes: bands of heads, in the coordinates of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from distattn.ir.intervals import Ints
from distattn.ir.mask import Mask


class Cells(NamedTuple):
    """All tasks of one step in one call. Query head h uses key/value head (first + h) // group.

    Operands outside the bands of their head are zeros, or other tokens' numbers: finite, and without a meaning.
    """

    # (M, 10), see distattn.ir.bands
    bands: Ints
    # (M, 2): query heads [h0, h1) of each band
    band_heads: Ints
    # (M,): in band i the axis distance of key s and row t is s - t + shift_i
    shift: Ints
    rows: int
    keys: int
    heads: int
    kv_heads: int
    group: int
    first: int = 0

    @staticmethod
    def of_mask(mask: Mask, heads: int, kv_heads: int) -> Cells:
        """A whole mask on one device."""
        pieces, n = mask.pieces, mask.n
        every = np.tile(np.array([0, heads]), (len(pieces), 1))
        band_heads = every if mask.piece_heads is None else mask.piece_heads
        shift = np.zeros(len(pieces), np.int64)
        return Cells(pieces, band_heads, shift, n, n, heads, kv_heads, heads // kv_heads)

    def key(self) -> tuple[object, ...]:
        """Equal for equal cells."""
        return *(column.tobytes() for column in self[:3]), *self[3:]


def even_groups(h0: int, h1: int, group: int, first: int = 0) -> list[tuple[int, int]]:
    """Cut query heads [h0, h1) into ranges in which every key/value head serves equally many query heads."""
    low, high = first + h0, first + h1
    if low // group == (high - 1) // group or (low % group == 0 and high % group == 0):
        return [(h0, h1)]
    cuts = sorted({low, -(-low // group) * group, high // group * group, high})
    return [(a - first, b - first) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


class Written:
    """Which rows of which heads of a tensor have been written, kept by the ranges that heads are written in."""

    def __init__(self, rows: int, bounds: Iterable[int]):
        """bounds: the ends of all head ranges."""
        cuts = sorted(set(bounds))
        self.at = {head: i for i, head in enumerate(cuts)}
        self.cells = np.zeros((len(cuts) - 1, rows), bool)
        # cells that no writing was the first to reach: 0 where nothing needs clearing before
        self.left = rows * (cuts[-1] - cuts[0])

    def first(self, heads: slice, rows: slice | Ints) -> bool:
        """Note a writing; whether nothing of it had been written before."""
        place = slice(self.at[heads.start], self.at[heads.stop]), rows
        some = self.cells[place]
        fresh = not some.any()
        if fresh:
            self.left -= some.shape[1] * (heads.stop - heads.start)
        self.cells[place] = True
        return fresh
