"""The tensors of one pass on one rank, keyed by buffer, and the operations on views of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distattn.ir.plan import Payload
from distattn.kernels.glue import RowSelection, add_rows, copy_rows, copy_rows_with_products, merge_rows
from distattn.kernels.spec import FinalRows
from distattn.parallel.runtime.lowering.memory import FlatPlaces, PlacedTensor, PlaceKey
from distattn.parallel.runtime.lowering.packed_messages import PackedMessages
from distattn.parallel.runtime.lowering.views import OWN, BufferKey, View

if TYPE_CHECKING:
    from distattn.parallel.runtime.program import Program

# a payload's tensors, each (rows, heads, width) or (rows, heads); see `Call.payload_fields`
Fields = tuple[Tensor, ...]
# the places of a payload's tensors in the arena
Places = Sequence[PlacedTensor]


def convert_sums(sums: list[Tensor], dtypes: Iterable[torch.dtype]) -> tuple[Tensor, ...]:
    """Convert each sum to its dtype, the smallest sum first, and empty `sums`. A sum is freed as soon as it is converted."""
    dtype_of, out = dict(enumerate(dtypes)), {}
    for number in sorted(dtype_of, key=lambda number: sums[number].nbytes):
        out[number] = sums[number].to(dtype_of[number])
        # drop the sum, so that the next conversion can reuse its memory
        sums[number] = out[number]
    sums.clear()
    return tuple(out[number] for number in dtype_of)


class Buffers:
    """The tensors of one pass. All are in one arena except for the rank's own tensors (see `memory`)."""

    def __init__(self, program: Program, arena: Tensor):
        """Start without buffers. arena: a uint8 tensor on the pass's device."""
        self._own, self._blank, self._turns = program.own_tensors, program.blank, program.turns
        # for each of the rank's own results whose rows launches finish: the tensor of finished rows, in the inputs' dtype
        self._final: dict[Payload, Tensor] = {}
        self._merges_by_lse = program.call.op.merge == "lse"
        self.fields: dict[BufferKey, Fields] = {}
        # O, in backward passes that compute rowsum(dO * O) while copying dO
        self._outputs: Tensor | None = None
        # the matrices of bundles, each (rows, elements)
        self._rows: dict[PlaceKey, Tensor] = {}
        # the arena, viewed as each dtype
        self._arena = {torch.uint8: arena}

    def new_own(self, payload: Payload) -> Fields:
        """Allocate and bind the rank's own tensors for a result."""
        (key, tensors), device, fields = self._own[payload], self._arena[torch.uint8].device, []
        for dtype, shape in tensors:
            fields.append(torch.empty(shape, dtype=dtype, device=device))
        self.fields[key] = out = tuple(fields)
        return self._begun(key, out) if key in self._blank else out

    def new_final(self, payload: Payload, dtype: torch.dtype) -> Tensor:
        """Allocate the tensor for the finished rows of the rank's own result, a payload in `Program.turns`."""
        key, ((_, shape), *_) = self._own[payload]
        out = self._final[payload] = torch.empty(shape, dtype=dtype, device=self._arena[torch.uint8].device)
        # rows that no launch writes are 0
        return out.zero_() if key in self._blank else out

    def final_rows(self, payload: Payload, view: View, number: int) -> FinalRows | None:
        """Return where launch `number` writes the rows of a result that it finishes, or None if launches do not finish them."""
        target = self._final.get(payload)
        (only,) = view.slices
        if target is None or only.buffer.step != OWN:
            return None
        assert isinstance(only.rows, slice), "a part of a buffer has contiguous rows"
        return FinalRows(target[only.rows], self._turns[payload][only.rows], number)

    def bind_own(self, tensors: Mapping[Payload, Fields]) -> None:
        """Use `tensors`, keyed by payload, as the rank's own tensors."""
        for payload, fields in tensors.items():
            self.fields[self._own[payload].key] = fields

    def bind_outputs(self, do_THE: Tensor, lse_TH: Tensor, o_THE: Tensor) -> None:
        """Bind dO without delta: rowsum(dO * O) is computed from O while rows of dO are copied into messages and buffers."""
        self.bind_own({Payload.dO: (do_THE, lse_TH)})
        self._outputs = o_THE

    def bind_flat(
        self, kept: FlatPlaces, flat: Tensor, renamed: Callable[[BufferKey], BufferKey] | None = None
    ) -> None:
        """Make the kept buffers views of one flat tensor. renamed: maps a buffer's forward key to its key in this pass."""
        for key, places in kept.places.items():
            # saved-tensor hooks may return the flat tensor as part of another tensor
            begin = flat.storage_offset()
            fields = tuple(flat.as_strided(place.shape, place.strides, begin + place.offset) for place in places)
            if isinstance(key, BufferKey):
                self.fields[key if renamed is None else renamed(key)] = fields
            elif renamed is None:
                self._rows[key] = fields[0]

    def bind(self, tensors: Mapping[BufferKey, Fields]) -> None:
        """Use `tensors`, keyed by buffer, as the contents of those buffers."""
        self.fields.update(tensors)

    def place(self, places: Places) -> Fields:
        """Return uninitialized tensors at `places` in the arena."""
        out = tuple(self._view(place) for place in places)
        if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
            # fill the memory, as torch.empty does with this setting
            for tensor in out:
                tensor.fill_(torch.nan)
        return out

    def allocate(self, key: BufferKey, places: Places, rows: Places = ()) -> None:
        """Create a buffer. rows: the place of the bundle that starts with this buffer, or empty if no bundle does."""
        for place in rows:
            self._rows["rows", key] = self._view(place)
        fields = self.place(places)
        self.fields[key] = self._begun(key, fields) if key in self._blank else fields

    def release(self, key: BufferKey) -> None:
        """Forget a buffer. Its place may be reused from now on."""
        del self.fields[key]
        self._rows.pop(("rows", key), None)

    def copy_own(self, key: BufferKey, view: View) -> None:
        """Copy the rank's own rows into a buffer."""
        for piece in view.slices:
            rows, view_rows = RowSelection.of(piece.rows), RowSelection.of(piece.view_rows)
            targets = _of_heads(self.fields[key], piece.view_heads)
            sources = _of_heads(self.fields[piece.buffer], piece.heads)
            outputs = None
            if key.payload == Payload.dO and self._outputs is not None:
                (outputs,) = _of_heads((self._outputs,), piece.heads)
            _copy_fields(targets, view_rows, sources, rows, outputs)

    def close(self) -> None:
        """Drop the arena and all buffers."""
        self.fields.clear()
        self._rows.clear()
        self._final.clear()
        self._arena.clear()

    def pack(self, packed: PackedMessages, places: Sequence[Places]) -> None:
        """Copy the rank's own rows into messages. places: the places of each part of a row."""
        for part, of_part in zip(packed.parts, places, strict=True):
            own_fields = self.fields[self._own[part.payload].key]
            sources = tuple(tensor.reshape(-1, part.heads, *tensor.shape[2:]) for tensor in own_fields)
            outputs = None
            if part.payload == Payload.dO and self._outputs is not None:
                outputs = self._outputs.reshape(-1, part.heads, self._outputs.shape[2])
            _copy_fields(
                self.place(of_part), RowSelection(0, packed.rows), sources, RowSelection.of(part.rows), outputs
            )

    def unpack(self, packed: PackedMessages, fields: Sequence[Fields]) -> None:
        """Write received results into the rank's own tensors, which hold no results yet. fields: tensors for each part of a
        row."""
        for part, tensors in zip(packed.parts, fields, strict=True):
            own_fields = self.fields[self._own[part.payload].key]
            for whole, tensor in zip(own_fields, tensors, strict=True):
                target = whole.view(-1, part.heads, *whole.shape[2:])
                copy_rows(target, RowSelection.of(part.rows), tensor, RowSelection(0, packed.rows))

    def place_rows(self, places: Places, segments: tuple[slice, ...], begin: int = 0) -> list[Fields]:
        """Return rows of a bundle or of tensors in the arena, one entry per segment of a message that starts at row `begin`."""
        tensors = [self._view(place) for place in places]
        return [tuple(x[begin + part.start : begin + part.stop] for x in tensors) for part in segments]

    def message_parts(self, view: View, segments: tuple[slice, ...], in_rows: bool = False) -> list[Fields]:
        """Return a message's tensors for each segment: parts of its buffers or, if in_rows, of the bundles that start with
        these buffers."""
        if len(view.slices) == 1:
            (only,) = view.slices
            assert isinstance(only.rows, slice), "messages are sent from and received in contiguous rows"
            begin, tensors = only.rows.start, self._whole(only.buffer, in_rows)
            return [tuple(x[begin + part.start : begin + part.stop] for x in tensors) for part in segments]
        return [tuple(x[piece.rows] for x in self._whole(piece.buffer, in_rows)) for piece in view.slices]

    def part(self, view: View) -> Fields:
        """Return the part of a buffer that makes up a view."""
        (only,) = view.slices
        rows, heads, parts = only.rows, only.heads, []
        assert isinstance(rows, slice), "a part of a buffer has contiguous rows"
        for tensor in self.fields[only.buffer]:
            # skip slices that would select everything: every slice costs host time
            if rows.start or rows.stop != tensor.shape[0]:
                tensor = tensor[rows]
            if heads.start or heads.stop != tensor.shape[1]:
                tensor = tensor[:, heads]
            parts.append(tensor)
        return tuple(parts)

    def accumulate(self, payload: Payload, view: View, fields: Fields) -> None:
        """Accumulate the tensors of a view into its buffers. O is merged by the op's rule; gradients are added."""
        for piece in view.slices:
            rows, view_rows = RowSelection.of(piece.rows), RowSelection.of(piece.view_rows)
            parts, totals = _of_heads(fields, piece.view_heads), _of_heads(self.fields[piece.buffer], piece.heads)
            if payload == Payload.O and self._merges_by_lse and not piece.is_first:
                merge_rows(totals[0], totals[1], rows, parts[0], parts[1], view_rows)
                continue
            for total, part in zip(totals, parts, strict=True):
                # received tensors may have a narrower dtype
                (copy_rows if piece.is_first else add_rows)(total, rows, part, view_rows)

    def _begun(self, key: BufferKey, fields: Fields) -> Fields:
        """Initialize the tensors of a new buffer that first writes do not fill completely: O and gradients to 0, LSE to -inf."""
        for tensor in fields:
            tensor.zero_()
        if key.payload == Payload.O and self._merges_by_lse:
            fields[1].fill_(-torch.inf)
        return fields

    def gathered(self, view: View, places: Places) -> Fields:
        """Gather a view's tensors into the arena at `places`, converted to the dtypes of the places."""
        out = self.place(places)
        if not view.is_complete:
            # zero unused elements, which must be finite because kernels may read entire tiles
            for tensor in out:
                tensor.zero_()
        for piece in view.slices:
            rows, view_rows = RowSelection.of(piece.rows), RowSelection.of(piece.view_rows)
            tensors = _of_heads(self.fields[piece.buffer], piece.heads)
            for whole, tensor in zip(_of_heads(out, piece.view_heads), tensors, strict=True):
                copy_rows(whole, view_rows, tensor, rows)
        return out

    def _whole(self, key: BufferKey, in_rows: bool) -> Fields:
        return (self._rows["rows", key],) if in_rows else self.fields[key]

    def _view(self, place: PlacedTensor) -> Tensor:
        return self._numbers(place.dtype).as_strided(place.shape, place.strides, place.offset)

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._arena:
            self._arena[dtype] = self._arena[torch.uint8].view(dtype)
        return self._arena[dtype]


def _copy_fields(
    targets: Fields, target_rows: RowSelection, sources: Fields, rows: RowSelection, outputs: Tensor | None
) -> None:
    """Copy rows of a payload's tensors. outputs: O, if the last target is to be set to rowsum(dO * O), which has no source."""
    if outputs is not None:
        copy_rows_with_products(targets[0], targets[-1], target_rows, sources[0], outputs, rows)
        targets, sources = targets[1:-1], sources[1:]
    for target, source in zip(targets, sources, strict=True):
        copy_rows(target, target_rows, source, rows)


def _of_heads(fields: Fields, heads: slice) -> Fields:
    """Select `heads` in tensors (rows, heads, ...). If that would select all heads, skip the slicing, which costs host time."""
    if not fields or heads.start == 0 and heads.stop == fields[0].shape[1]:
        return fields
    return tuple(tensor[:, heads] for tensor in fields)
