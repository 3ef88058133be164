"""Operands that lie where they arrive, and results that leave from where they are computed.

Where a launch needs one arrival and the rank's own tokens, the arrival's buffer is made as large as the working tensor that
both would be gathered into, in the same order of tokens: messages land between the own rows, which are copied in beforehand.
The same for results: the kernel writes one tensor, messages leave from it, and the own rows are accumulated from it. In buffers
that stay until the backward pass the own rows stay, too, so these land only where that makes them little larger.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from distattn.ir.intervals import Ints, overlapping_pairs
from distattn.ir.plan import KEY_PAYLOADS, REDUCED_PAYLOADS, Call, Columns, Table, select_rows
from distattn.parallel.runtime.row_bundles import Bundle
from distattn.parallel.runtime.views import OWN, BufferKey, BufferSlice, RowIndex, View

if TYPE_CHECKING:
    from distattn.parallel.runtime.program import ProgramStep

# A kept buffer becomes at most this much larger: as an all-to-all's on four ranks. Both passes then need no copy of it.
_MOST_KEPT = 4 / 3


class Landing(NamedTuple):
    """A buffer that is a launch's working tensor. rows: of both; new_row: where each row of the buffer as it was lies now.

    own: the slices of the rank's own tensor among its rows.
    """

    rows: int
    new_row: Ints
    own: tuple[BufferSlice, ...]

    @property
    def own_view(self) -> View:
        """The own rows in the buffer's order, as a view that does not reach all of it."""
        return View(self.rows, self.own[0].view_heads.stop if self.own else 0, list(self.own), False)

    def rows_of_own(self, own: BufferKey) -> Ints:
        """Return the row of the buffer in which each row of an own tensor lies, -1 for those that are not there."""
        rows = [(_numbers(piece.rows), _numbers(piece.view_rows)) for piece in self.own if piece.buffer == own]
        out = np.full(1 + max((int(mine.max(initial=-1)) for mine, _ in rows), default=-1), -1, np.int64)
        for mine, there in rows:
            out[mine] = there
        return out


def land(
    steps: list[ProgramStep],
    sizes: Mapping[BufferKey, int],
    bundles: Mapping[BufferKey, Bundle],
    kept: Container[BufferKey],
    inherited: Mapping[BufferKey, Landing],
) -> dict[BufferKey, Landing]:
    """Let buffers be working tensors where that spares copies; changes the views of the steps. Returns what each has become.

    sizes: rows of the buffers that may. bundles: the buffers that lie row by row beside each, which do so in the same way or not.
    kept: the buffers that stay until the next pass. inherited: what buffers of the pass before have become.
    """
    launches: dict[BufferKey, list[tuple[BufferSlice, View]]] = defaultdict(list)
    messages: dict[BufferKey, list[tuple[BufferSlice, tuple[slice, ...]]]] = defaultdict(list)
    for step in steps:
        for launch in step.launches:
            for view in (*launch.operands.values(), *launch.results.values()):
                for piece in view.slices:
                    launches[piece.buffer].append((piece, view))
        for _, message in (*step.sends, *step.receives):
            # what is in several buffers is gathered before it is sent, wherever it lies
            if len(message.view.slices) == 1:
                (piece,) = message.view.slices
                messages[piece.buffer].append((piece, message.segments))
    landings: dict[BufferKey, Landing] = {}
    for key, rows in sizes.items():
        landing = next((one for _, view in launches[key] if (one := _landing(key, rows, view))), None)
        is_small = key not in kept or (landing and landing.rows <= _MOST_KEPT * rows)
        if landing and is_small and _fits(key, landing, launches[key], messages[key]):
            landings[key] = landing
    landings = {key: landing for key, landing in landings.items() if _agrees(landing, bundles.get(key, ()), landings)}
    for step in steps:
        _change(step, {**landings, **inherited})
    return landings


