"""The mask: the allowed (query, key) cells of the score matrix.

A mask is a list of disjoint *bands* on the token axis (see `distattn.ir.bands`). Below, q and k are tokens, d(t) is the
document of token t, and s is that document's first token. A cell is allowed if the formula in the constructor's docstring holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from distattn.ir.arguments import checked
from distattn.ir.bands import (
    COLUMNS,
    HI,
    K0,
    K1,
    LO,
    MAX_BLOCK,
    MAX_TOKENS,
    Q0,
    Q1,
    UNBOUNDED,
    areas,
    check_pieces,
    clip,
    row_key_ranges,
    tighten,
)
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints, as_int64, expand_ranges, merge_intervals, numbers_of_rows

# maximum number of query heads, so that all products with it fit in int64
MAX_HEADS = 1 << 14


class Mask:
    """The allowed cells on an axis of `n` tokens, as disjoint bands. Immutable; compare by `digest`.

    `pieces` is an int64 array (P, 10) in the order given, with the columns of `bands.COLUMNS`. In a mask that differs by head,
    piece i belongs to query heads [piece_heads[i, 0], piece_heads[i, 1]) out of `heads`; otherwise these attributes are None.
    """

    @checked
    def __init__(self, pieces: Ints, n: int, piece_heads: Ints | None = None, heads: int | None = None):
        if not 0 < n <= MAX_TOKENS:
            raise DistattnError(f"a mask covers 1 to {MAX_TOKENS} tokens, not {n}.")
        pieces = np.array(pieces, np.int64).reshape(-1, 10)
        pieces[:, LO] = np.maximum(pieces[:, LO], -UNBOUNDED)
        pieces[:, HI] = np.minimum(pieces[:, HI], UNBOUNDED)
        if piece_heads is not None:
            piece_heads = np.array(piece_heads, np.int64).reshape(len(pieces), 2)
            piece_heads.setflags(write=False)
        check_pieces(pieces, n, piece_heads)
        pieces.setflags(write=False)
        self.n, self.pieces, self.piece_heads, self.heads = n, pieces, piece_heads, heads

    @staticmethod
    @checked
    def full(n: int) -> Mask:
        """Return a mask in which every query sees every key."""
        return Mask.documents([n], document_mask="full")

    @staticmethod
    @checked
    def causal(n: int) -> Mask:
        """Return a mask in which every query sees all keys up to its own position: k <= q."""
        return Mask.documents([n])

    @staticmethod
    @checked
    def sliding_window(n: int, left: int, right: int = 0, *, sink_tokens: int = 0) -> Mask:
        """Return a mask with a window around every query: k <= q + right and (k >= q - left or k < sink_tokens)."""
        return Mask.documents([n], document_mask=(left, right), sink_tokens=sink_tokens)

    @staticmethod
    @checked
    def documents(
        lengths: Sequence[int], document_mask: str | tuple[int, int] = "causal", *, sink_tokens: int = 0
    ) -> Mask:
        """Return a mask of packed documents: d(q) = d(k), and within each document the cells that `document_mask` allows.

        "full": all cells; "causal": k <= q; a window (left, right): k <= q + right and (k >= q - left or k - s < sink_tokens).
        """
        start, end = _document_bounds(lengths)
        lo, hi = _document_band(document_mask)
        first = start
        parts = []
        if _nonnegative(sink_tokens, "sink_tokens") and lo != -UNBOUNDED:
            first = np.minimum(start + min(sink_tokens, MAX_TOKENS), end)
            parts.append(_bands(start, end, start, first, -UNBOUNDED, hi))
        return _from_parts([*parts, _bands(start, end, first, end, lo, hi)], end[-1])

    @staticmethod
    @checked
    def token_shift(lengths: Sequence[int], distance: int) -> Mask:
        """Return a mask in which each token sees only the token `distance` before it in its document: q - k = distance.

        With a negative distance, each token sees a later token.
        """
        start, end = _document_bounds(lengths)
        if abs(distance) > MAX_TOKENS:
            raise DistattnError(f"a token shift must be at most {MAX_TOKENS} tokens, not {distance}.")
        some = end - start > abs(distance)
        return _from_parts([_bands(start[some], end[some], start[some], end[some], -distance, -distance)], end[-1])

    @staticmethod
    @checked
    def shared_question(lengths: Sequence[int]) -> Mask:
        """Return a causal mask in which all documents also see the first document, a shared question.

        A cell is allowed if k <= q and (d(q) = d(k) or d(k) = 0).
        """
        start, end = _document_bounds(lengths)
        question = _bands(start[1:], end[1:], 0, end[0], -UNBOUNDED, UNBOUNDED)
        return _from_parts([_bands(start, end, start, end, -UNBOUNDED, 0), question], end[-1])

    @staticmethod
    @checked
    def causal_blockwise(lengths: Sequence[int]) -> Mask:
        """Return a causal mask whose last document, a test example, also sees all other documents.

        A cell is allowed if k <= q and (d(q) = d(k) or d(q) is last).
        """
        start, end = _document_bounds(lengths)
        low = np.append(start[:-1], 0)
        return _from_parts([_bands(start, end, low, end, -UNBOUNDED, 0)], end[-1])

    @staticmethod
    @checked
    def prefix_lm(n: int, prefix: int) -> Mask:
        """Return a causal mask with a prefix that every query sees: k <= q or k < prefix."""
        if prefix > n:
            raise DistattnError(f"the prefix of {prefix} tokens is longer than the {n} tokens.")
        return Mask.prefix_lm_documents([n], prefix)

    @staticmethod
    @checked
    def prefix_lm_documents(lengths: Sequence[int], prefix: int | Sequence[int]) -> Mask:
        """Return a mask of packed documents with prefixes: d(q) = d(k) and (k <= q or k - s < prefix).

        prefix: one length for all documents, or one per document.
        """
        start, end = _document_bounds(lengths)
        prefixes = as_int64(prefix, "prefix")
        if prefixes.shape not in ((), start.shape) or (prefixes < 0).any():
            raise DistattnError(f"prefix must be one number >= 0, or one for each of {len(start)} documents.")
        middle = start + np.minimum(prefixes, end - start)
        parts = [
            _bands(start, end, start, middle, -UNBOUNDED, UNBOUNDED),
            _bands(middle, end, middle, end, -UNBOUNDED, 0),
        ]
        return _from_parts(parts, end[-1])

    @staticmethod
    @checked
    def global_sliding_window(n: int, left: int, right: int, n_global: int) -> Mask:
        """Return a sliding window with global tokens, which see all tokens and are seen by all tokens.

        A cell is allowed if q - left <= k <= q + right or min(q, k) < n_global.
        """
        _, (end,) = _document_bounds([n])
        lo, hi = _document_band((left, right))
        seen = min(_nonnegative(n_global, "n_global"), n)
        parts = [
            _bands(0, seen, 0, end, -UNBOUNDED, UNBOUNDED),
            _bands(seen, end, 0, seen, -UNBOUNDED, UNBOUNDED),
            _bands(seen, end, seen, end, lo, hi),
        ]
        return _from_parts(parts, end)

    @staticmethod
    @checked
    def block_causal(n: int, block: int) -> Mask:
        """Return a mask that is causal by blocks of tokens: k // block <= q // block."""
        return Mask.block_causal_documents([n], block)

    @staticmethod
    @checked
    def block_causal_documents(lengths: Sequence[int], block: int) -> Mask:
        """Return a mask of packed documents, causal by blocks: d(q) = d(k) and (k - s) // block <= (q - s) // block."""
        start, end = _document_bounds(lengths)
        if not 1 <= _nonnegative(block, "block") <= MAX_BLOCK:
            raise DistattnError(f"a block must have 1 to {MAX_BLOCK} tokens, not {block}.")
        return _from_parts([_bands(start, end, start, end, -UNBOUNDED, 0, block, start)], end[-1])

    @staticmethod
    @checked
    def by_head(groups: Sequence[tuple[int, Mask]]) -> Mask:
        """Return a mask that differs by head. groups: pairs (number of query heads, mask of those heads), in the order of heads.

        A piece that neighbouring groups share becomes one piece for all of their heads.
        """
        if not groups or any(mask.heads is not None for _, mask in groups):
            raise DistattnError(
                "by_head needs pairs (number of heads, mask), whose masks do not differ by head themselves."
            )
        if len(sizes := {mask.n for _, mask in groups}) > 1:
            raise DistattnError(f"the masks of head groups must cover one axis, not {sorted(sizes)} tokens.")
        ends = np.cumsum([_nonnegative(heads, "heads of a group") for heads, _ in groups])
        if any(heads < 1 for heads, _ in groups) or ends[-1] > MAX_HEADS:
            raise DistattnError(f"a head group has at least 1 head, and all groups together at most {MAX_HEADS}.")
        rows = np.concatenate([mask.pieces for _, mask in groups])
        group = np.repeat(np.arange(len(groups)), [len(mask.pieces) for _, mask in groups])
        same = numbers_of_rows(*rows.T)
        order = np.lexsort((group, same))
        group, same = group[order], same[order]
        fresh = np.ones(len(group), bool)
        fresh[1:] = (same[1:] != same[:-1]) | (group[1:] != group[:-1] + 1)
        last = group[np.append(np.flatnonzero(fresh)[1:], len(group)) - 1]
        heads = np.stack([np.append(0, ends)[group[fresh]], ends[last]], 1)
        # put the pieces back into the order in which the groups list them
        named = np.argsort(order[fresh])
        return Mask(rows[order[fresh]][named], groups[0][1].n, heads[named], int(ends[-1]))

    @staticmethod
    @checked
    def from_pieces(array: Sequence[Sequence[int]] | Ints, n: int | None = None) -> Mask:
        """Return a mask from rows (q0, q1, k0, k1, lo, hi) or rows of all ten columns. n: by default the last piece's end."""
        pieces = as_int64(array, "pieces")
        if pieces.ndim != 2 or pieces.shape[1] not in (6, 10) or not len(pieces):
            raise DistattnError(
                f"pieces have 6 columns ({', '.join(COLUMNS[:6])}) or 10 ({', '.join(COLUMNS)}), "
                f"and at least one row; this array has shape {pieces.shape}."
            )
        pieces = _with_defaults(pieces)
        return Mask(pieces, int(pieces[:, [Q1, K1]].max()) if n is None else n)

    @checked
    def area(self, q: tuple[int, int] | None = None, k: tuple[int, int] | None = None) -> int:
        """Return the number of allowed cells in rows [q[0], q[1]) and columns [k[0], k[1]); by default on the entire axis.

        For a mask that differs by head, return the sum over heads.
        """
        cells = areas(self._clipped(q, k))
        if self.piece_heads is None:
            return int(cells.sum())
        # Python integers: 2^60 cells times many heads overflow int64
        return sum((cells.astype(object) * np.diff(self.piece_heads, axis=1)[:, 0]).tolist())

    @checked
    def cut(self, q: tuple[int, int] | None = None, k: tuple[int, int] | None = None) -> Mask:
        """Return a mask of the same axis that keeps only the cells in rows q and columns k."""
        pieces = self._clipped(q, k)
        tight = tighten(pieces)
        kept = tight[:, Q0] < tight[:, Q1]
        return Mask(pieces[kept], self.n, None if self.piece_heads is None else self.piece_heads[kept], self.heads)

    @checked
    def needed_keys(self, q_set: Sequence[tuple[int, int]] | Ints) -> Ints:
        """Return the keys that queries in `q_set` see, sorted and disjoint. Keys and queries are half-open intervals (M, 2)."""
        q_set = as_int64(q_set, "query intervals")
        if q_set.size and (q_set.ndim != 2 or q_set.shape[1] != 2):
            raise DistattnError(f"query intervals must be pairs (M, 2), not {q_set.shape}.")
        q_set = q_set.reshape(-1, 2)
        _, q0, q1 = merge_intervals(np.zeros(len(q_set), np.int64), q_set[:, 0], q_set[:, 1])
        i, j = expand_ranges(
            np.searchsorted(q1, self.pieces[:, Q0], "right"), np.searchsorted(q0, self.pieces[:, Q1], "left")
        )
        hit = tighten(clip(self.pieces[i], q0[j], q1[j], 0, self.n))
        hit = hit[hit[:, Q0] < hit[:, Q1]]
        _, k0, k1 = merge_intervals(np.zeros(len(hit), np.int64), hit[:, K0], hit[:, K1])
        return np.stack([k0, k1], 1)

    def dense(self) -> np.ndarray:
        """Return the mask as booleans (n, n), or (heads, n, n) if it differs by head. For tests and small pictures only."""
        out = np.zeros((self.heads or 1, self.n, self.n), bool)
        k = np.arange(self.n)
        for i, piece in enumerate(self.pieces):
            heads = slice(None) if self.piece_heads is None else slice(*self.piece_heads[i])
            q = np.arange(piece[Q0], piece[Q1])
            begin, end = row_key_ranges(np.broadcast_to(piece, (len(q), 10)), q)
            out[heads, piece[Q0] : piece[Q1]] |= (k >= begin[:, None]) & (k < end[:, None])
        return out[0] if self.piece_heads is None else out

    @checked
    def tiles(self, bm: int, bn: int) -> dict[str, Ints]:
        """Return runs of key tiles for a kernel with tiles of bm queries x bn keys.

        There is one row for each pair of a query tile and a piece that overlaps it.

        Columns: `tile` (query tile), `piece`, and key tiles `begin` <= `full_begin` <= `full_end` <= `end`. The piece allows all
        cells of the tiles in [full_begin, full_end), and some cells of the other tiles in [begin, end).
        """
        if not (1 <= bm <= MAX_TOKENS and 1 <= bn <= MAX_TOKENS):
            raise DistattnError(f"tiles must be at least 1 x 1, and at most {MAX_TOKENS} wide, not {bm} x {bn}.")
        tight = tighten(self.pieces)
        piece, tile = expand_ranges(tight[:, Q0] // bm, (tight[:, Q1] - 1) // bm + 1)
        band = tight[piece]
        q0, q1 = np.maximum(tile * bm, band[:, Q0]), np.minimum((tile + 1) * bm, band[:, Q1])
        first_begin, first_end = row_key_ranges(band, q0)
        last_begin, last_end = row_key_ranges(band, q1 - 1)
        begin, end = first_begin // bn, -(-last_end // bn)
        # a key tile is full if the band covers all rows of the query tile, and the keys lie between the last row's first key and
        # the first row's end
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
        """A 128-bit hash of the axis and its pieces. The order of the pieces counts, because tasks refer to them by index."""
        content = np.int64(self.n).tobytes() + self.pieces.astype("<i8").tobytes()
        if self.piece_heads is not None:
            content += b"heads" + np.int64(self.heads or 0).tobytes() + self.piece_heads.astype("<i8").tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        heads = "" if self.heads is None else f" in {self.heads} heads"
        return f"Mask({self.n} tokens, {len(self.pieces)} pieces, {self.area()} cells{heads})"

    def _clipped(self, q: tuple[int, int] | None, k: tuple[int, int] | None) -> Ints:
        (q0, q1), (k0, k1) = q or (0, self.n), k or (0, self.n)
        return clip(self.pieces, q0, q1, k0, k1)


def document_ends(lengths: Sequence[int]) -> Ints:
    """Return the end of each document on the axis. Raise DistattnError if a length is not a positive integer."""
    array = as_int64(lengths, "document lengths")
    if array.ndim != 1 or not len(array):
        raise DistattnError("document lengths must be a list of at least one positive whole number.")
    if (array < 1).any():
        i = int(np.flatnonzero(array < 1)[0])
        raise DistattnError(f"document {i} has length {array[i]}; leave out documents without tokens.")
    # check before the sum, which may overflow
    if array.max() > MAX_TOKENS or len(array) > MAX_TOKENS:
        raise DistattnError(f"an axis holds at most {MAX_TOKENS} tokens; the longest document has {array.max()}.")
    ends = np.cumsum(array)
    if ends[-1] > MAX_TOKENS:
        raise DistattnError(f"an axis holds at most {MAX_TOKENS} tokens; these documents have {ends[-1]}.")
    return ends


def _document_band(document_mask: str | tuple[int, int]) -> tuple[int, int]:
    if document_mask == "causal":
        return -UNBOUNDED, 0
    if document_mask == "full":
        return -UNBOUNDED, UNBOUNDED
    if not isinstance(document_mask, (tuple, list)) or len(document_mask) != 2:
        raise DistattnError(f'document_mask must be "causal", "full" or a window (left, right), not {document_mask!r}.')
    left, right = as_int64(document_mask, "a window (left, right)").tolist()
    if left < 0 or right < 0:
        raise DistattnError(f"a window reaches left >= 0 and right >= 0 tokens, not ({left}, {right}).")
    return -min(left, UNBOUNDED), min(right, UNBOUNDED)


def _with_defaults(pieces: Ints) -> Ints:
    if pieces.shape[1] == 10:
        return pieces
    return np.column_stack([pieces, np.ones((len(pieces), 2), np.int64), np.zeros((len(pieces), 2), np.int64)])


def _document_bounds(lengths: Sequence[int]) -> tuple[Ints, Ints]:
    ends = document_ends(lengths)
    return ends - np.diff(ends, prepend=0), ends


def _nonnegative(value: int, name: str) -> int:
    number = int(as_int64(value, name))
    if number < 0:
        raise DistattnError(f"{name} must be a number >= 0, not {number}.")
    return number


def _bands(
    q0: Ints | int,
    q1: Ints | int,
    k0: Ints | int,
    k1: Ints | int,
    lo: int,
    hi: int,
    block: int = 1,
    origin: Ints | int = 0,
) -> Ints:
    """Return bands (M, 10), one per row of the arrays; bands with an empty rectangle are left out."""
    columns = np.broadcast_arrays(*(np.atleast_1d(x) for x in (q0, q1, k0, k1, lo, hi, block, block, origin, origin)))
    rows = np.stack(columns, 1).astype(np.int64)
    return rows[(rows[:, Q0] < rows[:, Q1]) & (rows[:, K0] < rows[:, K1])]


def _from_parts(parts: Sequence[Ints], n: int) -> Mask:
    return Mask(np.concatenate(list(parts)), int(n))
