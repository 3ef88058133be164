"""Buffers of one pass, and views: contiguous working tensors that are gathered from buffers or accumulated into them.

Rows of a buffer are tokens. *Slices* say which rows and heads of a buffer are which rows and heads of a view. When a plan is
lowered, all views of a table are resolved together (`resolve_views`), so that no search is left for a step; when it runs,
`Buffers` holds the tensors.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.ir.intervals import Ints, expand_ranges, overlapping_pairs, run_starts, stable_argsort
from distattn.ir.plan import REDUCED_PAYLOADS, Call, Payload
from distattn.kernels.glue import Rows, add_rows, copy_rows, merge_rows

RowIndex = slice | Tensor
# the tensors of a payload, (rows, heads, width) or (rows, heads) each; see `Call.payload_fields`
Fields = tuple[Tensor, ...]


class BufferKey(NamedTuple):
    """The rank's own tensor of a payload (step OWN), or what arrives or leaves at `step` with heads [h0, h1)."""

    payload: Payload
    step: int
    h0: int
    h1: int


OWN = -1


class BufferSlice(NamedTuple):
    """Rows and heads of a buffer that are these rows and heads of a view."""

    buffer: BufferKey
    rows: RowIndex
    heads: slice
    view_rows: RowIndex
    view_heads: slice
    # nothing has been accumulated there before: write instead of adding
    is_first: bool = False


class View(NamedTuple):
    """A working tensor of `rows` tokens and `heads` heads, spread over buffers."""

    rows: int
    heads: int
    slices: list[BufferSlice]
    # the slices reach every cell (a single one reaches them in order); where head groups differ they may not
    is_complete: bool


class BufferExtent(NamedTuple):
    """Which tokens a buffer holds: rows `row`.. are tokens [t0, t1); one entry for each interval of tokens."""

    key: BufferKey
    t0: Ints
    t1: Ints
    row: Ints


