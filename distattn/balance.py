"""Dealing weighted items to ranks so that no rank gets much more than the others."""

from __future__ import annotations

import numpy as np

from distattn.intervals import Ints


def balance(weights: np.ndarray, ranks: int, tolerance: float) -> Ints:
    """A rank for each item: equally many items a rank (to one), total weights as even as exchanges can make them.

    Rounds of one item a rank, heaviest items first and each to the rank with least so far; then the busiest rank
    exchanges the item that helps most with another's, until it is within `tolerance` of the mean or nothing helps.
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
    # each exchange lowers the sum of squares; the bound only guards against rounding
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
