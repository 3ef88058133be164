"""Operations on rectangles of the score matrix, which strategies use to divide a mask.

Every function is vectorised over int64 rows and independent of the strategy.
"""

from dataclasses import dataclass

import numpy as np

from distattn.ir.bands import K0, K1, Q0, Q1, clip, tighten
from distattn.ir.intervals import Ints, expand_ranges, overlapping_pairs
from distattn.ir.plan import Call, Columns, nonempty_bands


@dataclass(frozen=True)
class Rectangles:
    """Tight rectangles of mask pieces, one row each: the piece, [q0, q1) x [k0, k1), and query heads [h0, h1)."""

    piece: Ints
    q0: Ints
    q1: Ints
    k0: Ints
    k1: Ints
    h0: Ints
    h1: Ints


def mask_rectangles(call: Call) -> Rectangles:
    """Return one tight rectangle per piece of the mask."""
    tight = tighten(call.mask.pieces)
    return Rectangles(np.arange(len(tight)), *(tight[:, column] for column in (Q0, Q1, K0, K1)), *call.piece_heads.T)


def split_by_query_owner(call: Call, area: Rectangles, chunks: Columns) -> tuple[Rectangles, Ints]:
    """Cut rectangles where the owner of the queries changes. Return (rectangles, owner of the queries)."""
    i, j = overlapping_pairs(chunks["t0"], chunks["t1"], area.q0, area.q1)
    parts, kept = clip_rectangles(call, area, i, chunks["t0"][j], chunks["t1"][j], area.k0[i], area.k1[i])
    return parts, chunks["rank"][j][kept]


def split_by_key_owner(call: Call, area: Rectangles, chunks: Columns) -> tuple[Rectangles, Ints, Ints]:
    """Cut rectangles where the owner of the keys changes. Return (rectangles, input row, owner of the keys)."""
    i, j = overlapping_pairs(chunks["t0"], chunks["t1"], area.k0, area.k1)
    k0, k1 = np.maximum(area.k0[i], chunks["t0"][j]), np.minimum(area.k1[i], chunks["t1"][j])
    parts, kept = clip_rectangles(call, area, i, area.q0[i], area.q1[i], k0, k1)
    return parts, i[kept], chunks["rank"][j][kept]


def split_by_owners(call: Call, chunks: Columns | None = None) -> tuple[Rectangles, Ints, Ints]:
    """Cut the entire mask where either owner changes. Return (rectangles, owner of the queries, owner of the keys)."""
    chunks = call.layout.chunks if chunks is None else chunks
    area, query_owner = split_by_query_owner(call, mask_rectangles(call), chunks)
    area, row, key_owner = split_by_key_owner(call, area, chunks)
    return area, query_owner[row], key_owner


def split_heads(area: Rectangles, parts: int, heads: int) -> tuple[Rectangles, Ints, Ints]:
    """Divide query heads into `parts` parts as evenly as possible. Return (rectangles, input row, part)."""
    bounds = np.arange(parts + 1) * heads // parts
    i, part = expand_ranges(np.searchsorted(bounds, area.h0, "right") - 1, np.searchsorted(bounds, area.h1, "left"))
    h0, h1 = np.maximum(area.h0[i], bounds[part]), np.minimum(area.h1[i], bounds[part + 1])
    rows = {name: column[i] for name, column in vars(area).items()}
    return Rectangles(**{**rows, "h0": h0, "h1": h1}), i, part


def chunks_of_groups(call: Call, group: Ints) -> Columns:
    """Return the layout's chunks with the group of each rank in column `rank`. Adjacent chunks of a group are joined."""
    chunks = call.layout.chunks
    owner = group[chunks["rank"]]
    is_first = np.ones(len(owner), bool)
    is_first[1:] = owner[1:] != owner[:-1]
    last = np.append(np.flatnonzero(is_first)[1:], len(owner)) - 1
    return {"rank": owner[is_first], "t0": chunks["t0"][is_first], "t1": chunks["t1"][last]}


def owns_range(call: Call, rank: Ints, a: Ints, b: Ints) -> np.ndarray:
    """Return whether rank_i owns every token of [a_i, b_i)."""
    chunks = call.layout.chunks
    i, j = overlapping_pairs(chunks["t0"], chunks["t1"], a, b)
    out = np.ones(len(rank), bool)
    np.logical_and.at(out, i, chunks["rank"][j] == rank[i])
    return out


def clip_rectangles(
    call: Call, area: Rectangles, i: Ints, q0: Ints, q1: Ints, k0: Ints, k1: Ints
) -> tuple[Rectangles, Ints]:
    """Clip rectangles `i` to [q0, q1) x [k0, k1), tighten them, and drop those that are empty. Return (rectangles, rows kept)."""
    tight = tighten(
        clip(clip(call.mask.pieces[area.piece[i]], area.q0[i], area.q1[i], area.k0[i], area.k1[i]), q0, q1, k0, k1)
    )
    kept = np.flatnonzero(nonempty_bands(tight))
    i, tight = i[kept], tight[kept]
    q0, q1, k0, k1 = (tight[:, column] for column in (Q0, Q1, K0, K1))
    return Rectangles(area.piece[i], q0, q1, k0, k1, area.h0[i], area.h1[i]), kept
