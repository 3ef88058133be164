"""Best-fit packing: packs that are almost full, each with about the same mixture of lengths.

Best-fit decreasing puts each piece, longest first, into the fullest pack that still has room for it (Johnson, Demers, Ullman,
Garey, Graham 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"; for documents of a language
model: Ding et al. 2024, "Fewer truncations improve language modeling", arXiv 2404.10830). Used alone, it fills the last packs
with hundreds of the shortest pieces each, while the first packs have only a few long ones. So best fit places only the long
pieces, and the pieces that fill the last quarter of each pack. The others are placed in the order given.

Neighbours in the sorted list often go into the same pack, until it is full or another pack fits better. Placing such a run takes
a few binary searches whatever its length, so the time depends mainly on the number of packs, not on the number of pieces.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from distattn.data.packing.pack_rule import PackLimits

# each entry in the sorted list of free space holds a pack's index in its lower bits
_PACK_BITS = 32
_PACK_MASK = (1 << _PACK_BITS) - 1
# pieces longer than one eighth of a pack are placed first; one quarter of each pack is kept free for the last pieces
_LONG_PART, _LAST_PART = 8, 4
# open 1/256 more packs than the tokens need: packs are never completely full, so short pieces would be left over
_SPARE_PART = 256


class BestFitPacks:
    """Packs to which pieces are added. A pack never exceeds its limits, unless it holds a single piece.

    A piece longer than a pack gets a pack of several slots, with limits that many times higher.
    """

    def __init__(self, limits: PackLimits) -> None:
        self._limits = limits
        self._room: list[int] = []
        self._pieces: list[int] = []
        self._cells_left: list[int] = []
        self._slots: list[int] = []

    @property
    def slots(self) -> np.ndarray:
        """The number of slots of each pack, int64 (P,)."""
        return np.array(self._slots, np.int64)

    @property
    def room(self) -> np.ndarray:
        """The free space of each pack in tokens, int64 (P,)."""
        return np.array(self._room, np.int64)

    def add(self, lengths: np.ndarray) -> np.ndarray:
        """Add N pieces. lengths: tokens per piece, at least 1, int64 (N,). Return the index of each piece's pack, int64 (N,).

        Packs from earlier calls also receive pieces. No pack is empty. The result depends on the order of the pieces, so
        shuffle them first.
        """
        packs = np.empty(len(lengths), np.int64)
        long = lengths * _LONG_PART > self._limits.tokens
        self._place_by_best_fit(lengths, np.flatnonzero(long), packs)
        short = np.flatnonzero(~long)
        placed = self._place_as_they_come(lengths, short, packs)
        self._place_by_best_fit(lengths, short[placed:], packs)
        return packs

    def _place_as_they_come(self, lengths: np.ndarray, chosen: np.ndarray, packs: np.ndarray) -> int:
        """Fill one pack after another with the chosen pieces, in the order given, up to three quarters of each pack.

        Use about as many packs as all chosen pieces need. Write to `packs`, and return how many of the pieces were placed.
        """
        sums = self._sums(lengths[chosen].tolist())
        needed = len(self._slots) + max(0, -(-(sums.tokens[-1] - sum(self._room)) // self._limits.tokens))
        ends = [0]
        for pack in range(needed + needed // _SPARE_PART):
            first = ends[-1]
            if first == len(chosen):
                break
            if pack == len(self._slots):
                self._open(1)
            end = self._run_end(sums, first, pack, _LAST_PART)
            # an empty pack takes at least one piece, regardless of its cost
            ends.append(end if self._pieces[pack] else max(end, first + 1))
            self._take(sums, first, ends[-1], pack)
        packs[chosen[: ends[-1]]] = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        return ends[-1]

    def _place_by_best_fit(self, lengths: np.ndarray, chosen: np.ndarray, packs: np.ndarray) -> None:
        """Place the chosen pieces by best fit, longest first. Write to `packs`.

        Ties are broken in favor of the first piece and the first pack.
        """
        if not len(chosen):
            return
        order = chosen[np.argsort(-lengths[chosen], kind="stable")]
        falling = lengths[order].tolist()
        sums = self._sums(falling)
        rising = [-length for length in falling]
        shortest = falling[-1]
        # (longest piece that fits, pack) in ascending order, without packs too full for even the shortest piece
        fits = sorted(
            fit << _PACK_BITS | pack for pack in range(len(self._room)) if (fit := self._fit(pack)) >= shortest
        )
        run_packs: list[int] = []
        run_ends: list[int] = [0]
        while (first := run_ends[-1]) < len(falling):
            place = bisect_left(fits, falling[first] << _PACK_BITS)
            pack = fits.pop(place) & _PACK_MASK if place < len(fits) else self._open(falling[first])
            # place at least one piece: a piece may be alone in a pack regardless of its cost
            end = max(first + 1, self._run_end(sums, first, pack))
            if place and (better := fits[place - 1] >> _PACK_BITS) >= falling[end - 1]:
                # end the run before the first piece that a fuller pack has room for
                end = bisect_left(rising, -better, first + 1, end)
            self._take(sums, first, end, pack)
            if (fit := self._fit(pack)) >= shortest:
                insort(fits, fit << _PACK_BITS | pack)
            run_packs.append(pack)
            run_ends.append(end)
        packs[order] = np.repeat(np.array(run_packs, np.int64), np.diff(run_ends))

    def _sums(self, lengths: list[int]) -> _Sums:
        cost = self._limits.cost
        capped = self._limits.max_cells is not None
        return _Sums(
            list(accumulate(lengths, initial=0)), list(accumulate(map(cost.of, lengths), initial=0)) if capped else []
        )

    def _open(self, length: int) -> int:
        """Open a new pack with room for a piece of `length` tokens. Return the pack's index."""
        slots = -(-length // self._limits.tokens)
        self._slots.append(slots)
        self._room.append(slots * self._limits.tokens)
        self._pieces.append(0)
        self._cells_left.append(slots * (self._limits.max_cells or 0))
        return len(self._slots) - 1

    def _run_end(self, sums: _Sums, first: int, pack: int, kept_part: int = 0) -> int:
        """Return the end of the longest run of pieces starting at `first` that fits into the pack.

        kept_part: keep 1 / kept_part of the pack free; with 0, fill it completely.
        """
        limits = self._limits
        kept = limits.tokens // kept_part if kept_part else 0
        end = bisect_right(sums.tokens, sums.tokens[first] + self._room[pack] - kept, first) - 1
        if limits.max_cells is not None:
            kept = limits.max_cells // kept_part if kept_part else 0
            end = min(end, bisect_right(sums.cells, sums.cells[first] + self._cells_left[pack] - kept, first) - 1)
        if limits.max_documents is not None:
            kept = limits.max_documents // kept_part if kept_part else 0
            end = min(end, first + limits.max_documents * self._slots[pack] - self._pieces[pack] - kept)
        return max(end, first)

    def _take(self, sums: _Sums, first: int, end: int, pack: int) -> None:
        """Record that pieces [first, end) went into a pack."""
        self._room[pack] -= sums.tokens[end] - sums.tokens[first]
        self._pieces[pack] += end - first
        if sums.cells:
            self._cells_left[pack] -= sums.cells[end] - sums.cells[first]

    def _fit(self, pack: int) -> int:
        """Return the length in tokens of the longest piece that still fits into a pack; 0 or less if no piece fits."""
        limits = self._limits
        if limits.max_documents is not None and self._pieces[pack] == limits.max_documents * self._slots[pack]:
            return 0
        room = self._room[pack]
        return room if limits.max_cells is None else min(room, limits.cost.longest(self._cells_left[pack]))


class _Sums(NamedTuple):
    """Running sums of the tokens and cells of N pieces, starting with 0. `cells` is empty if the cost of packs is not capped."""

    tokens: list[int]
    cells: list[int]
