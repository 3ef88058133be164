"""Move rows between layouts: each rank passes its rows (T, ...) in the first layout and gets its rows in the second."""

# T rows on this rank in the first layout, U in the second

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.ir.intervals import Ints
from distattn.ir.layout import Layout
from distattn.parallel.runtime.arenas import ARENAS, ArenaAllocator, aligned_bytes
from distattn.parallel.runtime.communication.streams import copy_to_device
from distattn.parallel.runtime.communication.transport import Packet, Transport


class RowMoves(NamedTuple):
    """The rows that one rank sends to and receives from each peer, including itself, in token order.

    rows: the number of rows in the second layout. sends, receives: row indices, keyed by peer.
    """

    rank: int
    rows: int
    sends: dict[int, Tensor]
    receives: dict[int, Tensor]

    @staticmethod
    def of(here: Layout, there: Layout, rank: int) -> RowMoves:
        """Compute the moves of `rank` from layout `here` to layout `there`, which must have the same tokens and ranks."""
        own_tokens, next_tokens = here.tokens(rank), there.tokens(rank)
        return RowMoves(rank, len(next_tokens), _rows_by_owner(own_tokens, there), _rows_by_owner(next_tokens, here))

    def to(self, device: torch.device) -> RowMoves:
        """Return the moves with the row indices on a device."""
        sends, receives = (
            {peer: copy_to_device(device, rows) for peer, rows in row_lists.items()}
            for row_lists in (self.sends, self.receives)
        )
        return RowMoves(self.rank, self.rows, sends, receives)

    def reversed(self) -> RowMoves:
        """Return the moves back to the first layout."""
        return RowMoves(self.rank, sum(map(len, self.sends.values())), self.receives, self.sends)


def move_rows(x: Tensor, moves: RowMoves, transport: Transport) -> Tensor:
    """Move rows (T, ...) of the first layout to rows (U, ...) of the second. Differentiable. All ranks must call this.

    moves: its row indices must be on x's device. Raise LostRankError naming the peers that stopped answering.
    """
    moved: Tensor = _MoveRows.apply(x, moves, transport)
    return moved


class _MoveRows(torch.autograd.Function):
    """A permutation of the rows of all ranks, whose gradient is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, moves: RowMoves, transport: Transport) -> Tensor:
        ctx.moves, ctx.transport = moves, transport
        return _moved(x, moves, transport)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _MoveRows.apply(grad, ctx.moves.reversed(), ctx.transport), None, None


def _moved(x: Tensor, moves: RowMoves, transport: Transport) -> Tensor:
    out = x.new_empty((moves.rows, *x.shape[1:]))
    sends, receives = (
        {peer: rows for peer, rows in of_all.items() if peer != moves.rank} for of_all in (moves.sends, moves.receives)
    )

    def shape(rows: Tensor) -> tuple[int, ...]:
        return len(rows), *x.shape[1:]

    travelling = (*sends.values(), *receives.values())
    nbytes = aligned_bytes(*(prod(shape(rows)) * x.element_size() for rows in travelling))
    with ARENAS.borrowed(nbytes, x.device) as arena:
        allocator = ArenaAllocator(arena)
        leaving = [
            Packet(peer, "rows", torch.index_select(x, 0, rows, out=allocator.tensor(shape(rows), x.dtype)))
            for peer, rows in sends.items()
        ]
        arriving = [Packet(peer, "rows", allocator.tensor(shape(rows), x.dtype)) for peer, rows in receives.items()]
        pending = transport.exchange(leaving, arriving, True, "of a re-layout")
        if moves.rank in moves.sends:
            out[moves.receives[moves.rank]] = x[moves.sends[moves.rank]]
        pending.wait()
        for packet in arriving:
            out[moves.receives[packet.peer]] = packet.tensor
    return out


def _rows_by_owner(tokens: Ints, layout: Layout) -> dict[int, Tensor]:
    """Map each rank that owns any of `tokens` in a layout to the positions of its tokens in `tokens`, in token order."""
    order = np.argsort(layout.chunks["t0"])
    begins, ranks = layout.chunks["t0"][order], layout.chunks["rank"][order]
    in_order = np.argsort(tokens)
    owner = ranks[np.searchsorted(begins, tokens[in_order], "right") - 1]
    return {int(rank): torch.from_numpy(in_order[owner == rank]) for rank in np.unique(owner)}
