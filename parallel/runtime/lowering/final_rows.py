"""A rank's own results that several launches add to: the last launch that adds to a row returns the row in the inputs' dtype.

Without this, a result is summed in the accumulation dtype and then converted, which reads and writes all of it once more.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distattn.ir.bands import areas
from distattn.ir.plan import Call, Payload, Table, select_rows, task_bands
from distattn.kernels.spec import MOST_TURNS
from distattn.parallel.runtime.lowering.views import OWN, View

if TYPE_CHECKING:
    from distattn.parallel.runtime.program import ProgramStep


# launches finish dQ only up to this mean number of keys per row, because that takes memory for both the sums and the finished
# rows. Beyond it, conversion takes less than 1 % of attention's time: about 108 / keys (2.5 TB/s, 450 TFLOP/s).
_MOST_KEYS = 12288


def turns_of_rows(
    call: Call, table: Table, rank: int, steps: list[ProgramStep], payload: Payload, unadded: Container[Payload]
) -> Tensor | None:
    """Return the first and last launch that write each of the rank's own rows of a result, (tokens,), encoded as in `FinalRows`.

    Return None if launches cannot finish the result, because a message or a copy adds to it, a launch writes only some of its
    heads, or nothing is added to it. Also return None for dQ if rows have many keys.
    """
    if payload in unadded or call.accumulation_dtype == call.dtype or not call.op.is_softmax:
        return None
    tokens = int(call.layout.shard_sizes()[rank])
    if payload == Payload.dQ:
        tasks = select_rows(table.tasks, table.tasks["rank"] == rank)
        cells = areas(task_bands(call.mask, tasks)) * (tasks["h1"] - tasks["h0"])
        if int(cells.sum()) > _MOST_KEYS * tokens * call.heads:
            return None
    first, last = np.full((2, tokens), -1, np.int64)
    results = [(launch.number, launch.results[payload]) for step in steps for launch in step.launches]
    others = [view for step in steps for _, view in step.own_results]
    others += [message.view for step in steps for _, message in step.receives]
    if len(results) > MOST_TURNS or any(_writes_own(view, payload) for view in others):
        return None
    for number, view in results:
        if not _writes_own(view, payload):
            continue
        piece = view.slices[0]
        if not view.is_part or piece.heads != slice(0, call.payload_heads(payload)):
            return None
        assert isinstance(piece.rows, slice), "a part of a buffer has contiguous rows"
        written = slice(piece.rows.start, piece.rows.stop)
        first[written] = np.where(first[written] < 0, number, first[written])
        last[written] = number
    # the turns of rows that no launch writes may be anything, because no launch reads them
    return torch.from_numpy((np.maximum(first, 0) * MOST_TURNS + np.maximum(last, 0)).astype(np.int32))


def _writes_own(view: View, payload: Payload) -> bool:
    return any(piece.buffer.payload == payload and piece.buffer.step == OWN for piece in view.slices)
