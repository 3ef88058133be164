"""Copies in the arena of what would be sent from the rank's own tensors, or from what the forward pass has kept.

Only arenas are sent from: see `arenas`. Each source gets one buffer with those of its rows that travel from where they lie,
from the first step that sends any of them to the last one. Messages that are packed before they travel need none.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from distattn.ir.intervals import expand_ranges, merge_intervals
from distattn.ir.plan import HELD_PAYLOADS, Call
from distattn.parallel.runtime.views import OWN, BufferKey, BufferSlice, View, travels_from_its_buffer

if TYPE_CHECKING:
    from distattn.parallel.runtime.program import ProgramStep

# what the step in a staged buffer's key is below that of its source
_BELOW = 1 << 32


def stage(call: Call, steps: list[ProgramStep]) -> dict[BufferKey, View]:
    """Let messages leave from staged buffers; changes the steps' sends. Returns for each such buffer the rows it is a copy of."""
    rows: dict[BufferKey, list[slice]] = defaultdict(list)
    for piece in (piece for step in steps for view in _sent_in_place(call, step) for piece in view.slices):
        if _is_foreign(piece.buffer):
            assert isinstance(piece.rows, slice)
            rows[piece.buffer].append(piece.rows)
    staged = {source: _Staged(source, some) for source, some in rows.items()}
    for step in steps:
        for number, (payload, message) in enumerate(step.sends):
            if travels_from_its_buffer(call, payload, message.view, message.stretches):
                slices = [staged[one.buffer].moved(one) if one.buffer in staged else one for one in message.view.slices]
                step.sends[number] = payload, message._replace(view=message.view._replace(slices=slices))
    return {one.key: one.view for one in staged.values()}


class _Staged:
    """The rows of one source that are sent, side by side in a buffer. view: of the source."""

    def __init__(self, source: BufferKey, sent: list[slice]):
        begin, end = (np.array([getattr(rows, side) for rows in sent], np.int64) for side in ("start", "stop"))
        _, self.begin, self.end = merge_intervals(np.zeros_like(begin), begin, end)
        length = self.end - self.begin
        self.at = np.cumsum(length) - length
        self.key = source._replace(step=source.step - _BELOW)
        rows: slice | torch.Tensor = slice(int(self.begin[0]), int(self.end[-1]))
        if len(self.begin) > 1:
            rows = torch.from_numpy(expand_ranges(self.begin, self.end)[1])
        total, heads = int(length.sum()), slice(0, source.h1 - source.h0)
        piece = BufferSlice(source, rows, heads, slice(0, total), heads)
        self.view = View(total, heads.stop, [piece], True)

    def moved(self, piece: BufferSlice) -> BufferSlice:
        """The same rows of the source where they lie in the buffer."""
        assert isinstance(piece.rows, slice)
        part = int(np.searchsorted(self.begin, piece.rows.start, "right")) - 1
        start = int(self.at[part] + piece.rows.start - self.begin[part])
        return piece._replace(buffer=self.key, rows=slice(start, start + piece.rows.stop - piece.rows.start))


def _sent_in_place(call: Call, step: ProgramStep) -> list[View]:
    return [
        message.view
        for payload, message in step.sends
        if payload in HELD_PAYLOADS and travels_from_its_buffer(call, payload, message.view, message.stretches)
    ]


def _is_foreign(key: BufferKey) -> bool:
    """Whether a buffer lies outside the arena: the rank's own tensors, and those that were kept."""
    return key.step <= OWN