class ViewParts(NamedTuple):
    """Views in parts. Each part is heads [h0, h1) of a payload, which are heads `head`.. of view number `view`.

    Below, one entry for each interval of tokens: part number `part` wants tokens [t0, t1) from row `row` of the view on.
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
    def joined(several: Iterable[ViewParts]) -> ViewParts:
        """The views of all, numbered one after another."""
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
        """Number of views."""
        return int(self.view.max()) + 1 if len(self.view) else 0


def resolve_views(extents: Iterable[BufferExtent], parts: ViewParts) -> list[View]:
    """Find the tokens and heads of all views in the buffers. A view is as large as its parts reach."""
    shapes = np.zeros((2, parts.views), np.int64)
    np.maximum.at(shapes[0], parts.view[parts.part], parts.row + parts.t1 - parts.t0)
    np.maximum.at(shapes[1], parts.view, parts.head + parts.h1 - parts.h0)
    slices: list[list[BufferSlice]] = [[] for _ in range(parts.views)]
    found_cells = np.zeros(parts.views, np.int64)
    for index in _extent_indices(extents):
        low, high = np.maximum(parts.h0, index.h0), np.minimum(parts.h1, index.h1)
        wanted = np.flatnonzero(((parts.payload == index.payload) & (low < high))[parts.part])
        i, j = overlapping_pairs(index.t0, index.t1, parts.t0[wanted], parts.t1[wanted])
        if not len(i):
            continue
        i = wanted[i]
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
    """The same slices, neighbouring heads of the same rows as one: parts of a view are cut wherever heads differ anywhere."""
    if len(slices) < 2:
        return slices
    # by where the heads of the next one would begin
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
    """Whether two indices are of the same rows; what is a run of rows is a slice."""
    if isinstance(these, slice) or isinstance(those, slice):
        return isinstance(these, slice) and isinstance(those, slice) and these == those
    return torch.equal(these, those)


class Buffers:
    """The tensors of one pass on one rank, by buffer key, and a count of the bytes beside the rank's own tensors.

    alive, peak: bytes alive now, and the most that were alive at once; own tensors and bound ones are not counted.
    """

    def __init__(self, call: Call, like: Tensor, blank: Container[BufferKey] = (), unadded: Container[Payload] = ()):
        """like: any tensor on the device of the pass; blank: buffers of partial results that must begin as "nothing yet".

        unadded: payloads of which the rank's own tensor is in the inputs' dtype, since nothing is added to it.
        """
        self.call, self.like, self._blank, self._unadded = call, like, blank, unadded
        self.fields: dict[BufferKey, Fields] = {}
        self.bound: set[BufferKey] = set()
        # bytes of each buffer that count
        self._counted: dict[BufferKey, int] = {}
        self.alive = self.peak = 0

    def new(self, payload: Payload, rows: int, heads: int, as_sent: bool = False, unadded: bool = False) -> Fields:
        """New tensors of a payload, in the dtype of memory, `as_sent` or `unadded`; what is in them has no meaning."""
        out = []
        for width, dtype in self.call.comm_fields(payload) if as_sent else self.call.payload_fields(payload):
            if unadded and width is not None:
                dtype = self.call.dtype
            shape = (rows, heads) if width is None else (rows, heads, width)
            out.append(torch.empty(shape, dtype=getattr(torch, dtype), device=self.like.device))
        return tuple(out)

    def new_own(self, payload: Payload, rows: int) -> Fields:
        """New tensors for the rank's own part of a result, bound as such."""
        heads = self.call.payload_heads(payload)
        return self.bind_own(payload, self._made(BufferKey(payload, OWN, 0, heads), rows))

    def _made(self, key: BufferKey, rows: int) -> Fields:
        fields = self.new(key.payload, rows, key.h1 - key.h0, unadded=key.step == OWN and key.payload in self._unadded)
        if key in self._blank:
            for tensor in fields:
                tensor.zero_()
            if key.payload == Payload.O:
                fields[1].fill_(-torch.inf)
        return fields

    def bind_own(self, payload: Payload, fields: Fields) -> Fields:
        """Use these tensors as the rank's own ones of a payload; returns them."""
        self.fields[BufferKey(payload, OWN, 0, self.call.payload_heads(payload))] = fields
        return fields

    def bind_flat(self, rows: dict[BufferKey, int], flat: Tensor) -> None:
        """Make these buffers views of one flat tensor, which is counted by its owner. rows: of each buffer."""
        at = 0
        for key, count in rows.items():
            fields = []
            for width, _ in self.call.payload_fields(key.payload):
                shape = (count, key.h1 - key.h0, width or 1)
                size = shape[0] * shape[1] * shape[2]
                fields.append(flat[at : at + size].view(shape))
                at += size
            self.fields[key] = tuple(fields)
            self.bound.add(key)

    def allocate(self, key: BufferKey, rows: int, own_rows: int) -> None:
        """Make a buffer of so many rows, unless it is bound.

        own_rows: how many of them are the rank's own; they take the place of a copy, and do not count either.
        """
        if key not in self.bound:
            self.fields[key] = fields = self._made(key, rows)
            self._counted[key] = sum(tensor[own_rows:].nbytes for tensor in fields)
            self._count(self._counted[key])

    def copy_own(self, key: BufferKey, view: View) -> None:
        """Copy own rows into a buffer of copies."""
        for piece in view.slices:
            for whole, tensor in zip(self.fields[key], self.fields[piece.buffer], strict=True):
                copy_rows(
                    whole[:, piece.view_heads], Rows.of(piece.view_rows), tensor[:, piece.heads], Rows.of(piece.rows)
                )

    def release(self, key: BufferKey) -> None:
        """Free a buffer."""
        self._count(-self._counted.pop(key))
        del self.fields[key]

    def uncount(self, fields: Fields) -> None:
        """These tensors are not needed any more."""
        self._count(-sum(tensor.nbytes for tensor in fields))

    def receive_buffer(self, payload: Payload, view: View, stretches: tuple[slice, ...]) -> tuple[Fields, list[Fields]]:
        """(fields of a message, the places where each of its stretches is received).

        Copies land in their buffer itself, which has no fields but the places; partial results in tensors of their own.
        """
        if payload in REDUCED_PAYLOADS:
            fields = self.new(payload, view.rows, view.heads, as_sent=True)
            self._count(sum(tensor.nbytes for tensor in fields))
            return fields, [tuple(tensor[stretch] for tensor in fields) for stretch in stretches]
        return (), self._parts(view, stretches)

    def message_parts(self, payload: Payload, view: View, stretches: tuple[slice, ...]) -> list[Fields]:
        """The tensors of a message by stretch: parts of a buffer where that is possible, else of one copy."""
        rows = [piece.view_rows for piece in view.slices if isinstance(piece.rows, slice)]
        whole_heads = all(piece.view_heads == slice(0, view.heads) for piece in view.slices)
        if len(view.slices) == len(stretches) > 1 and rows == list(stretches) and whole_heads:
            return self._parts(view, stretches)
        whole = self.gather(payload, view)
        if len(stretches) == 1:
            return [whole]
        # a stretch of some heads has to be packed: all of them at once
        packed = tuple(tensor.contiguous() for tensor in whole)
        return [tuple(tensor[stretch] for tensor in packed) for stretch in stretches]

    def _parts(self, view: View, stretches: tuple[slice, ...]) -> list[Fields]:
        """The parts of a buffer that the stretches of a view are."""
        if len(view.slices) == 1:
            (only,) = view.slices
            fields = tuple(tensor[only.rows] for tensor in self.fields[only.buffer])
            return [tuple(tensor[stretch] for tensor in fields) for stretch in stretches]
        return [tuple(tensor[piece.rows, piece.heads] for tensor in self.fields[piece.buffer]) for piece in view.slices]

    def without_copy(self, view: View) -> Fields | None:
        """The part of a buffer that a view is, or None where it is not one part of one buffer."""
        if not view.is_complete or len(view.slices) != 1 or not isinstance(view.slices[0].rows, slice):
            return None
        only = view.slices[0]
        return tuple(tensor[only.rows, only.heads] for tensor in self.fields[only.buffer])

    def gather(self, payload: Payload, view: View) -> Fields:
        """The tensors of a view, (rows, heads, ...): part of a buffer where that is possible, else a copy."""
        part = self.without_copy(view)
        if part is not None:
            return part
        out = self.new(payload, view.rows, view.heads)
        if not view.is_complete:
            # kernels may read whole tiles: what no task uses shall at least be a number
            for tensor in out:
                tensor.zero_()
        for piece in view.slices:
            rows, view_rows = Rows.of(piece.rows), Rows.of(piece.view_rows)
            for whole, tensor in zip(out, self.fields[piece.buffer], strict=True):
                copy_rows(whole[:, piece.view_heads], view_rows, tensor[:, piece.heads], rows)
        return out

    def accumulate(self, payload: Payload, view: View, fields: Fields) -> None:
        """Accumulate the tensors of a view into its buffers: O by log-sum-exp, gradients by sum."""
        for piece in view.slices:
            rows, view_rows = Rows.of(piece.rows), Rows.of(piece.view_rows)
            parts = tuple(tensor[:, piece.view_heads] for tensor in fields)
            totals = tuple(tensor[:, piece.heads] for tensor in self.fields[piece.buffer])
            if payload == Payload.O and not piece.is_first:
                merge_rows(totals[0], totals[1], rows, parts[0], parts[1], view_rows)
                continue
            for total, part in zip(totals, parts, strict=True):
                # what was sent may be narrower
                (copy_rows if piece.is_first else add_rows)(total, rows, part, view_rows)

    def _count(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)


