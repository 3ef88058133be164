"""Where tokens and heads lie: buffers, and views of them as contiguous working tensors.

Rows of a buffer are tokens; *links* say which rows and heads of a buffer are which rows and heads of a working tensor. All
views of a table are looked up together, so that no work is done per step but making the objects.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.ir.intervals import Ints, expand_ranges, overlapping_pairs, run_starts, stable_argsort
from distattn.ir.plan import Payload

RowIndex = slice | Tensor


class BufferKey(NamedTuple):
    """The rank's own tensor of a payload (step OWN), or a batch that arrives or leaves at `step` with heads [h0, h1)."""

    payload: Payload
    step: int
    h0: int
    h1: int


OWN = -1


class BufferSlice(NamedTuple):
    """Rows and heads of a buffer that are these rows and heads of a working tensor."""

    buffer: BufferKey
    rows: RowIndex
    heads: slice
    view_rows: RowIndex
    view_heads: slice
    # nothing has been deposited there before: write instead of adding
    fresh: bool = False


class View(NamedTuple):
    """A working tensor of `rows` tokens and `heads` heads, spread over buffers."""

    rows: int
    heads: int
    slices: list[BufferSlice]
    # the links reach every cell (then a single one reaches them in order); where head groups differ they may not
    whole: bool


class BufferExtent(NamedTuple):
    """Where the (token, head) cells of one buffer lie: rows `row`.. hold tokens [t0, t1)."""

    key: BufferKey
    t0: Ints
    t1: Ints
    row: Ints


class ViewParts(NamedTuple):
    """Parts of views, one row each: heads [h0, h1) of a payload, which are heads `at_head`.. of working tensor `view`.

    Part part_i wants tokens [t0_i, t1_i) from row at_i on.
    """

    view: Ints
    payload: Ints
    h0: Ints
    h1: Ints
    at_head: Ints
    part: Ints
    t0: Ints
    t1: Ints
    at: Ints

    @staticmethod
    def joined(several: Iterable[ViewParts]) -> ViewParts:
        """The views of all, numbered on."""
        several = list(several)
        columns: list[list[Ints]] = [[] for _ in ViewParts._fields]
        views = parts = 0
        for some in several:
            shifted = some._replace(view=some.view + views, part=some.part + parts)
            for column, values in zip(columns, shifted, strict=True):
                column.append(values)
            views, parts = views + some.views, parts + len(some.view)
        return ViewParts(*(np.concatenate(column) for column in columns))

    @property
    def views(self) -> int:
        return int(self.view.max()) + 1 if len(self.view) else 0


def resolve_views(places: Iterable[BufferExtent], parts: ViewParts) -> list[View]:
    """The views: working tensors as large as their parts reach."""
    shapes = np.zeros((2, parts.views), np.int64)
    np.maximum.at(shapes[0], parts.view[parts.part], parts.at + parts.t1 - parts.t0)
    np.maximum.at(shapes[1], parts.view, parts.at_head + parts.h1 - parts.h0)
    slices: list[list[BufferSlice]] = [[] for _ in range(parts.views)]
    linked = np.zeros(parts.views, np.int64)
    for atlas in _extent_indices(places):
        low, high = np.maximum(parts.h0, atlas.h0), np.minimum(parts.h1, atlas.h1)
        asked = np.flatnonzero(((parts.payload == atlas.payload) & (low < high))[parts.part])
        i, j = overlapping_pairs(atlas.t0, atlas.t1, parts.t0[asked], parts.t1[asked])
        if not len(i):
            continue
        i = asked[i]
        part, buffer = parts.part[i], atlas.buffer[j]
        index = stable_argsort(part * len(atlas.keys) + buffer)
        i, j, part, buffer = i[index], j[index], part[index], buffer[index]
        begin, end = np.maximum(parts.t0[i], atlas.t0[j]), np.minimum(parts.t1[i], atlas.t1[j])
        np.add.at(linked, parts.view[part], (end - begin) * (high - low)[part])
        first = run_starts(part, buffer)
        rows = _row_indices(atlas.row[j] + begin - atlas.t0[j], end - begin, first)
        at_rows = _row_indices(parts.at[i] + begin - parts.t0[i], end - begin, first)
        there, here = low - atlas.h0, parts.at_head + low - parts.h0
        columns = (parts.view, there, here, high - low)
        numbers = (buffer[first].tolist(), *(column[part[first]].tolist() for column in columns))
        for row, at_row, key, view, h0, at_h0, heads in zip(rows, at_rows, *numbers, strict=True):
            slices[view].append(
                BufferSlice(atlas.keys[key], row, slice(h0, h0 + heads), at_row, slice(at_h0, at_h0 + heads))
            )
    whole = (linked == shapes[0] * shapes[1]).tolist()
    return [View(*view) for view in zip(*shapes.tolist(), slices, whole, strict=True)]


class _ExtentIndex(NamedTuple):
    """All places of one payload and head range, sorted by token: a (token, head) lies in at most one of them."""

    payload: Payload
    h0: int
    h1: int
    keys: list[BufferKey]
    # index into keys, per stretch
    buffer: Ints
    t0: Ints
    t1: Ints
    row: Ints


def _extent_indices(places: Iterable[BufferExtent]) -> list[_ExtentIndex]:
    grouped: dict[tuple[Payload, int, int], list[BufferExtent]] = {}
    for place in places:
        grouped.setdefault((place.key.payload, place.key.h0, place.key.h1), []).append(place)
    atlases = []
    for (payload, h0, h1), same in grouped.items():
        buffer = np.repeat(np.arange(len(same)), [len(place.t0) for place in same])
        t0, t1, row = (np.concatenate([getattr(place, name) for place in same]) for name in ("t0", "t1", "row"))
        index = stable_argsort(t0)
        keys = [place.key for place in same]
        atlases.append(_ExtentIndex(payload, h0, h1, keys, buffer[index], t0[index], t1[index], row[index]))
    return atlases


def _row_indices(start: Ints, length: Ints, first: Ints) -> list[RowIndex]:
    """Consecutive stretches of rows, a run of them at each `first`: a slice where they are one stretch, else an index."""
    broken = np.zeros(len(start), bool)
    broken[1:] = start[1:] != start[:-1] + length[:-1]
    broken[first] = False
    scattered = np.logical_or.reduceat(broken, first)
    last = np.append(first[1:], len(start)) - 1
    cells = np.append(0, np.cumsum(length))
    # the rows of scattered runs only
    kept = np.repeat(scattered, np.diff(np.append(first, len(start))))
    _, index = expand_ranges(start[kept], (start + length)[kept])
    rows, at = torch.from_numpy(index), 0
    out: list[RowIndex] = []
    sizes = (cells[last + 1] - cells[first]).tolist()
    ends = (start[last] + length[last]).tolist()
    for begin, end, size, several in zip(start[first].tolist(), ends, sizes, scattered.tolist(), strict=True):
        out.append(rows[at : at + size] if several else slice(begin, end))
        at += size if several else 0
    return out
