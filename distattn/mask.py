"""The mask: which (query, key) cells of the score matrix are allowed.

A mask is a list of disjoint *bands* on the token axis. A band is ten integers (q0, q1, k0, k1, lo, hi, bq, bk, oq, ok);
it allows cell (q, k) when

    q0 <= q < q1,   k0 <= k < k1   and   lo <= (k - ok) // bk - (q - oq) // bq <= hi.

The allowed keys of a row form one interval whose two ends never decrease from row to row. So a band cut by a rectangle
is a band, its area is a difference of two clipped arithmetic series, and its bounding box takes four divisions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from distattn.errors import DistattnError
from distattn.intervals import Ints, expand, union, whole_numbers

COLUMNS = ("q0", "q1", "k0", "k1", "lo", "hi", "bq", "bk", "oq", "ok")
# bounds chosen so that every product below fits in int64
MAX_TOKENS = 1 << 30
MAX_BLOCK = 1 << 29
UNBOUNDED = 1 << 32
# rows of the pairwise disjointness check held at once
_PAIRS = 1 << 22

Q0, Q1, K0, K1, LO, HI, BQ, BK, OQ, OK = range(10)


def clip(bands: Ints, *rectangle: Ints | int) -> Ints:
    """Bands (M, 10) cut by rectangles q0, q1, k0, k1, row by row. A band that misses its rectangle gets q0 >= q1 or k0 >= k1."""
    q0, q1, k0, k1 = rectangle
    out = bands.copy()
    out[:, Q0], out[:, Q1] = np.maximum(bands[:, Q0], q0), np.minimum(bands[:, Q1], q1)
    out[:, K0], out[:, K1] = np.maximum(bands[:, K0], k0), np.minimum(bands[:, K1], k1)
    return out


def tighten(bands: Ints) -> Ints:
    """Bands (M, 10) with their rectangle shrunk to the bounding box of the allowed cells; q0 = q1 where there are none.

    Every row and every column of a tight rectangle holds an allowed cell.
    """
    q0, q1, k0, k1, lo, hi, bq, bk, oq, ok = bands.T
    full = (q0 < q1) & (k0 < k1) & (lo <= hi)
    # a row meets [k0, k1) when its first allowed key is below k1 and its last one is not below k0
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
    """Exact number of allowed cells of each band (M, 10), in O(1) a band."""
    q0, q1, k0, k1, lo, hi, bq, bk, oq, ok = bands.T
    some = (q0 < q1) & (k0 < k1) & (lo <= hi)
    q1, k1 = np.where(some, q1, q0 + 1), np.where(some, k1, k0 + 1)
    above = _clipped_sum(q0, q1, k0, k1, hi + 1, bq, bk, oq, ok)
    below = _clipped_sum(q0, q1, k0, k1, lo, bq, bk, oq, ok)
    return np.where(some, above - below, 0)


def row_ends(bands: Ints, q: Ints) -> tuple[Ints, Ints]:
    """The allowed keys [first, last + 1) of row q_i in band i; an empty row gives two equal ends."""
    _, _, k0, k1, lo, hi, bq, bk, oq, ok = bands.T
    j = (q - oq) // bq
    begin = np.clip(ok + bk * (lo + j), k0, k1)
    return begin, np.maximum(begin, np.clip(ok + bk * (hi + 1 + j), k0, k1))


def _clipped_sum(q0, q1, k0, k1, shift, bq, bk, oq, ok) -> Ints:
    """Sum over q in [q0, q1) of clip(ok + bk * (shift + (q - oq) // bq), k0, k1): whole blocks, plus the two ragged ends."""
    j0, j1 = (q0 - oq) // bq, (q1 - 1 - oq) // bq
    base = ok + bk * shift
    first = (np.minimum(oq + (j0 + 1) * bq, q1) - q0) * np.clip(base + bk * j0, k0, k1)
    last = (q1 - np.maximum(oq + j1 * bq, q0)) * np.clip(base + bk * j1, k0, k1)
    # blocks j0 < j < j1: an arithmetic series, clipped below at k0 and above at k1
    start, count = base + bk * (j0 + 1), np.maximum(j1 - j0 - 1, 0)
    low = np.clip((k0 - start) // bk + 1, 0, count)
    high = np.minimum(np.clip(count + (start - k1) // bk, 0, count), count - low)
    middle = count - low - high
    series = middle * (start + bk * low) + bk * (middle * (middle - 1) // 2)
    return first + np.where(j0 == j1, 0, last) + bq * (low * k0 + high * k1 + np.where(middle > 0, series, 0))


class Mask:
    """The allowed cells of an axis of `n` tokens, as disjoint bands. Immutable; compare by `digest`.

    `pieces` is an int64 array (P, 10) in the order given, columns as in `COLUMNS`.
    """

    def __init__(self, pieces: Ints, n: int):
        if not 0 < n <= MAX_TOKENS:
            raise DistattnError(f"a mask covers 1 to {MAX_TOKENS} tokens, not {n}.")
        pieces = np.array(pieces, np.int64).reshape(-1, 10)
        pieces[:, LO] = np.maximum(pieces[:, LO], -UNBOUNDED)
        pieces[:, HI] = np.minimum(pieces[:, HI], UNBOUNDED)
        _check_pieces(pieces, n)
        pieces.setflags(write=False)
        self.n, self.pieces = n, pieces

    @staticmethod
    def full(n: int) -> Mask:
        """Every query sees every key."""
        return Mask.documents([n], inner="full")

    @staticmethod
    def causal(n: int) -> Mask:
        """Query q sees keys k <= q."""
        return Mask.documents([n])

    @staticmethod
    def sliding_window(n: int, left: int, right: int = 0) -> Mask:
        """Query q sees keys q - left <= k <= q + right."""
        return Mask.documents([n], inner=(left, right))

    @staticmethod
    def documents(lengths: Sequence[int], inner: str | tuple[int, int] = "causal") -> Mask:
        """Packed documents of the given lengths (tokens); each sees only itself, by `inner`.

        inner: "causal", "full", or a window (left, right) as in `sliding_window`.
        """
        ends = document_ends(lengths)
        starts = ends - np.diff(ends, prepend=0)
        lo, hi = _inner_band(inner)
        pieces = np.stack([starts, ends, starts, ends], 1)
        bounds = np.broadcast_to(np.array([lo, hi], np.int64), (len(ends), 2))
        return Mask(_with_defaults(np.column_stack([pieces, bounds])), int(ends[-1]))

    @staticmethod
    def from_pieces(array: Sequence[Sequence[int]] | Ints, n: int | None = None) -> Mask:
        """A mask from rows (q0, q1, k0, k1, lo, hi) or all ten columns; `n` defaults to the last token named."""
        pieces = whole_numbers(array, "pieces")
        if pieces.ndim != 2 or pieces.shape[1] not in (6, 10) or not len(pieces):
            raise DistattnError(
                f"pieces have 6 columns ({', '.join(COLUMNS[:6])}) or 10 ({', '.join(COLUMNS)}), "
                f"and at least one row; this array has shape {pieces.shape}."
            )
        pieces = _with_defaults(pieces)
        return Mask(pieces, int(pieces[:, [Q1, K1]].max()) if n is None else n)

    def area(self, q: tuple[int, int] | None = None, k: tuple[int, int] | None = None) -> int:
        """Allowed cells in rows [q[0], q[1]) and columns [k[0], k[1]); all of the axis by default."""
        return int(areas(self._clipped(q, k)).sum())

    def cut(self, q: tuple[int, int] | None = None, k: tuple[int, int] | None = None) -> Mask:
        """The mask of the same axis that allows only the cells in rows q and columns k."""
        pieces = self._clipped(q, k)
        tight = tighten(pieces)
        return Mask(pieces[tight[:, Q0] < tight[:, Q1]], self.n)

    def needed_keys(self, q_set: Sequence[tuple[int, int]] | Ints) -> Ints:
        """The keys some query of `q_set` sees. Both are arrays of half-open intervals (M, 2); the result is disjoint, sorted."""
        q_set = whole_numbers(q_set, "query intervals").reshape(-1, 2)
        _, q0, q1 = union(np.zeros(len(q_set), np.int64), q_set[:, 0], q_set[:, 1])
        i, j = expand(np.searchsorted(q1, self.pieces[:, Q0], "right"), np.searchsorted(q0, self.pieces[:, Q1], "left"))
        hit = tighten(clip(self.pieces[i], q0[j], q1[j], 0, self.n))
        hit = hit[hit[:, Q0] < hit[:, Q1]]
        _, k0, k1 = union(np.zeros(len(hit), np.int64), hit[:, K0], hit[:, K1])
        return np.stack([k0, k1], 1)

    def dense(self) -> np.ndarray:
        """The mask as booleans (n, n). For tests and small pictures only."""
        out = np.zeros((self.n, self.n), bool)
        k = np.arange(self.n)
        for piece in self.pieces:
            q = np.arange(piece[Q0], piece[Q1])
            begin, end = row_ends(np.broadcast_to(piece, (len(q), 10)), q)
            out[piece[Q0] : piece[Q1]] |= (k >= begin[:, None]) & (k < end[:, None])
        return out

    def tiles(self, bm: int, bn: int) -> dict[str, Ints]:
        """Tile runs of a kernel with tiles of bm queries x bn keys, one row per (query tile, piece) that meet.

        Columns: `tile` (query tile), `piece`, and key tiles `begin` <= `full_begin` <= `full_end` <= `end`. The piece
        allows every cell of the tiles in [full_begin, full_end), some cells of the others. Never a list of all tiles.
        """
        if bm < 1 or bn < 1:
            raise DistattnError(f"tiles are at least 1 x 1, not {bm} x {bn}.")
        tight = tighten(self.pieces)
        piece, tile = expand(tight[:, Q0] // bm, (tight[:, Q1] - 1) // bm + 1)
        band = tight[piece]
        q0, q1 = np.maximum(tile * bm, band[:, Q0]), np.minimum((tile + 1) * bm, band[:, Q1])
        first_begin, first_end = row_ends(band, q0)
        last_begin, last_end = row_ends(band, q1 - 1)
        begin, end = first_begin // bn, -(-last_end // bn)
        # full tiles: every row of the tile present, keys between the last row's begin and the first row's end
        whole = (q0 == tile * bm) & (q1 == np.minimum((tile + 1) * bm, self.n))
        full_begin = -(-last_begin // bn)
        full_end = np.where(first_end == self.n, -(-self.n // bn), first_end // bn)
        none = ~whole | (full_begin >= full_end)
        full_begin, full_end = np.where(none, begin, full_begin), np.where(none, begin, full_end)
        order = np.lexsort((piece, tile))
        columns = dict(tile=tile, piece=piece, begin=begin, full_begin=full_begin, full_end=full_end, end=end)
        return {name: column[order] for name, column in columns.items()}

    @property
    def digest(self) -> str:
        """128-bit hash of the axis and its pieces, in their order: tasks name pieces by number."""
        content = np.int64(self.n).tobytes() + self.pieces.astype("<i8").tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Mask({self.n} tokens, {len(self.pieces)} pieces, {self.area()} cells)"

    def _clipped(self, q: tuple[int, int] | None, k: tuple[int, int] | None) -> Ints:
        (q0, q1), (k0, k1) = q or (0, self.n), k or (0, self.n)
        return clip(self.pieces, q0, q1, k0, k1)


def document_ends(lengths: Sequence[int]) -> Ints:
    """Where each document ends on the axis; refuses lengths that are not positive whole numbers."""
    array = whole_numbers(lengths, "document lengths")
    if array.ndim != 1 or not len(array):
        raise DistattnError("document lengths are a list of at least one positive whole number.")
    if (array < 1).any():
        i = int(np.flatnonzero(array < 1)[0])
        raise DistattnError(f"document {i} has length {array[i]}; leave out documents without tokens.")
    # before they are added up: sums wrap around
    if array.max() > MAX_TOKENS or len(array) > MAX_TOKENS:
        raise DistattnError(f"an axis holds at most {MAX_TOKENS} tokens; the longest document has {array.max()}.")
    ends = np.cumsum(array)
    if ends[-1] > MAX_TOKENS:
        raise DistattnError(f"an axis holds at most {MAX_TOKENS} tokens; these documents have {ends[-1]}.")
    return ends


def _inner_band(inner: str | tuple[int, int]) -> tuple[int, int]:
    if inner == "causal":
        return -UNBOUNDED, 0
    if inner == "full":
        return -UNBOUNDED, UNBOUNDED
    if not isinstance(inner, (tuple, list)) or len(inner) != 2:
        raise DistattnError(f'inner is "causal", "full" or a window (left, right), not {inner!r}.')
    left, right = whole_numbers(inner, "a window (left, right)").tolist()
    if left < 0 or right < 0:
        raise DistattnError(f"a window reaches left >= 0 and right >= 0 tokens, not ({left}, {right}).")
    return -min(left, UNBOUNDED), min(right, UNBOUNDED)


def _with_defaults(pieces: Ints) -> Ints:
    if pieces.shape[1] == 10:
        return pieces
    return np.column_stack([pieces, np.ones((len(pieces), 2), np.int64), np.zeros((len(pieces), 2), np.int64)])


def _check_pieces(pieces: Ints, n: int) -> None:
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
    _check_disjoint(tight)


def _check_disjoint(tight: Ints) -> None:
    """Cell-exact between pieces with bq = bk = 1; otherwise their rectangles must be disjoint."""
    # sweep along the axis on which fewer rectangles meet
    sweeps = []
    for low, high in ((Q0, Q1), (K0, K1)):
        order = np.argsort(tight[:, low], kind="stable")
        start = tight[order, low]
        stop = np.searchsorted(start, tight[order, high], "left")
        sweeps.append((int((stop - np.arange(len(order)) - 1).sum()), order, stop))
    _, order, stop = min(sweeps, key=lambda sweep: sweep[0])
    rows = np.arange(len(order))
    batch = np.cumsum(stop - rows - 1) // _PAIRS
    for part in np.unique(batch):
        chosen = rows[batch == part]
        i, j = expand(chosen + 1, stop[chosen])
        _refuse_common_cells(tight, order[chosen[i]], order[j])


def _refuse_common_cells(tight: Ints, a: Ints, b: Ints) -> None:
    both = clip(tight[a], *(tight[b, column] for column in (Q0, Q1, K0, K1)))
    meet = (both[:, Q0] < both[:, Q1]) & (both[:, K0] < both[:, K1])
    a, b, both = a[meet], b[meet], both[meet]
    cellwise = (tight[a][:, [BQ, BK]] == 1).all(1) & (tight[b][:, [BQ, BK]] == 1).all(1)
    # with unit blocks the offsets are part of the bounds: lo <= k - q + oq - ok <= hi
    shift = (tight[b, OK] - tight[b, OQ]) - (tight[a, OK] - tight[a, OQ])
    both[:, LO] = np.where(cellwise, np.maximum(both[:, LO], tight[b, LO] + shift), -UNBOUNDED)
    both[:, HI] = np.where(cellwise, np.minimum(both[:, HI], tight[b, HI] + shift), UNBOUNDED)
    bad = np.flatnonzero(~cellwise | (areas(both) > 0))
    if len(bad):
        i = bad[0]
        how = "" if cellwise[i] else " (pieces with blocks must have disjoint rectangles)"
        raise DistattnError(
            f"pieces {min(a[i], b[i])} and {max(a[i], b[i])} overlap{how}; every cell belongs to one piece."
        )
