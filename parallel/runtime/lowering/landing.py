"""Landing: buffers that also serve as a launch's tensor. Operands are read where they arrive, results are sent from where they
are written.

If a launch needs one received buffer and the rank's own tokens, that buffer is made as large as the working tensor into which
both would be gathered, with the tokens in the same order. Own rows are copied in first, and messages then land between them.
Results are treated alike: messages leave from the tensor that the kernel writes, and its own rows are added to the rank's
result. A buffer that lives until the backward pass keeps its copy of own rows as long, so it is enlarged only if that adds
little memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from distattn.ir.intervals import Ints, overlapping_pairs
from distattn.ir.plan import KEY_PAYLOADS, REDUCED_PAYLOADS, Call, Columns, Table, select_rows
from distattn.parallel.runtime.lowering.row_bundles import Bundle
from distattn.parallel.runtime.lowering.views import OWN, BufferKey, BufferSlice, RowIndex, View

if TYPE_CHECKING:
    from distattn.parallel.runtime.program import ProgramStep

# a kept buffer may grow by at most this factor, which is enough to avoid copies in both passes for an all-to-all on four ranks
_MOST_KEPT = 4 / 3


class Landing(NamedTuple):
    """A buffer that is a launch's working tensor. rows: its number of rows. new_row: maps the buffer's old rows to its new rows.

    own_slices: the slices of the working tensor that hold rows of the rank's own tensors.
    """

    rows: int
    new_row: Ints
    own_slices: tuple[BufferSlice, ...]

    @property
    def own_view(self) -> View:
        """The rank's own rows in the buffer's order, as a view that covers only part of the buffer."""
        return View(
            self.rows, self.own_slices[0].view_heads.stop if self.own_slices else 0, list(self.own_slices), False
        )

    def rows_of_own(self, tensor: BufferKey) -> Ints:
        """Map each row of one of the rank's own tensors to the buffer row that holds it, or to -1 if no row does."""
        rows = [
            (_numbers(piece.rows), _numbers(piece.view_rows)) for piece in self.own_slices if piece.buffer == tensor
        ]
        out = np.full(1 + max((int(own_rows.max(initial=-1)) for own_rows, _ in rows), default=-1), -1, np.int64)
        for own_rows, there in rows:
            out[own_rows] = there
        return out


def land(
    steps: list[ProgramStep],
    sizes: Mapping[BufferKey, int],
    bundles: Mapping[BufferKey, Bundle],
    kept: Container[BufferKey],
    inherited: Mapping[BufferKey, Landing],
) -> dict[BufferKey, Landing]:
    """Turn buffers into working tensors where that saves copies. Update the views of the steps, and return each buffer's
    landing.

    sizes: the number of rows of each buffer that may become a working tensor. bundles: for each buffer, the buffers that
    share its rows; they become working tensors together or not at all. kept: the buffers kept until the next pass. inherited:
    the landings of buffers kept by the previous pass.
    """
    launches: dict[BufferKey, list[tuple[BufferSlice, View]]] = defaultdict(list)
    messages: dict[BufferKey, list[tuple[BufferSlice, tuple[slice, ...]]]] = defaultdict(list)
    for step in steps:
        for launch in step.launches:
            for view in (*launch.operands.values(), *launch.results.values()):
                for piece in view.slices:
                    launches[piece.buffer].append((piece, view))
        for _, message in (*step.sends, *step.receives):
            # a message from several buffers is gathered before it is sent, so its rows may be anywhere
            if len(message.view.slices) == 1:
                (piece,) = message.view.slices
                messages[piece.buffer].append((piece, message.segments))
    landings: dict[BufferKey, Landing] = {}
    for key, rows in sizes.items():
        landing = next((candidate for _, view in launches[key] if (candidate := _landing(key, rows, view))), None)
        is_small = key not in kept or (landing and landing.rows <= _MOST_KEPT * rows)
        if landing and is_small and _fits(key, landing, launches[key], messages[key]):
            landings[key] = landing
    landings = {key: landing for key, landing in landings.items() if _agrees(landing, bundles.get(key, ()), landings)}
    for step in steps:
        _change(step, {**landings, **inherited})
    return landings


