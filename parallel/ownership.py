"""From a mask and a layout to rectangles and moves: the vocabulary strategies are written in.

Every function here is vectorised over int64 rows and knows no strategy.
"""

from dataclasses import dataclass

import numpy as np

from distattn.intervals import Ints, crossing, union
from distattn.mask import K0, K1, Q0, Q1, clip, tighten
from distattn.plan import MOVE_COLUMNS, Call, Columns, Payload, columns, count, take, tight_tasks


@dataclass(frozen=True)
class Rectangles:
    """Tight rectangles of mask pieces, one row each: the piece, and [q0, q1) x [k0, k1)."""

    piece: Ints
    q0: Ints
    q1: Ints
    k0: Ints
    k1: Ints


def pieces(call: Call) -> Rectangles:
    """One tight rectangle per piece of the mask."""
    tight = tighten(call.mask.pieces)
    return Rectangles(np.arange(len(tight)), *(tight[:, column] for column in (Q0, Q1, K0, K1)))


def split_by_query_owner(call: Call, area: Rectangles) -> tuple[Rectangles, Ints]:
    """Cut rectangles where the owner of the queries changes. Returns (rectangles, rank that owns their queries)."""
    chunks = call.layout.chunks
    i, j = crossing(chunks["t0"], chunks["t1"], area.q0, area.q1)
    bands = clip(call.mask.pieces[area.piece[i]], chunks["t0"][j], chunks["t1"][j], area.k0[i], area.k1[i])
    parts, kept = _tight(bands, area.piece[i])
    return parts, chunks["rank"][j][kept]


def split_by_key_owner(call: Call, area: Rectangles) -> tuple[Rectangles, Ints, Ints]:
    """Cut rectangles where the owner of the keys changes. Returns (rectangles, input row, rank that owns their keys)."""
    chunks = call.layout.chunks
    i, j = crossing(chunks["t0"], chunks["t1"], area.k0, area.k1)
    k0, k1 = np.maximum(area.k0[i], chunks["t0"][j]), np.minimum(area.k1[i], chunks["t1"][j])
    parts, kept = _tight(clip(call.mask.pieces[area.piece[i]], area.q0[i], area.q1[i], k0, k1), area.piece[i])
    return parts, i[kept], chunks["rank"][j][kept]


def owned(call: Call, rank: Ints, a: Ints, b: Ints) -> np.ndarray:
    """Whether rank_i owns every token of [a_i, b_i)."""
    chunks = call.layout.chunks
    i, j = crossing(chunks["t0"], chunks["t1"], a, b)
    out = np.ones(len(rank), bool)
    np.logical_and.at(out, i, chunks["rank"][j] == rank[i])
    return out


def fetch(call: Call, payload: Payload, step: int | Ints, rank: Ints, a: Ints, b: Ints, h0: int, h1: int) -> Columns:
    """Moves that bring tokens [a_i, b_i), heads [h0, h1), from their owners to rank_i at `step`, each token once."""
    chunks = call.layout.chunks
    rank, a, b = union(rank, a, b)
    i, j = crossing(chunks["t0"], chunks["t1"], a, b)
    moves = columns(
        MOVE_COLUMNS,
        step=step,
        src=chunks["rank"][j],
        dst=rank[i],
        payload=int(payload),
        t0=np.maximum(a[i], chunks["t0"][j]),
        t1=np.minimum(b[i], chunks["t1"][j]),
        h0=h0,
        h1=h1,
    )
    return take(moves, moves["src"] != moves["dst"])


def reversed_as(moves: Columns, payload: Payload, step: int | Ints) -> Columns:
    """The same rows with the arrow turned, carrying `payload` at `step`."""
    return columns(
        MOVE_COLUMNS, **{**moves, "src": moves["dst"], "dst": moves["src"], "payload": int(payload), "step": step}
    )


def coalesce(moves: Columns) -> Columns:
    """Join moves whose token intervals touch and that agree in all else."""
    names = [name for name in MOVE_COLUMNS if name not in ("t0", "t1")]
    order = np.lexsort([moves["t0"], *(moves[name] for name in names)])
    rows = take(moves, order)
    fresh = np.ones(count(rows), bool)
    fresh[1:] = rows["t0"][1:] != rows["t1"][:-1]
    for name in names:
        fresh[1:] |= rows[name][1:] != rows[name][:-1]
    last = np.append(np.flatnonzero(fresh)[1:], count(rows)) - 1
    return {**take(rows, fresh), "t1": rows["t1"][last] if count(rows) else rows["t1"]}


def _tight(bands: Ints, piece: Ints) -> tuple[Rectangles, np.ndarray]:
    tight = tighten(bands)
    kept = np.flatnonzero(tight_tasks(tight))
    return Rectangles(piece[kept], *(tight[kept, column] for column in (Q0, Q1, K0, K1))), kept