class _ExtentIndex(NamedTuple):
    """All extents of one payload and head range, sorted by token: a (token, head) lies in at most one of them."""

    payload: Payload
    h0: int
    h1: int
    keys: list[BufferKey]
    # for each interval of tokens: number in `keys`, tokens [t0, t1), first row in the buffer
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
    """Rows [start_i, start_i + length_i), joined from each `first` to the next: a slice where they touch, else an index."""
    broken = np.zeros(len(start), bool)
    broken[1:] = start[1:] != start[:-1] + length[:-1]
    broken[first] = False
    scattered = np.logical_or.reduceat(broken, first)
    last = np.append(first[1:], len(start)) - 1
    cells = np.append(0, np.cumsum(length))
    # an index only where it is needed
    kept = np.repeat(scattered, np.diff(np.append(first, len(start))))
    _, index = expand_ranges(start[kept], (start + length)[kept])
    rows, at = torch.from_numpy(index), 0
    out: list[RowIndex] = []
    sizes = (cells[last + 1] - cells[first]).tolist()
    ends = (start[last] + length[last]).tolist()
    for begin, end, size, is_index in zip(start[first].tolist(), ends, sizes, scattered.tolist(), strict=True):
        out.append(rows[at : at + size] if is_index else slice(begin, end))
        at += size if is_index else 0
    return out