def may_land(call: Call, table: Table, moves: Columns) -> np.ndarray:
    """Return which moves are to or from a buffer that may be a launch's working tensor. Both ends of a message get the same
    result.

    The buffer is where copies arrive or partial results leave. As a working tensor it also contains the rank's own rows, so it
    qualifies only if the tasks of one step use both its own and other ranks' tokens, after the copies arrive or before the
    results leave.
    """
    is_result = np.isin(moves["payload"], REDUCED_PAYLOADS)
    holder = np.where(is_result, moves["src"], moves["dst"])
    out = np.ones(len(holder), bool)
    if call.op.is_recurrent:
        return out
    tasks = select_rows(table.tasks, np.isin(table.tasks["rank"], holder))
    chunks, ranks = call.layout.chunks, call.ranks
    is_of_keys = np.isin(moves["payload"], KEY_PAYLOADS)
    for of_kind, t0, t1 in ((is_of_keys, "k0", "k1"), (~is_of_keys, "q0", "q1")):
        # has[0]: True if a rank's tasks in a step use tokens of other ranks; has[1]: True if they use the rank's own tokens
        has = np.zeros((2, ranks, table.steps), bool)
        i, j = overlapping_pairs(chunks["t0"], chunks["t1"], tasks[t0], tasks[t1])
        rank = tasks["rank"][i]
        has[(chunks["rank"][j] == rank).astype(np.int64), rank, tasks["step"][i]] = True
        mixes = has[0] & has[1]
        # True if any step up to and including this step (before), or from this step on (after), uses both
        before = np.logical_or.accumulate(mixes, 1)
        after = np.logical_or.accumulate(mixes[:, ::-1], 1)[:, ::-1]
        for of_moves, mixed in ((of_kind & is_result, before), (of_kind & ~is_result, after)):
            out[of_moves] = mixed[holder[of_moves], moves["step"][of_moves]]
    return out


def _agrees(landing: Landing, bundle: Bundle, landings: Mapping[BufferKey, Landing]) -> bool:
    """Return whether all buffers of a bundle have landings of the same size, with their rows in the same places."""
    others = [landings.get(key) for key in bundle]
    return all(other and other.rows == landing.rows and (other.new_row == landing.new_row).all() for other in others)


def _landing(key: BufferKey, rows: int, view: View) -> Landing | None:
    """Return the landing of a buffer of `rows` rows as the working tensor of a view, or None if that is impossible."""
    own_slices = tuple(piece for piece in view.slices if piece.buffer.step == OWN)
    buffer_slices = [piece for piece in view.slices if piece.buffer == key]
    if (
        not view.is_complete
        or len(buffer_slices) != 1
        or len(own_slices) + 1 != len(view.slices)
        or view.heads != key.h1 - key.h0
    ):
        return None
    (piece,) = buffer_slices
    if _length(piece) != rows or any(other.view_heads != slice(0, view.heads) for other in view.slices):
        return None
    new_row = np.empty(rows, np.int64)
    new_row[_numbers(piece.rows)] = _numbers(piece.view_rows)
    # nothing is saved if the buffer already is the working tensor
    return None if not own_slices and (new_row == np.arange(rows)).all() else Landing(view.rows, new_row, own_slices)


def _fits(
    key: BufferKey,
    landing: Landing,
    launches: list[tuple[BufferSlice, View]],
    messages: list[tuple[BufferSlice, tuple[slice, ...]]],
) -> bool:
    """Return whether messages occupy contiguous rows of the landed buffer, and no launch needs the buffer's old order."""
    if key.payload in REDUCED_PAYLOADS and len(launches) != 1:
        # a result that several launches add to is complete only after the last of them
        return False
    for piece, view in launches:
        was_direct = len(view.slices) == 1 and isinstance(piece.rows, slice)
        if was_direct and not _is_run(landing.new_row[_numbers(piece.rows)]):
            return False
    return all(
        isinstance(piece.rows, slice) and all(_is_run(landing.new_row[piece.rows][segment]) for segment in segments)
        for piece, segments in messages
    )


