"""Messages of a rank's own rows leave from the arena, as all others do: see `arenas`.

Where a buffer of the arena has own rows between those that arrive (see `landing`), messages are sent from there. Else each step
copies the own rows that it sends, once for all peers, as rows of a bundle where messages are such rows (see `row_bundles`).
Messages that are packed before they travel need neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from distattn.ir.intervals import expand_ranges, merge_intervals
from distattn.ir.plan import Call
from distattn.parallel.runtime.landing import Landing
from distattn.parallel.runtime.row_bundles import Bundle
from distattn.parallel.runtime.views import OWN, BufferKey, BufferSlice, View, travels_from_its_buffer

if TYPE_CHECKING:
    from distattn.parallel.runtime.program import Message, ProgramStep

# the first step in keys of copies; those of later steps are below
_COPIES = -(1 << 32)


def stage(
    call: Call, steps: list[ProgramStep], landings: Mapping[BufferKey, Landing], bundles: dict[BufferKey, Bundle]
) -> dict[BufferKey, View]:
    """Let own rows be sent from the arena; changes the sends of the steps, and adds new buffers to the bundles of the rank.

    landings: of buffers that are in no bundle with others. Returns for each new buffer the own rows that it is a copy of.
    """
    copies: dict[BufferKey, View] = {}
    uses = _steps_of_use(steps)
    for number, step in enumerate(steps):
        alive = [(key, one) for key, one in landings.items() if key in uses and number in uses[key]]
        rows: dict[BufferKey, list[slice]] = defaultdict(list)
        sent_in_place: list[int] = []
        for i, (payload, message) in enumerate(step.sends):
            own = [piece for piece in message.view.slices if piece.buffer.step == OWN]
            all_heads = message.view.heads == call.payload_heads(payload)
            if not own or len(message.bundle) > 1 or (message.bundle and not all_heads):
                continue
            if not travels_from_its_buffer(call, payload, message.view, message.segments):
                continue
            landed = next((found for key, one in alive if (found := _in_landed(message, key, one))), None)
            if landed:
                step.sends[i] = payload, message._replace(view=message.view._replace(slices=landed))
                continue
            sent_in_place.append(i)
            for piece in own:
                assert isinstance(piece.rows, slice)
                rows[piece.buffer].append(piece.rows)
        staged = {source: _CopiedRows(source, number, some) for source, some in rows.items()}
        for i in sent_in_place:
            payload, message = step.sends[i]
            slices = [staged[one.buffer].moved(one) if one.buffer in staged else one for one in message.view.slices]
            step.sends[i] = payload, message._replace(view=message.view._replace(slices=slices))
            if message.bundle:
                bundles.update({one.key: (one.key,) for one in staged.values() if one.key.payload == payload})
        copies |= {one.key: one.view for one in staged.values()}
    return copies


class _CopiedRows:
    """The own rows of one tensor that a step sends, side by side in a buffer. view: of the own tensor."""

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
        """Return the same rows of the own tensor where they lie in the buffer."""
        assert isinstance(piece.rows, slice)
        part = int(np.searchsorted(self.begin, piece.rows.start, "right")) - 1
        start = int(self.first_row[part] + piece.rows.start - self.begin[part])
        return piece._replace(buffer=self.key, rows=slice(start, start + piece.rows.stop - piece.rows.start))


def _in_landed(message: Message, key: BufferKey, landing: Landing) -> list[BufferSlice] | None:
    """Return the slices of a message of own rows in a landed buffer; None where not all its segments lie there whole."""
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


def _rows_in_landed(own: BufferKey, key: BufferKey, landing: Landing) -> np.ndarray | None:
    """Return the row in a landed buffer of each row of an own tensor, -1 for those that it has not; None where heads differ."""
    parts = [piece for piece in landing.own if piece.buffer == own]
    all_heads = slice(0, own.h1 - own.h0)
    if (key.h0, key.h1) != (own.h0, own.h1) or not parts or any(piece.heads != all_heads for piece in parts):
        return None
    return landing.rows_of_own(own)


def _steps_of_use(steps: Iterable[ProgramStep]) -> dict[BufferKey, range]:
    """Return the steps in which each buffer is there: from its first use to its last."""
    uses: dict[BufferKey, range] = {}
    for number, step in enumerate(steps):
        for key in (piece.buffer for view in step.views() for piece in view.slices):
            uses[key] = range(uses[key].start if key in uses else number, number + 1)
    return uses
