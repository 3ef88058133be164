"""The greedy rule of the core-attention disaggregation paper, for comparison only. Use `cad` for real work.

Zhuang et al. 2025, arXiv 2510.18121, section 4.2 and appendix B. Ranks below the mean load, the least loaded first, take the
piece with the most work per byte until they are within the tolerance. A piece consists of head-tail pairs of a document's rows
(the i-th row from the front and the i-th from the back, so that every pair has the same work) and all the keys they see. Bytes
are estimated in closed form. Only receivers are bounded: an overloaded rank may stay overloaded. Only the work of causal
documents moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.bands import BK, BQ, HI, K0, LO, OK, OQ, areas, clip
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints, as_int64
from distattn.ir.plan import TASK_COLUMNS, Call, Columns, Table, concat_rows, make_columns
from distattn.parallel.strategies.cad import route_tasks
from distattn.parallel.tables.cost import bytes_per_row_and_key
from distattn.parallel.tables.partition import Rectangles, clip_rectangles, mask_rectangles, split_by_query_owner


@dataclass(frozen=True)
class CadGreedyOptions:
    """Options of "cad_greedy".

    tolerance: how far below the mean load a receiver may stay, as a fraction of the mean. block: each half of a piece has a
    multiple of this number of rows.
    """

    tolerance: float = 0.1
    block: int = 128

    def __post_init__(self) -> None:
        is_share = isinstance(self.tolerance, int | float) and 0 <= self.tolerance <= 1
        if not is_share or int(as_int64(self.block, "block")) < 1:
            raise DistattnError(
                f"cad_greedy needs a tolerance of 0 to 1 and a block of at least 1, not {self.tolerance}, {self.block}."
            )


def cad_greedy(
    call: Call, cluster: AnyCluster | None = None, options: CadGreedyOptions = CadGreedyOptions()
) -> list[Table]:
    """Return one candidate table. Step 0 sends inputs and runs local work, step 1 runs moved work, step 2 returns outputs."""
    area, rank = split_by_query_owner(call, mask_rectangles(call), call.layout.chunks)
    pairs = _Pairs(area, rank, call, options.block)
    mean = pairs.load.sum() / call.ranks
    weights = bytes_per_row_and_key(call, "forward")
    for receiver in np.argsort(pairs.load, kind="stable").tolist():
        while mean - pairs.load[receiver] > options.tolerance * mean:
            if not pairs.move(receiver, mean, weights):
                break
    return [route_tasks(call, pairs.tasks())]


class _Pairs:
    """The pieces of work, and the rank that computes each of them. A piece is a range [first, last) of head-tail pairs of rows
    in a part of a document, counted from the outside."""

    def __init__(self, area: Rectangles, rank: Ints, call: Call, block: int):
        self.call, self.area, self.block = call, area, block
        rows, band = area.q1 - area.q0, call.mask.pieces[area.piece]
        self.context, self.length = area.q0 - band[:, K0], area.q0 + area.q1 - 2 * band[:, K0]
        self.heads = (area.h1 - area.h0) / call.heads
        pairs = rows / 2
        work = areas(clip(band, area.q0, area.q1, area.k0, area.k1)) * self.heads
        self.load = np.bincount(rank, work, call.ranks)
        # work per pair; an odd row in the middle counts as half a pair
        self.each = work / pairs
        causal = (band[:, [BQ, BK]] == 1).all(1) & (band[:, HI] + band[:, OK] == band[:, OQ])
        self.causal = causal & (band[:, LO] + band[:, OK] - band[:, OQ] <= -call.mask.n)
        self.items = {"part": np.arange(len(rank)), "first": np.zeros(len(rank)), "last": pairs, "rank": rank.copy()}

    def move(self, receiver: int, mean: float, weights: tuple[int, int]) -> bool:
        """Hand the best available piece to the receiver. Return False if no piece is available."""
        surplus = self.load - mean
        items = self.items
        some = np.flatnonzero((surplus[items["rank"]] > 0) & self.causal[items["part"]])
        if not len(some):
            return False
        part, first, last, sender = (items[name][some] for name in ("part", "first", "last", "rank"))
        work = (last - first) * self.each[part]
        moved = np.minimum(np.minimum(work, surplus[sender]), mean - self.load[receiver])
        size = _estimated(moved / work, last - first, self.context[part] + last, self.length[part], weights)
        best = int(np.argmax(moved / (size * self.heads[part])))
        wanted = moved[best] / self.each[part[best]]
        # move complete blocks, unless the receiver needs less than half a block
        item, count = int(some[best]), np.round(wanted / self.block) * self.block or np.ceil(wanted)
        # the innermost pairs need the fewest keys for their work
        begin = last[best] // 1 - count
        if begin <= first[best]:
            items["rank"][item], count = receiver, last[best] - first[best]
        else:
            new = {"part": part[best], "first": begin, "last": last[best], "rank": receiver}
            items["last"][item], count = begin, last[best] - begin
            self.items = {name: np.append(column, new[name]) for name, column in items.items()}
        self.load[sender[best]] -= count * self.each[part[best]]
        self.load[receiver] += count * self.each[part[best]]
        return True

    def tasks(self) -> Columns:
        """Return the tasks of all pieces: two rectangles each, or one if the halves touch."""
        part, rank, area = self.items["part"].astype(np.int64), self.items["rank"].astype(np.int64), self.area
        first, last = self.items["first"].astype(np.int64), np.ceil(self.items["last"]).astype(np.int64)
        q0, q1 = area.q0[part], area.q1[part]
        # an odd row in the middle belongs to the front half
        front, back = q0 + last, np.maximum(q1 - last, q0 + last)
        meet = back == front
        ends = np.where(meet, q1 - first, front)
        parts = []
        for a, b, some in ((q0 + first, ends, first < last), (back, q1 - first, ~meet)):
            at = np.flatnonzero(some & (a < b))
            row = part[at]
            rows, kept = clip_rectangles(self.call, area, row, a[at], b[at], area.k0[row], area.k1[row])
            parts.append(make_columns(TASK_COLUMNS, step=0, rank=rank[at][kept], **vars(rows)))
        return concat_rows(TASK_COLUMNS, parts)


def _estimated(
    share: np.ndarray, rows: np.ndarray, context: np.ndarray, length: np.ndarray, weights: tuple[int, int]
) -> np.ndarray:
    """Estimate the bytes that move with `share` of `rows` head-tail pairs whose front half ends at `context` (appendix B)."""
    queries = context - np.sqrt(np.maximum(context**2 - share * (2 * context - rows) * rows, 0))
    return queries * weights[0] + (length - (context - queries)) * weights[1]
