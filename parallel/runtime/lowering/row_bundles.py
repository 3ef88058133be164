"""Bundles: buffers of a rank that share rows, so that one message carries everything that a peer sends to them in a step.

A *bundle* is a matrix with one row per token. A row holds all heads of all tensors of the bundle's buffers, one after another.
The rows of one peer are therefore contiguous, and kernels still read each tensor in place, by its strides. A bundle costs
nothing, because a rank's own rows are copied to the arena before they are sent in any case. A buffer with all heads is a bundle
by itself, since one copy of the rank's own rows serves all peers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch

from distattn.ir.intervals import Ints, lexicographic_argsort, run_starts, sorted_unique
from distattn.ir.plan import (
    DTYPE_BYTES,
    HELD_PAYLOADS,
    KEY_PAYLOADS,
    REDUCED_PAYLOADS,
    Call,
    Columns,
    Payload,
    Table,
    num_rows,
    select_rows,
)
from distattn.parallel.runtime.lowering.views import BufferKey
from distattn.parallel.tables.partition import owns_range

# in bytes: the GPU's tensor memory accelerator requires addresses and strides that are multiples of this
_ADDRESS_ALIGNMENT = 16
# in elements: Triton uses wide loads if the row stride is a multiple of this
_ROW_ALIGNMENT = 16
# maximum padding in a row, as a fraction of its tensors: padding is also sent
_MOST_PADDING = 1 / 8
# maximum number of bytes that may be kept longer, and copied once more, to send several buffers in one message; above this,
# separate messages are about as fast
_MOST_EXTENDED = 64 << 20

# the buffers of a bundle, in row order
Bundle = tuple[BufferKey, ...]
# the tensors of a payload, each (width, dtype); a width of None means one element per token and head
Widths = tuple[tuple[int | None, str], ...]


class RowTensor(NamedTuple):
    """A tensor in the rows of a bundle: its heads, its width (None for one element per head), and the offset of its first
    element in a row, in elements of its dtype."""

    dtype: torch.dtype
    heads: int
    width: int | None
    first: int


class RowFormat(NamedTuple):
    """The layout of a bundle's row, which is `numbers` elements of `dtype`. tensors: the tensors of each part, in order.

    Tensors with one element per head (log-sum-exp, delta) come after the others. A row ends with padding, so that the row
    stride is a multiple of 16 elements of every other tensor.
    """

    dtype: str
    numbers: int
    tensors: tuple[tuple[RowTensor, ...], ...]

    @property
    def widths(self) -> Widths:
        """The row as a single tensor with one head."""
        return ((self.numbers, self.dtype),)

    @staticmethod
    def of(parts: list[tuple[int, Widths]]) -> RowFormat:
        """Return the row format of parts, each given as (number of heads, tensors)."""
        names = [(part, field) for part, (_, widths) in enumerate(parts) for field in range(len(widths))]
        at, placed = 0, {}
        for part, field in sorted(names, key=lambda name: parts[name[0]][1][name[1]][0] is None):
            heads, widths = parts[part]
            width, name = widths[field]
            size = DTYPE_BYTES[name]
            placed[part, field] = RowTensor(getattr(torch, name), heads, width, at // size)
            at += heads * (width or 1) * size
        unit = _ROW_ALIGNMENT * max(
            DTYPE_BYTES[name] for _, widths in parts for width, name in widths if width is not None
        )
        at = -(-at // unit) * unit
        tensors = tuple(tuple(placed[i, field] for field in range(len(widths))) for i, (_, widths) in enumerate(parts))
        name = parts[0][1][0][1]
        return RowFormat(name, at // DTYPE_BYTES[name], tensors)


def find_bundles(call: Call, table: Table, ranks: Ints) -> dict[tuple[int, BufferKey], Bundle]:
    """Return the bundles of `ranks`, keyed by rank and buffer. Both ends of a message compute the same bundles.

    All buffers that arrive at a rank in a step (or leave it, for partial results) form one bundle if they hold the same tokens
    of the same peers, at least one of them lacks some of the heads, and they have equal lifetimes. Lifetimes are equal if all
    tasks of the rank are in one step and the rank forwards nothing. Small copies form one bundle even if their lifetimes
    differ. Otherwise Q and dO form one bundle, and every other buffer is a bundle by itself. Results that `result_parts` puts
    in part 1 form a bundle although they hold different tokens. A buffer is in no bundle if its rows would need much padding,
    or if its tensors would not be aligned in a row, since fast kernels reject such tensors.
    """
    bundles: dict[tuple[int, BufferKey], Bundle] = {}
    moves, tasks = {**table.moves, "part": result_parts(call, table)}, table.tasks
    heads = [call.payload_heads(payload) for payload in Payload]
    is_aligned = cache(partial(_is_aligned, call))
    # recurrence kernels would copy a tensor with gaps between its rows
    if not call.op.is_softmax:
        return bundles
    for payloads, end, peer in ((HELD_PAYLOADS, "dst", "src"), (REDUCED_PAYLOADS, "src", "dst")):
        of_kind = np.isin(moves["payload"], payloads)
        rows = select_rows(moves, of_kind & np.isin(moves[end], ranks))
        # ranks that pass on copies of, or partial results for, other ranks' tokens
        is_passed_on = of_kind & ~owns_range(call, moves[peer], moves["t0"], moves["t1"])
        passing_ranks = set(np.unique(moves[peer][is_passed_on]).tolist())
        for (rank, step, part), buffers in _buffers_by_step(rows, end, peer):
            tokens_of = {BufferKey(Payload(payload), step, h0, h1, part): tokens for payload, h0, h1, tokens in buffers}
            keys = [key for key in tokens_of if is_aligned(key.payload, key.h1 - key.h0)]
            if not keys:
                continue
            groups: list[Bundle] = [(key,) for key in keys]
            is_one = part > 0 or all(np.array_equal(tokens_of[key], tokens_of[keys[0]]) for key in keys[1:])
            with_some_heads = {key for key in keys if key.h1 - key.h0 < heads[key.payload]}
            if is_one and len(keys) > 1:
                lives_are_equal = part > 0 or (
                    rank not in passing_ranks and len(np.unique(tasks["step"][tasks["rank"] == rank])) <= 1
                )
                are_small = payloads is HELD_PAYLOADS and _extended_bytes(call, tokens_of, keys) <= _MOST_EXTENDED
                if with_some_heads and (lives_are_equal or are_small):
                    groups = [tuple(keys)]
                elif with_some_heads and payloads is HELD_PAYLOADS:
                    # Q and dO are used by the same tasks, so they live equally long
                    of_keys = tuple(key for key in keys if key.payload in KEY_PAYLOADS)
                    groups = [group for group in (tuple(key for key in keys if key not in of_keys), of_keys) if group]
            for bundle in groups:
                if with_some_heads.intersection(bundle) or len(call.payload_fields(bundle[0].payload)) > 1:
                    bundles.update({(rank, key): bundle for key in bundle})
    return bundles


def _is_aligned(call: Call, payload: Payload, heads: int) -> bool:
    """Return whether a payload's tensors are all aligned in a row, with little padding, both in memory and in messages."""
    for fields in (call.payload_fields(payload), call.comm_fields(payload)):
        sizes = [heads * (width or 1) * DTYPE_BYTES[name] for width, name in fields]
        wide = [size for size, (width, _) in zip(sizes, fields, strict=True) if width is not None]
        row = RowFormat.of([(heads, fields)])
        padding = row.numbers * DTYPE_BYTES[row.dtype] - sum(sizes)
        if any(size % _ADDRESS_ALIGNMENT for size in wide) or padding > _MOST_PADDING * sum(sizes):
            return False
    return True


