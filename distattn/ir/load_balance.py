"""Balance the load of layouts: assign chunks to ranks, and place whole documents for data loaders that may choose.

Placing has two goals, which are not merged into one weight: a rank has at most 1.01 times the mean tokens, and within that limit
its work is as close to the mean as possible.
"""

from __future__ import annotations

import numpy as np

from distattn.ir.intervals import Ints

# the largest number of tokens of a rank when whole documents are placed, in multiples of the mean
_MAX_TOKEN_SHARE = 1.01


def balance_items(weights: np.ndarray, ranks: int, tolerance: float) -> Ints:
    """Return a rank for each item: the numbers of items differ by at most one, and exchanges even out the total weights.

    In each round every rank gets one item, heaviest items first, each to the rank with the least weight. Then the busiest rank
    exchanges the item that helps most with another rank's, until it is within `tolerance` of the mean or no exchange helps.
    """
    items = len(weights)
    rank = np.empty(items, np.int64)
    load = np.zeros(ranks)
    heaviest = np.argsort(-weights, kind="stable")
    for first in range(0, items, ranks):
        chosen = heaviest[first : first + ranks]
        emptiest = np.argsort(load, kind="stable")[: len(chosen)]
        rank[chosen] = emptiest
        load[emptiest] += weights[chosen]
    # each exchange lowers the sum of squares, so this ends; the limit only guards against rounding
    for _ in range(4 * items):
        busy = int(load.argmax())
        if load[busy] <= load.mean() * (1 + tolerance):
            break
        mine = np.flatnonzero(rank == busy)
        # exchanging i and j moves `moved` from the busiest rank to j's: the higher of the two loads afterwards
        moved = weights[mine][:, None] - weights[None]
        after = np.maximum(load[busy] - moved, load[rank][None] + moved)
        after[:, mine] = np.inf
        i, j = np.unravel_index(int(after.argmin()), after.shape)
        if after[i, j] >= load[busy] * (1 - 1e-12):
            break
        other = int(rank[j])
        load[busy] -= moved[i, j]
        load[other] += moved[i, j]
        rank[mine[i]], rank[j] = other, busy
    return rank


def spread_documents(
    lengths: Ints, work: np.ndarray, ranks: int, share: float, spread: float
) -> tuple[Ints, Ints, Ints]:
    """Return chunks (rank, t0, t1) of documents of these lengths and work, laid end to end; long ones are split over more ranks.

    Documents with more than `share` of the mean work of a rank are split over `spread` times as many ranks as their work
    needs, at most all. The others stay whole if a rank has room. Documents with most work come first.
    """
    placed = _Placement(lengths, ranks)
    mean = float(work.sum()) / ranks
    for document in np.argsort(-work, kind="stable").tolist():
        load = float(work[document])
        if load > share * mean:
            shares = int(min(max(np.ceil(min(load / mean * spread, ranks)), 1), max(int(lengths[document]) // 2, 1)))
            placed.split(document, load, shares)
        else:
            placed.place(document, load)
    return placed.chunks()


def place_documents(lengths: Ints, work: np.ndarray, ranks: int, tolerance: float) -> tuple[Ints, Ints, Ints]:
    """Return chunks (rank, t0, t1) of documents of these lengths and work, laid end to end.

    Documents with more than (1 + tolerance) of the mean work of a rank come first. Each is split over about as many ranks as
    its work needs, two equal chunks per rank, from the front and from the back (equal work under a causal mask). The others
    follow as a whole, most work first, each to the rank with the least work that has room for its tokens; if no rank has room
    they are cut.
    """
    placed = _Placement(lengths, ranks)
    mean, tokens = float(work.sum()) / ranks, float(lengths.sum()) / ranks
    order = np.argsort(-work, kind="stable")
    long = order[work[order] > (1 + tolerance) * mean]
    short = order[len(long) :]
    # short documents fill up the ranks: their work per token
    filler = float(work[short].sum()) / max(int(lengths[short].sum()), 1)
    for document in long.tolist():
        load, length = float(work[document]), int(lengths[document])
        shares = (load - filler * length) / max(mean - filler * tokens, mean / ranks)
        placed.split(document, load, int(np.clip(round(shares), 1, min(ranks, max(length // 2, 1)))))
    for document in short.tolist():
        placed.place(document, float(work[document]))
    return placed.chunks()


class _Placement:
    """The documents that have been placed so far. free_tokens, load: room for tokens, and work, of each rank."""

    def __init__(self, lengths: Ints, ranks: int):
        self.lengths, self.start = lengths, np.cumsum(lengths) - lengths
        self.free_tokens = np.full(ranks, int(np.ceil(_MAX_TOKEN_SHARE * int(lengths.sum()) / ranks)))
        self.load = np.zeros(ranks)
        self.rows: list[tuple[int, int, int]] = []

    def split(self, document: int, work: float, shares: int) -> None:
        """Split a document in pairs of chunks over the ranks with the least work that have room; without room use more ranks."""
        length = int(self.lengths[document])
        while shares < len(self.free_tokens) and int((self.free_tokens >= -(-length // shares)).sum()) < shares:
            shares += 1
        fits = self.free_tokens >= -(-length // shares)
        chosen = np.sort(np.argsort(np.where(fits, self.load, np.inf), kind="stable")[:shares])
        if not fits[chosen].all():
            self.place(document, work)
            return
        # equal shares first, then halves: no share is longer than there is room for
        shard = np.diff(np.arange(shares + 1) * length // shares)
        ends = self.start[document] + np.cumsum(np.concatenate([[0], shard - shard // 2, (shard // 2)[::-1]]))
        for rank, t0, t1 in zip([*chosen.tolist(), *chosen[::-1].tolist()], ends, ends[1:], strict=False):
            self._put(rank, int(t0), int(t1))
        self.load[chosen] += work / shares

    def place(self, document: int, work: float) -> None:
        """Place a whole document at the rank with the least work that has room; without room, in pieces where most room is."""
        t0, length = int(self.start[document]), int(self.lengths[document])
        t1 = t0 + length
        while t0 < t1:
            fits = self.free_tokens >= t1 - t0
            rank = int(np.where(fits, self.load, np.inf).argmin()) if fits.any() else int(self.free_tokens.argmax())
            size = min(t1 - t0, int(self.free_tokens[rank]))
            self._put(rank, t0, t0 + size)
            self.load[rank] += work * size / length
            t0 += size

    def chunks(self) -> tuple[Ints, Ints, Ints]:
        """Return all chunks (rank, t0, t1) in the order of the axis."""
        rows = np.array(self.rows, np.int64).reshape(-1, 3)
        rank, t0, t1 = rows[np.argsort(rows[:, 1])].T
        return rank, t0, t1

    def _put(self, rank: int, t0: int, t1: int) -> None:
        if t0 < t1:
            self.rows.append((rank, t0, t1))
            self.free_tokens[rank] -= t1 - t0
