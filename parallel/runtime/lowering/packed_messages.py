"""Packing of a step's messages from a rank's own tensors, and unpacking into them, with one copy per tensor for all peers.

The rows of all these messages are consecutive, either in one bundle (see `row_bundles`) or tensor by tensor. If every peer has
the same number of heads of a tensor (tokens, heads, width), the tensor is viewed as (tokens x peers, heads per peer, width), so
that one list of rows describes all copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.ir.intervals import Ints
from distattn.ir.plan import Call, Payload
from distattn.parallel.runtime.lowering.row_bundles import Bundle
from distattn.parallel.runtime.lowering.views import OWN, View

if TYPE_CHECKING:
    from distattn.parallel.runtime.program import Message, ProgramStep


class OwnRows(NamedTuple):
    """The rows of a rank's own tensors of a payload, viewed with `heads` heads per row, that make up all messages, in order."""

    payload: Payload
    heads: int
    rows: Tensor


class PackedMessages(NamedTuple):
    """Messages whose rows have the same format and are stored one after another.

    begins: maps the indices of each peer's messages to their first row. rows: the total number of rows. parts: the parts of a
    row, or a single part if tensors travel one by one.
    """

    begins: dict[tuple[int, ...], int]
    rows: int
    parts: tuple[OwnRows, ...]

    @property
    def first(self) -> tuple[int, ...]:
        """The indices of the first peer's messages, which are also the key of the place that holds the rows of all peers."""
        return next(iter(self.begins))


def joined_messages(messages: list[tuple[Payload, Message]]) -> list[tuple[int, ...]]:
    """Group the indices of a step's messages that travel together, ordered by the first message of each group."""
    groups: dict[tuple[int, Bundle | int], tuple[int, ...]] = {}
    for number, (_, message) in enumerate(messages):
        together = (message.peer, message.bundle or number)
        groups[together] = (*groups.get(together, ()), number)
    return list(groups.values())


def pack(
    call: Call, messages: list[tuple[Payload, Message]], joined: list[tuple[int, ...]], are_results: bool
) -> tuple[PackedMessages, ...]:
    """Group the messages of a step that are copied together. Leave out formats with fewer than two groups of messages.

    joined: the indices of the messages that travel together. are_results: the messages are written to the rank's own tensors,
    not read from them.
    """
    formats: dict[tuple[bool, tuple[tuple[Payload, int], ...]], dict[tuple[int, ...], list[Ints]]] = {}
    for numbers in joined:
        of_peer = [messages[number] for number in numbers]
        is_bundle = bool(of_peer[0][1].bundle)
        # rows with all heads are sent without a copy
        if not is_bundle and of_peer[0][1].view.heads == call.payload_heads(of_peer[0][0]):
            continue
        own_rows = [_own_rows(call, payload, message.view, are_results) for payload, message in of_peer]
        known_rows = [rows for rows in own_rows if rows is not None]
        if len(known_rows) == len(own_rows):
            format_ = is_bundle, tuple((payload, message.view.heads) for payload, message in of_peer)
            formats.setdefault(format_, {})[numbers] = known_rows
    return tuple(_packed(format_, rows) for (_, format_), rows in formats.items() if len(rows) > 1)


def uses_copies_of(payload: Payload, step: ProgramStep) -> bool:
    """Return whether a step only copies the rank's own tensors of a payload, into packed messages or into buffers."""
    packed = {number for some in step.packed_sends for numbers in some.begins for number in numbers}
    views = [message.view for number, (_, message) in enumerate(step.sends) if number not in packed]
    views += [view for launch in step.launches for view in launch.operands.values()]
    return not any(
        piece.buffer.payload == payload and piece.buffer.step == OWN for view in views for piece in view.slices
    )


def _packed(format_: tuple[tuple[Payload, int], ...], rows: dict[tuple[int, ...], list[Ints]]) -> PackedMessages:
    """Build the messages of one format. rows: rows of the rank's own tensors per part, keyed by the messages' indices."""
    begins = np.cumsum([0, *(len(of_peer[0]) for of_peer in rows.values())]).tolist()
    parts = [
        OwnRows(payload, heads, torch.from_numpy(np.concatenate(of_part)))
        for (payload, heads), of_part in zip(format_, zip(*rows.values(), strict=True), strict=True)
    ]
    return PackedMessages(dict(zip(rows, begins, strict=False)), begins[-1], tuple(parts))


def _own_rows(call: Call, payload: Payload, view: View, are_results: bool) -> Ints | None:
    """Map each row of the view to its row in the rank's own tensor, viewed with the same number of heads. Return None if the
    view cannot be packed: it includes other rows, parts of rows, or results that must be added."""
    heads, groups = view.heads, call.payload_heads(payload) // view.heads
    if not view.is_complete or groups * heads != call.payload_heads(payload):
        return None
    index = np.full(view.rows, -1, np.int64)
    for piece in view.slices:
        is_whole = piece.view_heads == slice(0, heads) and piece.heads.start % heads == 0
        if piece.buffer.step != OWN or not is_whole or (are_results and not piece.is_first):
            return None
        index[_numbers(piece.view_rows)] = _numbers(piece.rows) * groups + piece.heads.start // heads
    return index if (index >= 0).all() else None


def _numbers(rows: slice | Tensor) -> Ints:
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()
