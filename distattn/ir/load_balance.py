"""Balance the load of layouts: assign chunks to ranks, and place whole documents for data loaders that may choose ranks.

Placement has two goals, which are not merged into one weight: no rank has more than 1.01 times the mean number of tokens, and
within that limit each rank's work is as close to the mean as possible.
"""

from __future__ import annotations

import numpy as np

from distattn.ir.intervals import Ints

# maximum number of tokens on a rank when whole documents are placed, as a multiple of the mean
_MAX_TOKEN_SHARE = 1.01


def balance_items(weights: np.ndarray, ranks: int, tolerance: float) -> Ints:
    """Return a rank for each item: ranks get about equal weights, and numbers of items that differ by at most one.

    In each round every rank gets one item: the heaviest goes to the rank with the least weight, and so on. The busiest rank then
    makes the most helpful exchange of items with another rank, until its weight is within `tolerance` of the mean or none helps.
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
        # exchanging i and j moves weight `moved` from the busiest rank to j's; `after` is the higher of both loads afterwards
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
    """Place documents, laid end to end, on ranks, and split long ones. Return chunks (rank, t0, t1).

    lengths, work: the tokens and the work of each document. Documents with more than `share` of a rank's mean work are split over
    `spread` times as many ranks as their work needs, at most all. Other documents stay whole if a rank has room. Documents are
    placed in descending order of work.
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
    """Place documents, laid end to end, on ranks. Return chunks (rank, t0, t1).

    lengths, work: the tokens and the work of each document. Documents with more than (1 + tolerance) times a rank's mean work are
    placed first. Each is split over about as many ranks as its work needs, with two equal chunks per rank, one from the front and
    one from the back (equal work under a causal mask). The others follow whole, in descending order of work, each on the rank
    with the least work that has room for its tokens. They are cut only if no rank has room.
    """
    placed = _Placement(lengths, ranks)
    mean, tokens = float(work.sum()) / ranks, float(lengths.sum()) / ranks
    order = np.argsort(-work, kind="stable")
    long = order[work[order] > (1 + tolerance) * mean]
    short = order[len(long) :]
    # the work per token of short documents, which will fill up the ranks
    filler = float(work[short].sum()) / max(int(lengths[short].sum()), 1)
    for document in long.tolist():
        load, length = float(work[document]), int(lengths[document])
        shares = (load - filler * length) / max(mean - filler * tokens, mean / ranks)
        placed.split(document, load, int(np.clip(round(shares), 1, min(ranks, max(length // 2, 1)))))
    for document in short.tolist():
        placed.place(document, float(work[document]))
    return placed.chunks()


class _Placement:
    """The documents placed so far. free_tokens: the number of tokens that each rank has room for. load: each rank's work."""

    def __init__(self, lengths: Ints, ranks: int):
        self.lengths, self.start = lengths, np.cumsum(lengths) - lengths
        self.free_tokens = np.full(ranks, int(np.ceil(_MAX_TOKEN_SHARE * int(lengths.sum()) / ranks)))
        self.load = np.zeros(ranks)
        self.rows: list[tuple[int, int, int]] = []

    def split(self, document: int, work: float, shares: int) -> None:
        """Split a document into pairs of chunks over the `shares` ranks with the least work that have room, or over more."""
        length = int(self.lengths[document])
        while shares < len(self.free_tokens) and int((self.free_tokens >= -(-length // shares)).sum()) < shares:
            shares += 1
        fits = self.free_tokens >= -(-length // shares)
        chosen = np.sort(np.argsort(np.where(fits, self.load, np.inf), kind="stable")[:shares])
        if not fits[chosen].all():
            self.place(document, work)
            return
        # cut the document into equal shares before halving them, so that no share is longer than a rank has room for
        shard = np.diff(np.arange(shares + 1) * length // shares)
        ends = self.start[document] + np.cumsum(np.concatenate([[0], shard - shard // 2, (shard // 2)[::-1]]))
        for rank, t0, t1 in zip([*chosen.tolist(), *chosen[::-1].tolist()], ends, ends[1:], strict=False):
            self._put(rank, int(t0), int(t1))
        self.load[chosen] += work / shares

    def place(self, document: int, work: float) -> None:
        """Place a whole document on the rank with the least work that has room, or in pieces on ranks with the most room."""
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
        """Return all chunks (rank, t0, t1) in axis order."""
        rows = np.array(self.rows, np.int64).reshape(-1, 3)
        rank, t0, t1 = rows[np.argsort(rows[:, 1])].T
        return rank, t0, t1

    def _put(self, rank: int, t0: int, t1: int) -> None:
        if t0 < t1:
            self.rows.append((rank, t0, t1))
            self.free_tokens[rank] -= t1 - t0
