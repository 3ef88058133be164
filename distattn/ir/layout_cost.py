"""Estimate the cost of a layout, independently of strategy and cluster, for the choice in `Layout.balanced`.

Costs are in cells of the score matrix. A chunk costs the allowed cells of its rows, and a short chunk costs more, because
kernels are slow on short sequences. Keys that a rank does not own add the cost of sending them. The rest of a layer costs the
same for every token.
"""

from __future__ import annotations

import numpy as np

from distattn.ir.bands import K0, K1, Q0, Q1, areas, clip, tighten
from distattn.ir.intervals import Ints, merge_intervals, overlapping_pairs
from distattn.ir.mask import Mask

# on n x n cells, a kernel reaches n / (n + this) of its best speed, forward and backward together, as estimated from published
# speeds of FlashAttention 3 on an H100 (the table in cluster/descriptions/h100.toml)
_OVERHEAD_TOKENS = 550
# costs per token, in cells of 32 heads: of sending 8 key/value heads between H200s, and of the rest of a layer of an 8B model
_CELLS_PER_RECEIVED_TOKEN, _CELLS_PER_OWN_TOKEN = 1_000, 10_000


def rows_area(mask: Mask, cuts: Ints) -> np.ndarray:
    """Return the number of allowed cells in rows [cuts_i, cuts_i+1), summed over heads if the mask differs by head."""
    i, j = overlapping_pairs(cuts[:-1], cuts[1:], mask.pieces[:, Q0], mask.pieces[:, Q1])
    work = areas(clip(mask.pieces[i], cuts[j], cuts[j + 1], 0, mask.n)).astype(np.float64) * _heads(mask, i)
    return np.bincount(j, work, len(cuts) - 1)


def layout_cost(mask: Mask, ranks: int, rank: Ints, t0: Ints, t1: Ints) -> float:
    """Return the cost in cells: attention on the most expensive rank, plus the rest of a layer on the rank with the most tokens.

    rank, t0, t1: the chunks of the layout, sorted by t0; they tile the axis.
    """
    size = t1 - t0
    work = rows_area(mask, np.append(t0, mask.n)) * (1 + _OVERHEAD_TOKENS / size)
    received = _received_tokens(mask, ranks, rank, t0, t1)
    attention = np.bincount(rank, work, ranks) + _CELLS_PER_RECEIVED_TOKEN * received
    return float(attention.max() + _CELLS_PER_OWN_TOKEN * np.bincount(rank, size, ranks).max())


def _received_tokens(mask: Mask, ranks: int, rank: Ints, t0: Ints, t1: Ints) -> np.ndarray:
    """Return the number of keys that each rank's queries see but the rank does not own, (ranks,)."""
    i, j = overlapping_pairs(t0, t1, mask.pieces[:, Q0], mask.pieces[:, Q1])
    bands = tighten(clip(mask.pieces[i], t0[j], t1[j], 0, mask.n))
    some = bands[:, K0] < bands[:, K1]
    user, k0, k1 = merge_intervals(rank[j[some]], bands[some, K0], bands[some, K1])
    order = np.argsort(rank, kind="stable")
    # shift the tokens of rank r by r * n, so that one call finds the overlaps of all ranks
    begin, end = (rank * mask.n + t0)[order], (rank * mask.n + t1)[order]
    seen, chunk = overlapping_pairs(begin, end, user * mask.n + k0, user * mask.n + k1)
    owned = np.minimum((user * mask.n + k1)[seen], end[chunk]) - np.maximum((user * mask.n + k0)[seen], begin[chunk])
    return np.bincount(user, k1 - k0, ranks) - np.bincount(user[seen], owned, ranks)


def _heads(mask: Mask, pieces: Ints) -> Ints | int:
    return 1 if mask.piece_heads is None else np.diff(mask.piece_heads, axis=1)[pieces, 0]