def _extended_bytes(call: Call, tokens_of: dict[BufferKey, Ints], keys: list[BufferKey]) -> int:
    """Return the bytes of copies that a rank would keep longer in one bundle: those of queries or keys, whichever is smaller."""
    sizes = [0, 0]
    for key in keys:
        _, t0, t1 = tokens_of[key]
        row = (key.h1 - key.h0) * call.token_head_bytes(key.payload, in_memory=True)
        sizes[key.payload in KEY_PAYLOADS] += int((t1 - t0).sum()) * row
    return min(sizes)


def result_parts(call: Call, table: Table) -> Ints:
    """Return the part of each move's buffer: above 0 for dQ and dKV that share rows although the rank's other moves do not.

    A rank may send dQ and dKV of equally many tokens to some peers, and only dKV to others, all in one step. Results for the
    former are then in separate buffers, and a row holds dQ of one token and dKV of another. Each part has one range of heads
    of dQ and one of dKV, so it has one buffer of each. Only results of the rank's first step with tasks are in such parts,
    because they live equally long. All other moves are in part 0.
    """
    moves, tasks = table.moves, table.tasks
    part = np.zeros(num_rows(moves), np.int64)
    is_query = moves["payload"] == Payload.dQ
    chosen = np.flatnonzero(is_query | (moves["payload"] == Payload.dKV))
    if not is_query.any() or not call.op.is_softmax:
        return part
    rows, is_query = select_rows(moves, chosen), is_query[chosen]
    # group moves by rank, step and peer, and compare the tokens of dQ and dKV in each group
    size = table.steps * call.ranks
    pair, group = np.unique((rows["src"] * table.steps + rows["step"]) * call.ranks + rows["dst"], return_inverse=True)
    sign = np.where(is_query, 1, -1)
    tokens = np.zeros((3, len(pair)), np.int64)
    for column, values in zip(tokens, (sign, sign * rows["t0"], sign * rows["t1"]), strict=True):
        np.add.at(column, group, values)
    counts = [np.bincount(group[selected], minlength=len(pair)) for selected in (is_query, ~is_query)]
    are_equal = (tokens == 0).all(0)
    # dQ and dKV are one interval each, with the same number of tokens
    are_joint = (counts[0] == 1) & (counts[1] == 1) & (tokens[1] == tokens[2])
    source = pair // call.ranks
    _, sender = np.unique(source, return_inverse=True)
    differ = np.bincount(sender, ~are_equal) > 0
    # the second step in which a rank has tasks
    task_pairs = sorted_unique(tasks["rank"] * (table.steps + 1) + tasks["step"])
    second = np.full(call.ranks, size)
    is_first = np.append(True, task_pairs[1:] // (table.steps + 1) != task_pairs[:-1] // (table.steps + 1))
    is_second = ~is_first & np.append(False, is_first[:-1])
    second[task_pairs[is_second] // (table.steps + 1)] = task_pairs[is_second] % (table.steps + 1)
    rank, step = np.divmod(source, table.steps)
    is_shared = are_joint & differ[sender] & (step <= second[rank])
    heads = np.zeros((len(pair), 4), np.int64)
    for selected, first in ((is_query, 0), (~is_query, 2)):
        # a group that shares rows has one move of each payload
        heads[group[selected], first] = rows["h0"][selected]
        heads[group[selected], first + 1] = rows["h1"][selected]
    number = np.zeros(len(pair), np.int64)
    number[is_shared] = 1 + np.unique(heads[is_shared], axis=0, return_inverse=True)[1].reshape(-1)
    part[chosen] = number[group]
    return part


def _buffers_by_step(
    moves: Columns, end: str, peer: str
) -> Iterator[tuple[tuple[int, int, int], list[tuple[int, int, int, Ints]]]]:
    """Yield ((rank, step, part), buffers) for all combinations in `moves`.

    A buffer is (payload, h0, h1, tokens); tokens are (3, intervals): peer, t0, t1.
    """
    by = (end, "step", "part", "payload", "h0", "h1")
    moves = select_rows(moves, lexicographic_argsort(*(moves[name] for name in (*by, peer, "t0"))))
    tokens = np.stack([moves[name] for name in (peer, "t0", "t1")])
    first = run_starts(*(moves[name] for name in by)).tolist()
    names = zip(*(moves[name][first].tolist() for name in by), strict=True)
    buffers = [
        (name[:3], (*name[3:], tokens[:, a:b]))
        for name, (a, b) in zip(names, itertools.pairwise([*first, num_rows(moves)]), strict=True)
    ]
    for place, some in itertools.groupby(buffers, lambda entry: entry[0]):
        yield place, [buffer for _, buffer in some]
