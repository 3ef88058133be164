"""Best-fit packing: packs that are almost full, each with about the same mixture of lengths.

Best-fit decreasing puts each piece, longest first, into the fullest pack that still has room for it (Johnson, Demers, Ullman,
Garey, Graham 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"; for documents of a language
model: Ding et al. 2024, "Fewer truncations improve language modeling", arXiv 2404.10830). Used alone, it fills the last packs
with the shortest pieces only, with hundreds of pieces where the first packs have a few. So only long pieces and the last quarter
of each pack are placed by best fit. The pieces in between are placed in the order in which they come.

Neighbours in the sorted list often go into the same pack, until it is full or another pack fits better. Such a run of pieces
costs a few binary searches, whatever its length, so the time depends on the number of packs and hardly on the number of pieces.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from distattn.data.packing.pack_rule import PackLimits

# an entry in the list of free room has the pack's number in its lower bits
_PACK_BITS = 32
_PACK_MASK = (1 << _PACK_BITS) - 1
# pieces longer than one eighth of a pack are placed first; one quarter is kept free for the last pieces
_LONG_PART, _LAST_PART = 8, 4
# packs are never quite full: without a few extra packs, the shortest pieces would get packs of their own
_SPARE_PART = 256


class BestFitPacks:
    """Packs that pieces are added to. A pack never holds more than its limits allow, except for a piece that is alone in it.

    A piece longer than a pack gets a pack of several slots, whose limits are as many times higher.
    """

    def __init__(self, limits: PackLimits) -> None:
        self._limits = limits
        self._room: list[int] = []
        self._pieces: list[int] = []
        self._cells_left: list[int] = []
        self._slots: list[int] = []

    @property
    def slots(self) -> np.ndarray:
        """Slots of each pack, int64 (P,)."""
        return np.array(self._slots, np.int64)

    @property
    def room(self) -> np.ndarray:
        """Tokens that each pack has free, int64 (P,)."""
        return np.array(self._room, np.int64)

    def add(self, lengths: np.ndarray) -> np.ndarray:
        """Add pieces of these lengths, int64 (N,), each at least 1. Return the number of each piece's pack, int64 (N,).

        Packs of earlier calls are filled further, and no pack is empty. The result depends on the order of the pieces, so shuffle
        them first.
        """
        packs = np.empty(len(lengths), np.int64)
        long = lengths * _LONG_PART > self._limits.tokens
        self._place_by_best_fit(lengths, np.flatnonzero(long), packs)
        short = np.flatnonzero(~long)
        placed = self._place_as_they_come(lengths, short, packs)
        self._place_by_best_fit(lengths, short[placed:], packs)
        return packs

    def _place_as_they_come(self, lengths: np.ndarray, chosen: np.ndarray, packs: np.ndarray) -> int:
        """Give the first of the chosen pieces to packs in their order, up to three quarters of each pack.

        Use about as many packs as all chosen pieces will need. Write into `packs`, and return how many pieces were placed.
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
            # a piece may be alone in a pack whatever it costs
            ends.append(end if self._pieces[pack] else max(end, first + 1))
            self._take(sums, first, ends[-1], pack)
        packs[chosen[: ends[-1]]] = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        return ends[-1]

    def _place_by_best_fit(self, lengths: np.ndarray, chosen: np.ndarray, packs: np.ndarray) -> None:
        """Place the chosen pieces, longest first. Write into `packs`.

        Among equally long pieces the first is placed first, and among packs that fit equally well the first is taken.
        """
        if not len(chosen):
            return
        order = chosen[np.argsort(-lengths[chosen], kind="stable")]
        falling = lengths[order].tolist()
        sums = self._sums(falling)
        rising = [-length for length in falling]
        shortest = falling[-1]
        # (longest piece that fits, pack), rising; packs that are too full for all of these pieces are left out
        fits = sorted(
            fit << _PACK_BITS | pack for pack in range(len(self._room)) if (fit := self._fit(pack)) >= shortest
        )
        run_packs: list[int] = []
        run_ends: list[int] = [0]
        while (first := run_ends[-1]) < len(falling):
            place = bisect_left(fits, falling[first] << _PACK_BITS)
            pack = fits.pop(place) & _PACK_MASK if place < len(fits) else self._open(falling[first])
            # a piece may be alone in a pack whatever it costs
            end = max(first + 1, self._run_end(sums, first, pack))
            if place and (better := fits[place - 1] >> _PACK_BITS) >= falling[end - 1]:
                # pieces so short that they fit into a fuller pack
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
        """Open a new pack with room for a piece of this length. Return its number."""
        slots = -(-length // self._limits.tokens)
        self._slots.append(slots)
        self._room.append(slots * self._limits.tokens)
        self._pieces.append(0)
        self._cells_left.append(slots * (self._limits.max_cells or 0))
        return len(self._slots) - 1

    def _run_end(self, sums: _Sums, first: int, pack: int, kept_part: int = 0) -> int:
        """Return the end of the longest run of pieces from `first` on that fits into the pack.

        Keep 1 / kept_part of the pack free; keep nothing free if kept_part is 0.
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
        """Record that a run of pieces went into a pack."""
        self._room[pack] -= sums.tokens[end] - sums.tokens[first]
        self._pieces[pack] += end - first
        if sums.cells:
            self._cells_left[pack] -= sums.cells[end] - sums.cells[first]

    def _fit(self, pack: int) -> int:
        """Return the longest piece that still fits into a pack, in tokens; 0 if no piece fits."""
        limits = self._limits
        if limits.max_documents is not None and self._pieces[pack] == limits.max_documents * self._slots[pack]:
            return 0
        room = self._room[pack]
        return room if limits.max_cells is None else min(room, limits.cost.longest(self._cells_left[pack]))


class _Sums(NamedTuple):
    """Tokens and cells of the first 0, 1, ... N pieces; `cells` is empty if the cost of packs is not capped."""

    tokens: list[int]
    cells: list[int]