def _change(step: ProgramStep, landings: Mapping[BufferKey, Landing]) -> None:
    """Update the rows in a step's views to their new positions in landed buffers."""
    for launch in step.launches:
        for views in (launch.operands, launch.results):
            views.update({payload: _as_landed(view, landings) for payload, view in views.items()})
    for messages in (step.sends, step.receives):
        for i, (payload, message) in enumerate(messages):
            slices = [_moved(piece, landings) for piece in message.view.slices]
            if len(slices) == 1:
                slices = _in_segments(message.view.slices[0], message.segments, landings)
            messages[i] = payload, message._replace(view=message.view._replace(slices=slices))


def _as_landed(view: View, landings: Mapping[BufferKey, Landing]) -> View:
    """Return a launch's view as one row range of a landed buffer that holds all of its rows in order, or else with its rows
    updated."""
    slices = [_moved(piece, landings) for piece in view.slices]
    for i, piece in enumerate(slices):
        landing = landings.get(piece.buffer)
        others = (*view.slices[:i], *view.slices[i + 1 :])
        rows = _run_of_landed(piece, others, view, landing) if landing else None
        if rows:
            return view._replace(slices=[piece._replace(rows=rows, view_rows=slice(0, view.rows))])
    return view._replace(slices=slices)


def _run_of_landed(piece: BufferSlice, others: tuple[BufferSlice, ...], view: View, landing: Landing) -> slice | None:
    """Return the contiguous rows of a landed buffer that hold an entire view in order, or None if there is no such range.

    piece: the view's slice of that buffer, with its new rows. others: the view's other slices.
    """
    if not view.is_complete or any(part.view_heads != slice(0, view.heads) for part in (piece, *others)):
        return None
    where = np.full(view.rows, -1, np.int64)
    where[_numbers(piece.view_rows)] = _numbers(piece.rows)
    for other in others:
        first_head = next((part.heads.start for part in landing.own_slices if part.buffer == other.buffer), -1)
        rows, new_rows = _numbers(other.rows), landing.rows_of_own(other.buffer)
        if other.heads.start != first_head + piece.heads.start or rows.max(initial=-1) >= len(new_rows):
            return None
        where[_numbers(other.view_rows)] = new_rows[rows]
    # the rank's own rows of a result are accumulated from the buffer once, so the view must be the entire buffer
    whole = piece.buffer.payload not in REDUCED_PAYLOADS or view.rows == landing.rows
    if not whole or not view.rows or (where < 0).any() or not _is_run(where):
        return None
    return slice(int(where[0]), int(where[0]) + view.rows)


def _moved(piece: BufferSlice, landings: Mapping[BufferKey, Landing]) -> BufferSlice:
    """Return a slice with its rows at their new positions in the landed buffer."""
    if piece.buffer not in landings:
        return piece
    return piece._replace(rows=_index(landings[piece.buffer].new_row[_numbers(piece.rows)]))


def _in_segments(
    piece: BufferSlice, segments: tuple[slice, ...], landings: Mapping[BufferKey, Landing]
) -> list[BufferSlice]:
    """Return the slices of a message: one per segment if its buffer has landed, otherwise only `piece`."""
    if piece.buffer not in landings:
        return [piece]
    rows = landings[piece.buffer].new_row[_numbers(piece.rows)]
    return [piece._replace(rows=_index(rows[segment]), view_rows=segment) for segment in segments]


def _numbers(rows: RowIndex) -> Ints:
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()


def _is_run(rows: Ints) -> bool:
    return bool((np.diff(rows) == 1).all())


def _index(rows: Ints) -> RowIndex:
    """Return rows as a slice if they are contiguous, otherwise as an index tensor."""
    if len(rows) and _is_run(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


def _length(piece: BufferSlice) -> int:
    return len(_numbers(piece.rows))
