"""Cut the attention of a few documents into pieces of given cost, each with as few rows and keys as possible.

Work that leaves a rank is arranged in *lanes*. A lane is the last rows of an item (a document, or the part of one that the rank
owns) for one head group, and for one key range if that saves bytes. Transfers are laid out one after another along the lanes,
from the last row of each lane to its first. If a transfer ends within a block of rows, the block is cut between keys. A transfer
therefore consists of complete head groups, or of neighbouring rows of one group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.ir.bands import K0, K1, Q0, Q1, areas, clip, tighten
from distattn.ir.intervals import Ints, expand_ranges
from distattn.ir.plan import TASK_COLUMNS, Columns, concat_rows, make_columns, nonempty_bands, select_rows
from distattn.parallel.tables.cost import CostModel

# maximum number of key ranges to try for a head group
_MAX_KEY_RANGES = 4


class WorkItems(NamedTuple):
    """Rectangles of mask pieces: the index of the piece, the piece clipped to the rectangle (M, 10), and query heads [h0,
    h1)."""

    piece: Ints
    bands: Ints
    h0: Ints
    h1: Ints

    def at(self, index: np.ndarray) -> WorkItems:
        """Return the items selected by `index`."""
        return WorkItems(*(column[index] for column in self))

    def as_tasks(self, rank: Ints) -> Columns:
        """Return the items as tight tasks in step 0, item i on rank_i. Leave out empty items."""
        bands = tighten(self.bands)
        kept = nonempty_bands(bands)
        rectangle = {name: bands[:, column] for name, column in (("q0", Q0), ("q1", Q1), ("k0", K0), ("k1", K1))}
        rows = make_columns(TASK_COLUMNS, step=0, rank=rank, piece=self.piece, h0=self.h0, h1=self.h1, **rectangle)
        return select_rows(rows, kept)


class LaneCut(NamedTuple):
    """Items cut into the tasks that stay and, in order, the lanes that may leave, with the sender of each lane.

    extra: how much more each rank's lanes cost than the same cells in one piece.
    """

    stays: Columns
    lanes: WorkItems
    sender: Ints
    extra: Ints


class Transfers(NamedTuple):
    """Amounts of work, in units of cost, that senders hand to receivers, sorted by sender."""

    sender: Ints
    cost: Ints
    receiver: Ints


class CutShape(NamedTuple):
    """A way to cut each item: number of head groups that leave, number of key ranges, first row that leaves, estimated bytes."""

    groups: Ints
    key_ranges: Ints
    first_row: Ints
    moved_bytes: np.ndarray


def cut_into_lanes(
    items: WorkItems,
    home: Ints,
    fraction: np.ndarray,
    receivers: Ints,
    cost_model: CostModel,
    group_size: int,
    weights: tuple[int, int],
) -> LaneCut:
    """Cut lanes from items. home: each item's rank, sorted; it hands `fraction` of the item to about `receivers` other ranks.

    group_size: the number of query heads that stay together. weights: bytes per row and per key, over all heads.
    """
    groups = num_head_groups(items, group_size)
    shape = choose_cut(items, groups, fraction, receivers, cost_model, weights)
    heads = (items.h1 - items.h0) // groups
    other_heads = items._replace(h0=items.h0 + shape.groups * heads)
    earlier_rows = items._replace(bands=clip(items.bands, 0, shape.first_row, 0, items.bands[:, K1]), h1=other_heads.h0)
    lanes, item = _lanes(items, heads, shape, cost_model)
    stays = [part.as_tasks(home) for part in (other_heads, earlier_rows)]
    stays = [select_rows(part, part["h0"] < part["h1"]) for part in stays]
    # the cost that the leaving rows would have in one piece
    leaving = tighten(clip(items.bands, shape.first_row, items.bands[:, Q1], 0, items.bands[:, K1]))
    uncut = cost_model.band_costs(leaving) * shape.groups * heads
    ranks = int(home.max()) + 1
    lane_cost = np.bincount(home[item], cost_model.band_costs(lanes.bands) * (lanes.h1 - lanes.h0), ranks)
    extra = np.maximum(lane_cost - np.bincount(home, uncut, ranks), 0).astype(np.int64)
    return LaneCut(concat_rows(TASK_COLUMNS, stays), lanes, home[item], extra)


def assign_lanes(cut: LaneCut, transfers: Transfers, cost_model: CostModel) -> Columns:
    """Return all tasks: those that stay, each transfer on its receiver, and the rest of the lanes on their senders."""
    lane, place = _transfer_ends(cut, transfers, cost_model)
    ends = _cut_points(cut.lanes.at(lane), place, cost_model)
    lane_rows, near, far, transfer = _between_cuts(cut.lanes, lane, ends)
    # work after a sender's last transfer stays with the sender
    number = np.minimum(transfer, len(lane))
    is_sent = np.append(transfers.sender, -1)[number] == cut.sender[lane_rows]
    rank = np.where(is_sent, np.append(transfers.receiver, -1)[number], cut.sender[lane_rows])
    pieces, index = _pieces_between(cut.lanes.at(lane_rows), near, far)
    return concat_rows(TASK_COLUMNS, [cut.stays, pieces.as_tasks(rank[index])])


def num_head_groups(items: WorkItems, group_size: int) -> Ints:
    """Return the number of groups of `group_size` heads that each item can be cut into."""
    whole_groups = (items.h0 % group_size == 0) & (items.h1 % group_size == 0)
    return np.where(whole_groups, (items.h1 - items.h0) // group_size, 1)


def choose_cut(
    items: WorkItems,
    groups: Ints,
    fraction: np.ndarray,
    receivers: Ints,
    cost_model: CostModel,
    weights: tuple[int, int],
) -> CutShape:
    """Choose each item's cut so that the estimated bytes are fewest. Rows from `first_row` on are `fraction` of the item."""
    i, groups_taken = expand_ranges(np.maximum(np.ceil(fraction * groups).astype(np.int64), 1), groups + 1)
    some = items.at(i)
    wanted_cost = cost_model.band_costs(some.bands) * np.minimum(fraction[i] * groups[i] / groups_taken, 1.0)
    first, _ = cost_model.last_rows_of_cost(some.bands, np.ceil(wanted_cost).astype(np.int64))
    leaving = tighten(clip(some.bands, first, some.bands[:, Q1], 0, some.bands[:, K1]))
    rows, keys = leaving[:, Q1] - leaving[:, Q0], leaving[:, K1] - leaving[:, K0]
    key_ranges = np.arange(1, _MAX_KEY_RANGES + 1)[:, None]
    # two transfers meet within a lane up to receivers - 1 times, and then both receivers need the lane's keys
    copies = 1 + (receivers[i] - 1) / (groups_taken * key_ranges)
    moved = (groups_taken / groups[i]) * (weights[0] * rows * key_ranges + weights[1] * keys * copies)
    # for each item, the cut that moves the fewest bytes, with the fewest key ranges among equals
    item = np.tile(i, len(key_ranges))
    order = np.lexsort((np.repeat(key_ranges.ravel(), len(i)), moved.ravel(), item))
    best = order[np.searchsorted(item[order], np.arange(len(items.piece)))]
    choice, row = np.divmod(best, len(i))
    return CutShape(groups_taken[row], choice + 1, first[row], moved.ravel()[best])


