"""Cutting attention of a few documents into shares of given cost, each with as few rows and keys as can be.

What leaves a rank is laid out as *lanes*: the last rows of an item (a document, or the part of one that the rank owns), for
one group of heads, and for one range of keys where that spares bytes. Shares follow each other along the lanes, from
the last row of each lane to its first, and one that ends inside a block of rows ends between its keys. So a share
has whole head groups where there are several, and otherwise neighbouring rows of one of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.ir.bands import K0, K1, Q0, Q1, areas, clip, tighten
from distattn.ir.intervals import Ints, expand_ranges
from distattn.ir.plan import TASK_COLUMNS, Columns, concat_rows, make_columns, nonempty_bands, select_rows
from distattn.parallel.tables.cost import CostModel

# ranges of keys that a group of heads is tried to be cut into
_MAX_KEY_RANGES = 4


class WorkItems(NamedTuple):
    """Rectangles of mask pieces: the piece, the piece cut to the rectangle (M, 10), query heads [h0, h1)."""

    piece: Ints
    bands: Ints
    h0: Ints
    h1: Ints

    def at(self, index: np.ndarray) -> WorkItems:
        """The rectangles picked by an index."""
        return WorkItems(*(column[index] for column in self))

    def as_tasks(self, rank: Ints) -> Columns:
        """Tasks at these ranks, tight, without the empty ones; at step 0."""
        bands = tighten(self.bands)
        kept = nonempty_bands(bands)
        rectangle = {name: bands[:, column] for name, column in (("q0", Q0), ("q1", Q1), ("k0", K0), ("k1", K1))}
        rows = make_columns(TASK_COLUMNS, step=0, rank=rank, piece=self.piece, h0=self.h0, h1=self.h1, **rectangle)
        return select_rows(rows, kept)


class LaneCut(NamedTuple):
    """Items cut for their givers: tasks that stay where they are, and lanes with the giver of each, in order.

    extra: what the lanes of each rank cost more than the same cells did in one piece.
    """

    stays: Columns
    lanes: WorkItems
    sender: Ints
    extra: Ints


class Transfers(NamedTuple):
    """Who gives how much to whom; sorted by giver."""

    sender: Ints
    cost: Ints
    receiver: Ints


def cut_into_lanes(
    items: WorkItems,
    home: Ints,
    fraction: np.ndarray,
    receivers: Ints,
    cost_model: CostModel,
    group: int,
    weights: tuple[int, int],
) -> LaneCut:
    """Cut lanes from items; `home` is the rank of each (sorted), which gives away that fraction of it to so many takers.

    group: query heads that stay together. weights: bytes of a row, and of a key, of all heads.
    """
    groups = num_head_groups(items, group)
    taken, parts, first, _ = choose_cut(items, groups, fraction, receivers, cost_model, weights)
    each = (items.h1 - items.h0) // groups
    others = items._replace(h0=items.h0 + taken * each)
    before = items._replace(bands=clip(items.bands, 0, first, 0, items.bands[:, K1]), h1=others.h0)
    lanes, item = _lanes(items, each, taken, parts, first, cost_model)
    # the same rows, uncut
    whole = (
        cost_model.band_costs(tighten(clip(items.bands, first, items.bands[:, Q1], 0, items.bands[:, K1])))
        * taken
        * each
    )
    stays = [part.as_tasks(home) for part in (others, before)]
    stays = [select_rows(part, part["h0"] < part["h1"]) for part in stays]
    ranks = int(home.max()) + 1
    extra = np.bincount(home[item], cost_model.band_costs(lanes.bands) * (lanes.h1 - lanes.h0), ranks) - np.bincount(
        home, whole, ranks
    )
    return LaneCut(concat_rows(TASK_COLUMNS, stays), lanes, home[item], np.maximum(extra, 0).astype(np.int64))


def assign_lanes(cut: LaneCut, shares: Transfers, cost_model: CostModel) -> Columns:
    """Tasks of the lanes: shares at their takers, in order, what is left of the lanes at their givers."""
    pieces, receiver = _along(cut.lanes, cut.sender, shares, cost_model)
    return concat_rows(TASK_COLUMNS, [cut.stays, pieces.as_tasks(receiver)])


def num_head_groups(items: WorkItems, group: int) -> Ints:
    """Into how many parts of `group` heads each item can be cut."""
    return np.where((items.h0 % group == 0) & (items.h1 % group == 0), (items.h1 - items.h0) // group, 1)


def choose_cut(
    items: WorkItems,
    groups: Ints,
    fraction: np.ndarray,
    receivers: Ints,
    cost_model: CostModel,
    weights: tuple[int, int],
) -> tuple[Ints, Ints, Ints, np.ndarray]:
    """(groups, ranges of keys, first row, bytes): how to cut items so that fewest bytes move, as estimated.

    The rows from `first row` on, of so many groups, make up the fraction.
    """
    i, taken = expand_ranges(np.maximum(np.ceil(fraction * groups).astype(np.int64), 1), groups + 1)
    some = items.at(i)
    wanted = np.ceil(cost_model.band_costs(some.bands) * np.minimum(fraction[i] * groups[i] / taken, 1.0)).astype(
        np.int64
    )
    first, _ = cost_model.rows_to(some.bands, wanted)
    cut = tighten(clip(some.bands, first, some.bands[:, Q1], 0, some.bands[:, K1]))
    rows, keys = cut[:, Q1] - cut[:, Q0], cut[:, K1] - cut[:, K0]
    parts = np.arange(1, _MAX_KEY_RANGES + 1)[:, None]
    # shares meet inside a lane takers - 1 times, and then both want the lane's keys
    again = 1 + (receivers[i] - 1) / (taken * parts)
    cost = (taken / groups[i]) * (weights[0] * rows * parts + weights[1] * keys * again)
    # the first of the cheapest, item by item
    item = np.tile(i, len(parts))
    order = np.lexsort((np.repeat(parts.ravel(), len(i)), cost.ravel(), item))
    best = order[np.searchsorted(item[order], np.arange(len(items.piece)))]
    part, row = np.divmod(best, len(i))
    return taken[row], part + 1, first[row], cost.ravel()[best]


def _lanes(
    items: WorkItems, each: Ints, taken: Ints, parts: Ints, first: Ints, cost_model: CostModel
) -> tuple[WorkItems, Ints]:
    """(lanes, item of each): rows from `first` on of each taken group, cut into ranges of keys of equal work."""
    last = tighten(clip(items.bands, first, items.bands[:, Q1], 0, items.bands[:, K1]))
    i, _ = expand_ranges(np.zeros_like(parts), parts)
    bands = tighten(clip(last[i], 0, last[i, Q1], *_key_ranges(last, parts, cost_model)))
    # a group's ranges of keys follow each other
    at, group = expand_ranges(np.zeros_like(taken), taken)
    offset = np.cumsum(parts) - parts
    row, lane_part = expand_ranges(offset[at], offset[at] + parts[at])
    item, number = at[row], group[row]
    low = items.h0[item] + number * each[item]
    return WorkItems(items.piece[item], bands[lane_part], low, low + each[item]), item


def _key_ranges(bands: Ints, parts: Ints, cost_model: CostModel) -> tuple[Ints, Ints]:
    """Each band's keys in `parts` ranges of equal area: (first keys, ends), one row for each range."""
    i, part = expand_ranges(np.zeros_like(parts), parts)
    begin = cost_model.keys_to(bands[i], areas(bands)[i] * (parts[i] - part) // parts[i])
    begin = np.where(part == 0, bands[i, K0], begin)
    return begin, np.where(part == parts[i] - 1, bands[i, K1], np.append(begin[1:], 0))


def _along(lanes: WorkItems, sender: Ints, shares: Transfers, cost_model: CostModel) -> tuple[WorkItems, Ints]:
    """(pieces, taker of each): the lanes cut where shares end; what is left behind the last share stays with its giver."""
    heads = lanes.h1 - lanes.h0
    cost = cost_model.band_costs(lanes.bands) * heads
    end = np.cumsum(cost)
    # where each giver's lanes begin on the line of all lanes
    begin = np.append(0, end)[np.searchsorted(sender, shares.sender)]
    limit = end[np.searchsorted(sender, shares.sender, "right") - 1]
    so_far = np.cumsum(shares.cost)
    base = np.append(0, so_far)[np.searchsorted(shares.sender, shares.sender)]
    place = np.minimum(begin + so_far - base, limit)
    lane = np.searchsorted(end, place, "left")
    inside = place - (end[lane] - cost[lane])
    mark = _marks(lanes.at(lane), inside // heads[lane], cost_model)
    # of each lane: its begin, the shares that end in it, its end
    count = len(cost)
    all_lanes = np.arange(count)
    q0, q1, k0, k1 = (lanes.bands[:, column] for column in (Q0, Q1, K0, K1))
    nothing, everything = np.stack([q1, q1, k1], 1), np.stack([q0, q0, k0], 1)
    lane_of = np.concatenate([all_lanes, lane, all_lanes])
    rows = np.concatenate([nothing, mark, everything])
    kind = np.repeat([0, 1, 2], [count, len(lane), count])
    position = np.concatenate([np.zeros(count, np.int64), np.arange(len(lane)), np.zeros(count, np.int64)])
    order = np.lexsort((position, kind, lane_of))
    lane_of, rows, kind = lane_of[order], rows[order], kind[order]
    # a piece belongs to the share that ends at its far mark, or to the first one that ends in a later lane
    shares_before = np.cumsum(kind == 1)
    owner = np.where(kind[1:] == 1, shares_before[1:] - 1, shares_before[1:])
    same = lane_of[1:] == lane_of[:-1]
    here, owner = lane_of[1:][same], owner[same]
    mine = np.append(shares.sender, -1)[np.minimum(owner, len(lane))] == sender[here]
    receiver = np.where(mine, np.append(shares.receiver, -1)[np.minimum(owner, len(lane))], sender[here])
    near, far = rows[:-1][same], rows[1:][same]
    pieces, index = _between(lanes.at(here), near, far)
    return pieces, receiver[index]


def _marks(lanes: WorkItems, wanted: Ints, cost_model: CostModel) -> Ints:
    """Where the last rows that cost `wanted` begin, (M, 3): first and last + 1 row of the block that is cut, first key taken."""
    bands = lanes.bands
    row, end = cost_model.rows_to(bands, wanted)
    taken = cost_model.band_costs(clip(bands, end, bands[:, Q1], 0, bands[:, K1]))
    block = tighten(clip(bands, row, end, 0, bands[:, K1]))
    return np.stack([row, end, cost_model.keys_to(block, (wanted - taken) * cost_model.block)], 1)


def _between(lanes: WorkItems, near: Ints, far: Ints) -> tuple[WorkItems, Ints]:
    """(pieces, row) of each lane between two marks: the rest of the near block, whole rows, the begin of the far block."""
    k0, k1 = lanes.bands[:, K0], lanes.bands[:, K1]
    together = near[:, 0] == far[:, 0]
    cuts = [
        (near[:, 0], near[:, 1], np.where(together, far[:, 2], k0), near[:, 2]),
        (far[:, 1], near[:, 0], k0, k1),
        (far[:, 0], np.where(together, far[:, 0], far[:, 1]), far[:, 2], k1),
    ]
    parts = [lanes._replace(bands=clip(lanes.bands, *cut)) for cut in cuts]
    whole = WorkItems(*(np.concatenate(make_columns) for make_columns in zip(*parts, strict=True)))
    return whole, np.tile(np.arange(len(near)), len(cuts))
