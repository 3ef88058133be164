"""Express a launch's bands for variable-length flash attention: sequences with one window, aligned at the bottom right corner.

A call accepts sequences that are consecutive in its queries and in its keys, all with the same window: in a sequence of T
rows and S keys, row i attends to key j if i + S - T - left <= j <= i + S - T + right. Each band is split into at most
three sequences: rows whose keys start at the rectangle's edge, rows whose keys end at its edge, and the rows between.
Sequences with equal windows in ascending order form one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.ir.bands import BQ, OQ, Q0, Q1, row_key_ranges, tighten
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints
from distattn.kernels.launch_mask import LaunchMask, WrittenRows, split_even_groups

# the window size that stands for no limit
OPEN = -1
# minimum rows per step of a staircase: masks are split at every step, and kernels are inefficient with few rows
LEAST_STEP = 16


class Sequence(NamedTuple):
    """A sequence: rows [q0, q1) attend to keys [k0, k1) in a window that aligns the last row with the last key."""

    q0: int
    q1: int
    k0: int
    k1: int
    left: int
    right: int


class Segment(NamedTuple):
    """The rows or keys of adjacent sequences. first: True if no earlier call has written them for the call's heads."""

    start: int
    stop: int
    first: bool


class FlashCall(NamedTuple):
    """One operator call: its heads, rows and keys, its window, and the start offsets of its sequences, plus the end of
    the last (int32)."""

    heads: slice
    kv_heads: slice
    rows: slice
    keys: slice
    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int
    left: int
    right: int
    row_segments: list[Segment]
    key_segments: list[Segment]


class FlashSchedule(NamedTuple):
    """The operator calls of a launch, and whether they write every row and every key."""

    calls: tuple[FlashCall, ...]
    all_rows: bool
    all_keys: bool


def flash_schedule(mask: LaunchMask) -> FlashSchedule:
    """Return the operator calls that cover a launch's mask. Raise DistattnError for bands that no call can express."""
    tight = tighten(mask.bands)
    some = tight[:, Q0] < tight[:, Q1]
    parts = [
        (heads, _kv_heads(mask, heads), calls)
        for heads, bands in _by_heads(mask, tight[some], mask.band_heads[some])
        for calls in _calls(sorted(piece for band in bands for piece in sequences(band)))
    ]
    rows = WrittenRows(mask.rows, [0, mask.heads, *(end for heads, *_ in parts for end in (heads.start, heads.stop))])
    keys = WrittenRows(mask.keys, [0, mask.kv_heads, *(end for _, kv, _ in parts for end in (kv.start, kv.stop))])
    calls = []
    for heads, kv_heads, call_sequences in parts:
        q = _segments([(sequence.q0, sequence.q1) for sequence in call_sequences], heads, rows)
        k = _segments([(sequence.k0, sequence.k1) for sequence in call_sequences], kv_heads, keys)
        starts_q, starts_k = _starts(call_sequences)
        calls.append(
            FlashCall(
                heads,
                kv_heads,
                slice(call_sequences[0].q0, call_sequences[-1].q1),
                slice(call_sequences[0].k0, call_sequences[-1].k1),
                starts_q,
                starts_k,
                # claim at least 2 rows: the operator's path for a single row does not support gaps between keys
                max(int(starts_q.diff().max()), 2),
                int(starts_k.diff().max()),
                call_sequences[0].left,
                call_sequences[0].right,
                q,
                k,
            )
        )
    return FlashSchedule(tuple(calls), rows.unwritten == 0, keys.unwritten == 0)


