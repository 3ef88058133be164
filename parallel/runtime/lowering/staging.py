"""Staging: messages of a rank's own rows are sent from the arena, like all other messages (see `arenas`).

If a buffer in the arena has the rank's own rows between those that arrive (see `landing`), messages are sent from that buffer.
Otherwise, each step makes one copy of the own rows that it sends, for all peers, as rows of a bundle if messages are rows of
bundles (see `row_bundles`). Messages that are packed before they travel need neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from distattn.ir.intervals import expand_ranges, merge_intervals
from distattn.ir.plan import Call
from distattn.parallel.runtime.lowering.landing import Landing
from distattn.parallel.runtime.lowering.row_bundles import Bundle
from distattn.parallel.runtime.lowering.views import OWN, BufferKey, BufferSlice, View, travels_from_its_buffer

if TYPE_CHECKING:
    from distattn.parallel.runtime.program import Message, ProgramStep

# the `step` in the key of a copy is this number minus the index of the step that makes the copy
_COPIES = -(1 << 32)


def stage(
    call: Call, steps: list[ProgramStep], landings: Mapping[BufferKey, Landing], bundles: dict[BufferKey, Bundle]
) -> dict[BufferKey, View]:
    """Change the steps' sends so that the rank's own rows are sent from the arena. Add the new buffers to the rank's bundles.

    Return, for each new buffer, a view of the rank's own rows copied into it. landings: only those of buffers that do not share
    their rows with another buffer.
    """
    copies: dict[BufferKey, View] = {}
    uses = _steps_of_use(steps)
    for number, step in enumerate(steps):
        alive = [(key, landing) for key, landing in landings.items() if key in uses and number in uses[key]]
        rows: dict[BufferKey, list[slice]] = defaultdict(list)
        sent_in_place: list[int] = []
        for i, (payload, message) in enumerate(step.sends):
            own_slices = [piece for piece in message.view.slices if piece.buffer.step == OWN]
            all_heads = message.view.heads == call.payload_heads(payload)
            if not own_slices or len(message.bundle) > 1 or (message.bundle and not all_heads):
                continue
            if not travels_from_its_buffer(call, payload, message.view, message.segments):
                continue
            landed = next((slices for key, landing in alive if (slices := _in_landed(message, key, landing))), None)
            if landed:
                step.sends[i] = payload, message._replace(view=message.view._replace(slices=landed))
                continue
            sent_in_place.append(i)
            for piece in own_slices:
                assert isinstance(piece.rows, slice)
                rows[piece.buffer].append(piece.rows)
        staged = {source: _CopiedRows(source, number, sent) for source, sent in rows.items()}
        for i in sent_in_place:
            payload, message = step.sends[i]
            slices = [
                staged[piece.buffer].moved(piece) if piece.buffer in staged else piece for piece in message.view.slices
            ]
            step.sends[i] = payload, message._replace(view=message.view._replace(slices=slices))
            if message.bundle:
                keys = [copied.key for copied in staged.values() if copied.key.payload == payload]
                bundles.update({key: (key,) for key in keys})
        copies |= {copied.key: copied.view for copied in staged.values()}
    return copies


class _CopiedRows:
    """The rows of one of the rank's own tensors that a step sends, copied to a buffer. view: those rows of the tensor."""

    def __init__(self, source: BufferKey, step: int, sent: list[slice]):
        begin, end = (np.array([getattr(rows, side) for rows in sent], np.int64) for side in ("start", "stop"))
        _, self.begin, self.end = merge_intervals(np.zeros_like(begin), begin, end)
        length = self.end - self.begin
        self.first_row = np.cumsum(length) - length
        self.key = source._replace(step=_COPIES - step)
        rows: slice | torch.Tensor = slice(int(self.begin[0]), int(self.end[-1]))
        if len(self.begin) > 1:
            rows = torch.from_numpy(expand_ranges(self.begin, self.end)[1])
        total, heads = int(length.sum()), slice(0, source.h1 - source.h0)
        piece = BufferSlice(source, rows, heads, slice(0, total), heads)
        self.view = View(total, heads.stop, [piece], True)

    def moved(self, piece: BufferSlice) -> BufferSlice:
        """Translate a slice of the rank's own tensor into a slice of the buffer."""
        assert isinstance(piece.rows, slice)
        part = int(np.searchsorted(self.begin, piece.rows.start, "right")) - 1
        start = int(self.first_row[part] + piece.rows.start - self.begin[part])
        return piece._replace(buffer=self.key, rows=slice(start, start + piece.rows.stop - piece.rows.start))


def _in_landed(message: Message, key: BufferKey, landing: Landing) -> list[BufferSlice] | None:
    """Return the slices of a landed buffer that hold a message's rows, or None if any segment is not contiguous there."""
    if len(message.view.slices) != 1:
        return None
    (piece,) = message.view.slices
    where = _rows_in_landed(piece.buffer, key, landing)
    assert isinstance(piece.rows, slice)
    if where is None or piece.rows.stop > len(where):
        return None
    slices = []
    for segment in message.segments:
        rows = where[piece.rows][segment]
        if rows[0] < 0 or (np.diff(rows) != 1).any():
            return None
        there = slice(int(rows[0]), int(rows[-1]) + 1)
        slices.append(piece._replace(buffer=key, rows=there, view_rows=segment))
    return slices


def _rows_in_landed(tensor: BufferKey, key: BufferKey, landing: Landing) -> np.ndarray | None:
    """Map each row of the rank's own `tensor` to its row in a landed buffer, or to -1. Return None if their heads differ."""
    parts = [piece for piece in landing.own_slices if piece.buffer == tensor]
    all_heads = slice(0, tensor.h1 - tensor.h0)
    if (key.h0, key.h1) != (tensor.h0, tensor.h1) or not parts or any(piece.heads != all_heads for piece in parts):
        return None
    return landing.rows_of_own(tensor)


def _steps_of_use(steps: Iterable[ProgramStep]) -> dict[BufferKey, range]:
    """Return the steps from the first to the last use of each buffer."""
    uses: dict[BufferKey, range] = {}
    for number, step in enumerate(steps):
        for key in (piece.buffer for view in step.views() for piece in view.slices):
            uses[key] = range(uses[key].start if key in uses else number, number + 1)
    return uses