def _lanes(items: WorkItems, heads: Ints, shape: CutShape, cost_model: CostModel) -> tuple[WorkItems, Ints]:
    """Return (lanes, item of each lane): the rows that leave, by head group, cut into key ranges of equal work."""
    ranges = shape.key_ranges
    leaving = tighten(clip(items.bands, shape.first_row, items.bands[:, Q1], 0, items.bands[:, K1]))
    i, _ = expand_ranges(np.zeros_like(ranges), ranges)
    bands = tighten(clip(leaving[i], 0, leaving[i, Q1], *_key_ranges(leaving, ranges, cost_model)))
    # the key ranges of a head group are consecutive
    key_range_number, group = expand_ranges(np.zeros_like(shape.groups), shape.groups)
    offset = np.cumsum(ranges) - ranges
    row, lane_range = expand_ranges(offset[key_range_number], offset[key_range_number] + ranges[key_range_number])
    item, number = key_range_number[row], group[row]
    low = items.h0[item] + number * heads[item]
    return WorkItems(items.piece[item], bands[lane_range], low, low + heads[item]), item


def _key_ranges(bands: Ints, parts: Ints, cost_model: CostModel) -> tuple[Ints, Ints]:
    """Cut the keys of each band into `parts` ranges of equal area. Return (first keys, end keys), one row per range."""
    i, part = expand_ranges(np.zeros_like(parts), parts)
    begin = cost_model.last_keys_of_area(bands[i], areas(bands)[i] * (parts[i] - part) // parts[i])
    begin = np.where(part == 0, bands[i, K0], begin)
    return begin, np.where(part == parts[i] - 1, bands[i, K1], np.append(begin[1:], 0))


def _transfer_ends(cut: LaneCut, transfers: Transfers, cost_model: CostModel) -> tuple[Ints, Ints]:
    """Return the lane in which each transfer ends, and the cost per head from the last row of that lane to the end of the
    transfer."""
    heads = cut.lanes.h1 - cut.lanes.h0
    cost = cost_model.band_costs(cut.lanes.bands) * heads
    end = np.cumsum(cost)
    # the start and end of each sender's lanes when all lanes are laid end to end
    begin = np.append(0, end)[np.searchsorted(cut.sender, transfers.sender)]
    limit = end[np.searchsorted(cut.sender, transfers.sender, "right") - 1]
    so_far = np.cumsum(transfers.cost)
    of_earlier_senders = np.append(0, so_far)[np.searchsorted(transfers.sender, transfers.sender)]
    place = np.minimum(begin + so_far - of_earlier_senders, limit)
    lane = np.searchsorted(end, place, "left")
    return lane, (place - (end[lane] - cost[lane])) // heads[lane]


def _cut_points(lanes: WorkItems, wanted: Ints, cost_model: CostModel) -> Ints:
    """Return where the last rows that cost `wanted` start, (M, 3): start and end row of the cut block, and the first key
    used."""
    bands = lanes.bands
    row, end = cost_model.last_rows_of_cost(bands, wanted)
    taken = cost_model.band_costs(clip(bands, end, bands[:, Q1], 0, bands[:, K1]))
    block = tighten(clip(bands, row, end, 0, bands[:, K1]))
    return np.stack([row, end, cost_model.last_keys_of_area(block, (wanted - taken) * cost_model.block)], 1)


def _between_cuts(lanes: WorkItems, lane: Ints, ends: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Cut lanes at the ends of transfers (`ends`, each in a `lane`). Return (lane, near cut, far cut, transfer) of the parts.

    A lane with n ends has n + 1 parts. A part belongs to the transfer that ends at its far cut, or otherwise to the first
    transfer that ends in a later lane.
    """
    count = len(lanes.piece)
    all_lanes = np.arange(count)
    q0, q1, k0, k1 = (lanes.bands[:, column] for column in (Q0, Q1, K0, K1))
    lane_begins, lane_ends = np.stack([q1, q1, k1], 1), np.stack([q0, q0, k0], 1)
    lane_of = np.concatenate([all_lanes, lane, all_lanes])
    rows = np.concatenate([lane_begins, ends, lane_ends])
    # for each lane: its start, the transfers that end in it, its end
    kind = np.repeat([0, 1, 2], [count, len(lane), count])
    position = np.concatenate([np.zeros(count, np.int64), np.arange(len(lane)), np.zeros(count, np.int64)])
    order = np.lexsort((position, kind, lane_of))
    lane_of, rows, kind = lane_of[order], rows[order], kind[order]
    ended_before = np.cumsum(kind == 1)
    transfer = np.where(kind[1:] == 1, ended_before[1:] - 1, ended_before[1:])
    same = lane_of[1:] == lane_of[:-1]
    return lane_of[1:][same], rows[:-1][same], rows[1:][same], transfer[same]


def _pieces_between(lanes: WorkItems, near: Ints, far: Ints) -> tuple[WorkItems, Ints]:
    """Return (pieces, row) for each lane between two cuts: the rest of the near block, complete rows, and the start of the
    far block."""
    k0, k1 = lanes.bands[:, K0], lanes.bands[:, K1]
    same_block = near[:, 0] == far[:, 0]
    cuts = [
        (near[:, 0], near[:, 1], np.where(same_block, far[:, 2], k0), near[:, 2]),
        (far[:, 1], near[:, 0], k0, k1),
        (far[:, 0], np.where(same_block, far[:, 0], far[:, 1]), far[:, 2], k1),
    ]
    parts = [lanes._replace(bands=clip(lanes.bands, *cut)) for cut in cuts]
    whole = WorkItems(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return whole, np.tile(np.arange(len(near)), len(cuts))
