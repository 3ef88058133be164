"""Bands, the pieces of a mask, and their arithmetic.

A band is ten integers (q0, q1, k0, k1, lo, hi, bq, bk, oq, ok); it allows cell (q, k) if

    q0 <= q < q1,   k0 <= k < k1   and   lo <= (k - ok) // bk - (q - oq) // bq <= hi.

The allowed keys of a row form one interval whose two ends never decrease from row to row. Therefore a band cut by a rectangle
is again a band, its area is a difference of two clipped arithmetic series, and its bounding box takes four divisions.
"""

from __future__ import annotations

import numpy as np

from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints, expand_ranges

COLUMNS = ("q0", "q1", "k0", "k1", "lo", "hi", "bq", "bk", "oq", "ok")
# with these limits, every product below fits in int64
MAX_TOKENS = 1 << 30
MAX_BLOCK = 1 << 29
UNBOUNDED = 1 << 32
# maximum number of pairs of pieces that the disjointness check holds in memory at a time
_MAX_PAIRS = 1 << 22

Q0, Q1, K0, K1, LO, HI, BQ, BK, OQ, OK = range(10)


def clip(bands: Ints, *rectangle: Ints | int) -> Ints:
    """Cut each band (M, 10) to its rectangle q0, q1, k0, k1. A band outside its rectangle gets q0 >= q1 or k0 >= k1."""
    q0, q1, k0, k1 = rectangle
    out = bands.copy()
    out[:, Q0], out[:, Q1] = np.maximum(bands[:, Q0], q0), np.minimum(bands[:, Q1], q1)
    out[:, K0], out[:, K1] = np.maximum(bands[:, K0], k0), np.minimum(bands[:, K1], k1)
    return out


