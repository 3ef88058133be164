"""Views: contiguous working tensors gathered from buffers or accumulated into them.

The rows of a buffer are tokens. *Slices* map rows and heads of a buffer to rows and heads of a view. When a plan is lowered, all
views of a table are resolved together (`resolve_views`), so that a step needs no search.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.ir.intervals import Ints, expand_ranges, overlapping_pairs, run_starts, stable_argsort
from distattn.ir.plan import Call, Payload

RowIndex = slice | Tensor


class BufferKey(NamedTuple):
    """The key of a buffer: the rank's own tensor of a payload (step OWN), or heads [h0, h1) of tokens that move in `step`.

    part: which group of peers the buffer is for, if one step's results are split by peer into two buffers (see `result_parts`).
    """

    payload: Payload
    step: int
    h0: int
    h1: int
    part: int = 0


OWN = -1


class BufferSlice(NamedTuple):
    """A mapping from rows and heads of a buffer to rows and heads of a view."""

    buffer: BufferKey
    rows: RowIndex
    heads: slice
    view_rows: RowIndex
    view_heads: slice
    # True if nothing has been accumulated here yet: write instead of adding
    is_first: bool = False


class View(NamedTuple):
    """A working tensor of `rows` tokens and `heads` heads, spread over buffers."""

    rows: int
    heads: int
    slices: list[BufferSlice]
    # True if the slices cover every cell (and a single slice is in order), which they may not if heads need different tokens
    is_complete: bool

    @property
    def is_part(self) -> bool:
        """True if the view is a single part of one buffer, so that it needs no tensor of its own."""
        return self.is_complete and len(self.slices) == 1 and isinstance(self.slices[0].rows, slice)


class BufferExtent(NamedTuple):
    """The tokens of a buffer, one entry per interval: tokens [t0, t1) are in the rows starting at `row`."""

    key: BufferKey
    t0: Ints
    t1: Ints
    row: Ints


class ViewParts(NamedTuple):
    """Views as a list of parts. Each part is heads [h0, h1) of a payload, starting at head `head` of the view with index
    `view`.

    From `part` on, columns have one entry per interval of tokens: the part with index `part` has tokens [t0, t1), starting at
    row `row` of the view.
    """

    view: Ints
    payload: Ints
    h0: Ints
    h1: Ints
    head: Ints
    part: Ints
    t0: Ints
    t1: Ints
    row: Ints

    @staticmethod
    def joined(sets: Iterable[ViewParts]) -> ViewParts:
        """Join several sets of views and number them consecutively."""
        sets = list(sets)
        columns: list[list[Ints]] = [[] for _ in ViewParts._fields]
        views = parts = 0
        for added in sets:
            shifted = added._replace(view=added.view + views, part=added.part + parts)
            for column, values in zip(columns, shifted, strict=True):
                column.append(values)
            views, parts = views + added.views, parts + len(added.view)
        return ViewParts(*(np.concatenate(column) for column in columns))

    @property
    def views(self) -> int:
        """The number of views."""
        return int(self.view.max()) + 1 if len(self.view) else 0


def resolve_views(extents: Iterable[BufferExtent], parts: ViewParts) -> list[View]:
    """Find the tokens and heads of all views in the buffers. A view is just large enough for all of its parts."""
    shapes = np.zeros((2, parts.views), np.int64)
    np.maximum.at(shapes[0], parts.view[parts.part], parts.row + parts.t1 - parts.t0)
    np.maximum.at(shapes[1], parts.view, parts.head + parts.h1 - parts.h0)
    slices: list[list[BufferSlice]] = [[] for _ in range(parts.views)]
    found_cells = np.zeros(parts.views, np.int64)
    for index in _extent_indices(extents):
        low, high = np.maximum(parts.h0, index.h0), np.minimum(parts.h1, index.h1)
        matching = np.flatnonzero(((parts.payload == index.payload) & (low < high))[parts.part])
        i, j = overlapping_pairs(index.t0, index.t1, parts.t0[matching], parts.t1[matching])
        if not len(i):
            continue
        i = matching[i]
        part, buffer = parts.part[i], index.buffer[j]
        order = stable_argsort(part * len(index.keys) + buffer)
        i, j, part, buffer = i[order], j[order], part[order], buffer[order]
        begin, end = np.maximum(parts.t0[i], index.t0[j]), np.minimum(parts.t1[i], index.t1[j])
        np.add.at(found_cells, parts.view[part], (end - begin) * (high - low)[part])
        first = run_starts(part, buffer)
        rows = _row_indices(index.row[j] + begin - index.t0[j], end - begin, first)
        view_rows = _row_indices(parts.row[i] + begin - parts.t0[i], end - begin, first)
        in_buffer, in_view = low - index.h0, parts.head + low - parts.h0
        columns = (parts.view, in_buffer, in_view, high - low)
        numbers = (buffer[first].tolist(), *(column[part[first]].tolist() for column in columns))
        for row, view_row, key, view, h0, view_h0, heads in zip(rows, view_rows, *numbers, strict=True):
            both_heads = slice(h0, h0 + heads), slice(view_h0, view_h0 + heads)
            slices[view].append(BufferSlice(index.keys[key], row, both_heads[0], view_row, both_heads[1]))
    is_complete = (found_cells == shapes[0] * shapes[1]).tolist()
    return [View(*view) for view in zip(*shapes.tolist(), map(_joined_heads, slices), is_complete, strict=True)]


def _joined_heads(slices: list[BufferSlice]) -> list[BufferSlice]:
    """Join slices of adjacent heads with the same rows, since views are cut wherever the heads of any task begin or end."""
    if len(slices) < 2:
        return slices
    # keyed by where a slice must start to be joined: its buffer, its first head there, and its first head in the view
    out: dict[tuple[BufferKey, int, int], list[BufferSlice]] = {}
    for piece in sorted(slices, key=lambda piece: piece.view_heads.start):
        before = out.get((piece.buffer, piece.heads.start, piece.view_heads.start), [])
        for last in before:
            if same_rows(last.rows, piece.rows) and same_rows(last.view_rows, piece.view_rows):
                before.remove(last)
                piece = piece._replace(
                    heads=slice(last.heads.start, piece.heads.stop),
                    view_heads=slice(last.view_heads.start, piece.view_heads.stop),
                )
                break
        out.setdefault((piece.buffer, piece.heads.stop, piece.view_heads.stop), []).append(piece)
    return [piece for pieces in out.values() for piece in pieces]


def same_rows(these: RowIndex, those: RowIndex) -> bool:
    """Return whether two indices select the same rows. Consecutive rows must be given as a slice."""
    if isinstance(these, slice) or isinstance(those, slice):
        return isinstance(these, slice) and isinstance(those, slice) and these == those
    return torch.equal(these, those)


def travels_from_its_buffer(call: Call, payload: Payload, view: View, segments: tuple[slice, ...]) -> bool:
    """Return whether a message needs no copy before it is sent: it consists of entire rows of buffers, in the dtype sent."""
    whole_rows = all(
        isinstance(piece.rows, slice)
        and piece.heads == slice(0, piece.buffer.h1 - piece.buffer.h0)
        and piece.view_heads == slice(0, view.heads)
        for piece in view.slices
    )
    in_order = len(view.slices) == 1 or [piece.view_rows for piece in view.slices] == list(segments)
    return view.is_complete and whole_rows and in_order and call.comm_fields(payload) == call.payload_fields(payload)


class _ExtentIndex(NamedTuple):
    """All extents of one payload and head range, sorted by token. A (token, head) is in at most one of them."""

    payload: Payload
    h0: int
    h1: int
    keys: list[BufferKey]
    # for each interval: index of its buffer in `keys`, tokens [t0, t1), first row in the buffer
    buffer: Ints
    t0: Ints
    t1: Ints
    row: Ints


def _extent_indices(extents: Iterable[BufferExtent]) -> list[_ExtentIndex]:
    grouped: dict[tuple[Payload, int, int], list[BufferExtent]] = {}
    for extent in extents:
        grouped.setdefault((extent.key.payload, extent.key.h0, extent.key.h1), []).append(extent)
    indices = []
    for (payload, h0, h1), same in grouped.items():
        buffer = np.repeat(np.arange(len(same)), [len(extent.t0) for extent in same])
        t0, t1, row = (np.concatenate([getattr(extent, name) for extent in same]) for name in ("t0", "t1", "row"))
        order = stable_argsort(t0)
        keys = [extent.key for extent in same]
        indices.append(_ExtentIndex(payload, h0, h1, keys, buffer[order], t0[order], t1[order], row[order]))
    return indices


def _row_indices(start: Ints, length: Ints, first: Ints) -> list[RowIndex]:
    """Join the ranges [start_i, start_i + length_i) of each group into a slice if they are consecutive, otherwise into an index
    tensor. first: the index of each group's first range."""
    broken = np.zeros(len(start), bool)
    broken[1:] = start[1:] != start[:-1] + length[:-1]
    broken[first] = False
    scattered = np.logical_or.reduceat(broken, first)
    last = np.append(first[1:], len(start)) - 1
    cells = np.append(0, np.cumsum(length))
    # build index tensors only for the groups that need them
    kept = np.repeat(scattered, np.diff(np.append(first, len(start))))
    _, index = expand_ranges(start[kept], (start + length)[kept])
    rows, begin_of_index = torch.from_numpy(index), 0
    out: list[RowIndex] = []
    sizes = (cells[last + 1] - cells[first]).tolist()
    ends = (start[last] + length[last]).tolist()
    for begin, end, size, is_index in zip(start[first].tolist(), ends, sizes, scattered.tolist(), strict=True):
        out.append(rows[begin_of_index : begin_of_index + size] if is_index else slice(begin, end))
        begin_of_index += size if is_index else 0
    return out