def sequences(band: Ints) -> Iterator[Sequence]:
    """Yield the sequences that cover a tight band."""
    q0, q1, k0, k1, lo, hi, bq, bk, oq, ok = (int(number) for number in band)
    low, high = lo + ok - oq, hi + ok - oq
    if (bq, bk) != (1, 1):
        yield from _steps(band)
        return
    # keys of rows before `ends` end at the band's upper limit, and keys of rows from `begins` on start at its lower
    # limit; all others end or start at the rectangle's edge. In row `begins`, limit and edge coincide, so if it is the
    # last row, it needs no sequence of its own
    ends, begins = (min(max(row, q0), q1) for row in (k1 - high, k0 - low))
    begins = q1 if begins == q1 - 1 and begins > q0 else begins
    cuts = sorted({q0, ends, begins, q1})
    for a, b in zip(cuts[:-1], cuts[1:], strict=True):
        first, last = max(k0, a + low), min(k1, b + high)
        left = last - b - low if a >= begins else OPEN
        yield Sequence(a, b, first, last, left, 0 if b <= ends else OPEN)


def _steps(band: Ints) -> Iterator[Sequence]:
    """Yield one sequence per step of a staircase, whose rows all attend to the same keys."""
    q0, q1, size, origin = int(band[Q0]), int(band[Q1]), int(band[BQ]), int(band[OQ])
    bounds = [q0, *range(q0 + size - (q0 - origin) % size, q1, size), q1]
    if size < LEAST_STEP and len(bounds) > 2:
        raise DistattnError(
            f'kernel "flash" cannot express a mask that climbs in steps of {size} rows; use kernel="triton".'
        )
    first, end = row_key_ranges(band[None].repeat(len(bounds) - 1, 0), np.array(bounds[:-1]))
    for a, b, k0, k1 in zip(bounds[:-1], bounds[1:], first.tolist(), end.tolist(), strict=True):
        if k0 < k1:
            yield Sequence(a, b, k0, k1, OPEN, OPEN)


def _by_heads(mask: LaunchMask, bands: Ints, band_heads: Ints) -> Iterator[tuple[slice, Ints]]:
    """Yield each range of heads in which all KV heads serve the same number of query heads, with its bands."""
    for h0, h1 in sorted(set(map(tuple, band_heads.tolist()))):
        head_bands = bands[(band_heads == (h0, h1)).all(1)]
        for low, high in split_even_groups(h0, h1, mask.group_size, mask.first_head):
            yield slice(low, high), head_bands


def _kv_heads(mask: LaunchMask, heads: slice) -> slice:
    low, high = mask.first_head + heads.start, mask.first_head + heads.stop
    return slice(low // mask.group_size, -(-high // mask.group_size))


def _calls(pieces: list[Sequence]) -> list[list[Sequence]]:
    """Group sequences into calls. All sequences of a call have the same window, and are in ascending order of both queries and
    keys."""
    calls: list[list[Sequence]] = []
    for piece in pieces:
        for call in calls:
            last = call[-1]
            if last[4:] == piece[4:] and last.q1 <= piece.q0 and last.k1 <= piece.k0:
                call.append(piece)
                break
        else:
            calls.append([piece])
    return calls


def _starts(call_sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """Return the offsets of sequences relative to the first. Gaps become sequences without keys or without rows."""
    q, k = [0], [0]
    first = call_sequences[0]
    for sequence in call_sequences:
        # insert skipped rows first, then skipped keys
        if sequence.q0 - first.q0 > q[-1]:
            q, k = [*q, sequence.q0 - first.q0], [*k, k[-1]]
        if sequence.k0 - first.k0 > k[-1]:
            q, k = [*q, q[-1]], [*k, sequence.k0 - first.k0]
        q, k = [*q, sequence.q1 - first.q0], [*k, sequence.k1 - first.k0]
    return torch.tensor(q, dtype=torch.int32), torch.tensor(k, dtype=torch.int32)


def _segments(ranges: list[tuple[int, int]], heads: slice, written: WrittenRows) -> list[Segment]:
    """Join adjacent ranges into segments, in order, and mark their rows as written."""
    joined: list[list[int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    return [Segment(start, stop, written.mark(heads, slice(start, stop))) for start, stop in joined]