def may_land(call: Call, table: Table, moves: Columns) -> np.ndarray:
    """Return which moves are to or from a buffer that may be a launch's working tensor: the same at both ends of a message.

    The buffer is where copies arrive or partial results leave. It lands among own rows, so it may only where tasks of one step
    have own tokens and others', after copies arrive or before results leave.
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
        # whether the tasks of a rank and step have tokens of others and of its own
        has = np.zeros((2, ranks, table.steps), bool)
        i, j = overlapping_pairs(chunks["t0"], chunks["t1"], tasks[t0], tasks[t1])
        rank = tasks["rank"][i]
        has[(chunks["rank"][j] == rank).astype(np.int64), rank, tasks["step"][i]] = True
        mixes = has[0] & has[1]
        # whether a step does that is no later, or no earlier
        before = np.logical_or.accumulate(mixes, 1)
        after = np.logical_or.accumulate(mixes[:, ::-1], 1)[:, ::-1]
        for of_moves, mixed in ((of_kind & is_result, before), (of_kind & ~is_result, after)):
            out[of_moves] = mixed[holder[of_moves], moves["step"][of_moves]]
    return out


def _agrees(landing: Landing, bundle: Bundle, found: Mapping[BufferKey, Landing]) -> bool:
    """Return whether all buffers of a bundle have become as large, with their rows in the same places."""
    others = [found.get(key) for key in bundle]
    return all(other and other.rows == landing.rows and (other.new_row == landing.new_row).all() for other in others)


def _landing(key: BufferKey, rows: int, view: View) -> Landing | None:
    """What a buffer of so many rows would become as the working tensor of a view."""
    own = tuple(piece for piece in view.slices if piece.buffer.step == OWN)
    there = [piece for piece in view.slices if piece.buffer == key]
    if not view.is_complete or len(there) != 1 or len(own) + 1 != len(view.slices) or view.heads != key.h1 - key.h0:
        return None
    (piece,) = there
    if _length(piece) != rows or any(other.view_heads != slice(0, view.heads) for other in view.slices):
        return None
    new_row = np.empty(rows, np.int64)
    new_row[_numbers(piece.rows)] = _numbers(piece.view_rows)
    # nothing to gain where the working tensor is the buffer already
    return None if not own and (new_row == np.arange(rows)).all() else Landing(view.rows, new_row, own)


def _fits(
    key: BufferKey,
    landing: Landing,
    launches: list[tuple[BufferSlice, View]],
    messages: list[tuple[BufferSlice, tuple[slice, ...]]],
) -> bool:
    """Whether messages land in whole segments, and nobody else needs the buffer as it was."""
    if key.payload in REDUCED_PAYLOADS and len(launches) != 1:
        # what several kernels add to is not ready before the last of them
        return False
    for piece, view in launches:
        was_direct = len(view.slices) == 1 and isinstance(piece.rows, slice)
        if was_direct and not _is_run(landing.new_row[_numbers(piece.rows)]):
            return False
    return all(
        isinstance(piece.rows, slice) and all(_is_run(landing.new_row[piece.rows][segment]) for segment in segments)
        for piece, segments in messages
    )


def _change(step: ProgramStep, found: Mapping[BufferKey, Landing]) -> None:
    """The same step with the rows of changed buffers where they lie now."""
    for launch in step.launches:
        for views in (launch.operands, launch.results):
            views.update({payload: _as_landed(view, found) for payload, view in views.items()})
    for messages in (step.sends, step.receives):
        for i, (payload, message) in enumerate(messages):
            slices = [_moved(piece, found) for piece in message.view.slices]
            if len(slices) == 1:
                slices = _in_segments(message.view.slices[0], message.segments, found)
            messages[i] = payload, message._replace(view=message.view._replace(slices=slices))


def _as_landed(view: View, found: Mapping[BufferKey, Landing]) -> View:
    """Return a launch's view: a run of rows of a landed buffer where all its rows lie there, else its rows where they lie now."""
    slices = [_moved(piece, found) for piece in view.slices]
    for i, piece in enumerate(slices):
        landing = found.get(piece.buffer)
        own = (*view.slices[:i], *view.slices[i + 1 :])
        rows = _run_of_landed(piece, own, view, landing) if landing else None
        if rows:
            return view._replace(slices=[piece._replace(rows=rows, view_rows=slice(0, view.rows))])
    return view._replace(slices=slices)


def _run_of_landed(piece: BufferSlice, own: tuple[BufferSlice, ...], view: View, landing: Landing) -> slice | None:
    """Return the run of rows of a landed buffer that a view is, or None if it is no run.

    piece: the view's slice of that buffer, where it lies now; own: its other slices.
    """
    if not view.is_complete or any(one.view_heads != slice(0, view.heads) for one in (piece, *own)):
        return None
    where = np.full(view.rows, -1, np.int64)
    where[_numbers(piece.view_rows)] = _numbers(piece.rows)
    for other in own:
        first_head = next((one.heads.start for one in landing.own if one.buffer == other.buffer), -1)
        rows, there = _numbers(other.rows), landing.rows_of_own(other.buffer)
        if other.heads.start != first_head + piece.heads.start or rows.max(initial=-1) >= len(there):
            return None
        where[_numbers(other.view_rows)] = there[rows]
    # a result is accumulated from the buffer once: from all of it
    whole = piece.buffer.payload not in REDUCED_PAYLOADS or view.rows == landing.rows
    if not whole or not view.rows or (where < 0).any() or not _is_run(where):
        return None
    return slice(int(where[0]), int(where[0]) + view.rows)


def _moved(piece: BufferSlice, found: Mapping[BufferKey, Landing]) -> BufferSlice:
    """A slice with its rows where they lie now."""
    if piece.buffer not in found:
        return piece
    return piece._replace(rows=_index(found[piece.buffer].new_row[_numbers(piece.rows)]))


def _in_segments(
    piece: BufferSlice, segments: tuple[slice, ...], found: Mapping[BufferKey, Landing]
) -> list[BufferSlice]:
    """The slices of a message: one for each of its segments, where the buffer has changed."""
    if piece.buffer not in found:
        return [piece]
    rows = found[piece.buffer].new_row[_numbers(piece.rows)]
    return [piece._replace(rows=_index(rows[segment]), view_rows=segment) for segment in segments]


def _numbers(rows: RowIndex) -> Ints:
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()


def _is_run(rows: Ints) -> bool:
    return bool((np.diff(rows) == 1).all())


def _index(rows: Ints) -> RowIndex:
    """Rows as a slice where they follow one another."""
    if len(rows) and _is_run(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


def _length(piece: BufferSlice) -> int:
    return len(_numbers(piece.rows))