def tighten(bands: Ints) -> Ints:
    """Shrink the rectangles of bands (M, 10) to the bounding boxes of their allowed cells; q0 = q1 for bands without cells.

    Every row and every column of a tight rectangle holds an allowed cell.
    """
    q0, q1, k0, k1, lo, hi, bq, bk, oq, ok = bands.T
    full = (q0 < q1) & (k0 < k1) & (lo <= hi)
    # a row meets [k0, k1) if its first allowed key is below k1 and its last allowed key is not below k0
    a = np.maximum(q0, oq + bq * ((k0 - ok) // bk - hi))
    b = np.minimum(q1, oq + bq * ((k1 - 1 - ok) // bk - lo + 1))
    c = np.maximum(k0, ok + bk * ((q0 - oq) // bq + lo))
    d = np.minimum(k1, ok + bk * ((q1 - 1 - oq) // bq + hi + 1))
    full &= (a < b) & (c < d)
    out = bands.copy()
    out[:, Q0], out[:, Q1] = np.where(full, a, q0), np.where(full, b, q0)
    out[:, K0], out[:, K1] = np.where(full, c, k0), np.where(full, d, k0)
    return out


def areas(bands: Ints) -> Ints:
    """Return the exact number of allowed cells of each band (M, 10), in O(1) per band."""
    q0, q1, k0, k1, lo, hi, bq, bk, oq, ok = bands.T
    some = (q0 < q1) & (k0 < k1) & (lo <= hi)
    q1, k1 = np.where(some, q1, q0 + 1), np.where(some, k1, k0 + 1)
    above = _clipped_sum(q0, q1, k0, k1, hi + 1, bq, bk, oq, ok)
    # without a lower bound, as in most masks, every row starts at k0, so the second sum, half of the cost, is not needed
    unbounded = bool((lo <= -UNBOUNDED).all())
    below = (q1 - q0) * k0 if unbounded else _clipped_sum(q0, q1, k0, k1, lo, bq, bk, oq, ok)
    return np.where(some, above - below, 0)


def row_key_ranges(bands: Ints, q: Ints) -> tuple[Ints, Ints]:
    """Return the allowed keys [begin, end) of row q_i in band i; begin = end for an empty row."""
    _, _, k0, k1, lo, hi, bq, bk, oq, ok = bands.T
    j = (q - oq) // bq
    begin = np.clip(ok + bk * (lo + j), k0, k1)
    return begin, np.maximum(begin, np.clip(ok + bk * (hi + 1 + j), k0, k1))


def _clipped_sum(q0, q1, k0, k1, shift, bq, bk, oq, ok) -> Ints:
    """Sum clip(ok + bk * (shift + (q - oq) // bq), k0, k1) over q in [q0, q1): whole blocks, plus the two ragged ends."""
    j0, j1 = (q0 - oq) // bq, (q1 - 1 - oq) // bq
    base = ok + bk * shift
    first = (np.minimum(oq + (j0 + 1) * bq, q1) - q0) * _clamp(base + bk * j0, k0, k1)
    last = (q1 - np.maximum(oq + j1 * bq, q0)) * _clamp(base + bk * j1, k0, k1)
    # blocks j0 < j < j1: an arithmetic series, clipped below at k0 and above at k1
    start, count = base + bk * (j0 + 1), np.maximum(j1 - j0 - 1, 0)
    low = _clamp((k0 - start) // bk + 1, 0, count)
    high = np.minimum(_clamp(count + (start - k1) // bk, 0, count), count - low)
    middle = count - low - high
    series = middle * (start + bk * low) + bk * (middle * (middle - 1) // 2)
    return first + np.where(j0 == j1, 0, last) + bq * (low * k0 + high * k1 + np.where(middle > 0, series, 0))


def _clamp(x: Ints, low: Ints | int, high: Ints) -> Ints:
    # use np.minimum and np.maximum: np.clip takes three times as long for short arrays
    return np.minimum(np.maximum(x, low), high)


def check_pieces(pieces: Ints, n: int, heads: Ints | None) -> None:
    """Raise DistattnError if a piece leaves the axis, allows no cell or exceeds the limits, or if two pieces share a cell.

    heads: (P, 2), the heads of each piece. Pieces with different heads may share a cell.
    """

    def refuse(bad: np.ndarray, why: str) -> None:
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise DistattnError(f"piece {i} {tuple(pieces[i].tolist())} {why}")

    q0, q1, k0, k1, lo, hi, bq, bk, oq, ok = pieces.T
    refuse((q0 < 0) | (k0 < 0) | (q1 > n) | (k1 > n), f"reaches outside the axis [0, {n}).")
    refuse((q0 >= q1) | (k0 >= k1), "is empty: q0 < q1 and k0 < k1 are needed.")
    refuse((bq < 1) | (bk < 1) | (bq > MAX_BLOCK) | (bk > MAX_BLOCK), f"has a block size outside [1, {MAX_BLOCK}].")
    far = [(origin < -MAX_TOKENS) | (origin > MAX_TOKENS) for origin in (oq, ok)]
    refuse(far[0] | far[1], f"has an origin further than {MAX_TOKENS} from the axis.")
    refuse((lo > UNBOUNDED) | (hi < -UNBOUNDED), f"has a bound further than {UNBOUNDED} from the diagonal.")
    tight = tighten(pieces)
    refuse(tight[:, Q0] >= tight[:, Q1], "allows no cell.")
    _check_disjoint(tight, np.tile(np.array([0, 1], np.int64), (len(tight), 1)) if heads is None else heads)


def _check_disjoint(tight: Ints, heads: Ints) -> None:
    """Raise DistattnError if two pieces with bq = bk = 1 share a cell, or if the rectangles of two other pieces overlap."""
    # sweep along the axis on which fewer rectangles overlap
    sweeps = []
    for low, high in ((Q0, Q1), (K0, K1)):
        order = np.argsort(tight[:, low], kind="stable")
        start = tight[order, low]
        stop = np.searchsorted(start, tight[order, high], "left")
        sweeps.append((int((stop - np.arange(len(order)) - 1).sum()), order, stop))
    _, order, stop = min(sweeps, key=lambda sweep: sweep[0])
    rows = np.arange(len(order))
    batch = np.cumsum(stop - rows - 1) // _MAX_PAIRS
    for part in np.unique(batch):
        chosen = rows[batch == part]
        i, j = expand_ranges(chosen + 1, stop[chosen])
        _refuse_common_cells(tight, heads, order[chosen[i]], order[j])


def _refuse_common_cells(tight: Ints, heads: Ints, a: Ints, b: Ints) -> None:
    common = clip(tight[a], *(tight[b, column] for column in (Q0, Q1, K0, K1)))
    meet = (common[:, Q0] < common[:, Q1]) & (common[:, K0] < common[:, K1])
    meet &= (heads[a, 0] < heads[b, 1]) & (heads[b, 0] < heads[a, 1])
    a, b, common = a[meet], b[meet], common[meet]
    cellwise = (tight[a][:, [BQ, BK]] == 1).all(1) & (tight[b][:, [BQ, BK]] == 1).all(1)
    # with blocks of one token, origins only shift the bounds of a band: lo <= k - q + oq - ok <= hi
    shift = (tight[b, OK] - tight[b, OQ]) - (tight[a, OK] - tight[a, OQ])
    common[:, LO] = np.where(cellwise, np.maximum(common[:, LO], tight[b, LO] + shift), -UNBOUNDED)
    common[:, HI] = np.where(cellwise, np.minimum(common[:, HI], tight[b, HI] + shift), UNBOUNDED)
    bad = np.flatnonzero(~cellwise | (areas(common) > 0))
    if len(bad):
        i = bad[0]
        how = "" if cellwise[i] else " (pieces with blocks must have disjoint rectangles)"
        raise DistattnError(
            f"pieces {min(a[i], b[i])} and {max(a[i], b[i])} overlap{how}; every cell belongs to one piece."
        )
