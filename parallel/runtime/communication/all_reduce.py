"""All-reduce over some of the ranks, through their plans' transport. Results and gradients are bitwise equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distattn.parallel.runtime.arenas import ARENAS, ArenaAllocator, aligned_bytes
from distattn.parallel.runtime.communication.transport import Packet, Transport


def all_reduce_sum(x: Tensor, ranks: Sequence[int], rank: int, transport: Transport) -> Tensor:
    """Sum tensors of equal shape and dtype over `ranks`, of which this process is `rank`. All ranks in `ranks` must call this.

    The sum is differentiable: its gradient is the sum of the ranks' gradients. Values are added in rank order. Raise
    LostRankError naming the peers that stopped answering.
    """
    summed: Tensor = _AllReduceSum.apply(x, ranks, rank, transport)
    return summed


class _AllReduceSum(torch.autograd.Function):
    """A sum over ranks. Its gradient is the same operation, since every rank's sum depends equally on every rank's tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Sequence[int], rank: int, transport: Transport) -> Tensor:
        ctx.ranks, ctx.rank, ctx.transport = ranks, rank, transport
        return _summed(x, ranks, rank, transport)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _AllReduceSum.apply(grad, ctx.ranks, ctx.rank, ctx.transport), None, None, None


def _summed(x: Tensor, ranks: Sequence[int], rank: int, transport: Transport) -> Tensor:
    """Sum a different part of x on each rank and send it to all other ranks. In two exchanges, a rank sends 2 (1 - 1/R) times
    the bytes of x."""
    # memory for x, for the sum, and for every rank's values of this rank's part
    sizes = [part.numel() for part in x.reshape(-1).tensor_split(len(ranks))]
    part_size = sizes[list(ranks).index(rank)]
    nbytes = aligned_bytes(*(2 * [x.nbytes] + len(ranks) * [part_size * x.element_size()]))
    with ARENAS.borrowed(nbytes, x.device) as arena:
        allocator = ArenaAllocator(arena)
        parts = dict(zip(ranks, allocator.copy_of(x).view(-1).split(sizes), strict=True))
        whole = allocator.tensor(x.shape, x.dtype)
        sums = dict(zip(ranks, whole.view(-1).split(sizes), strict=True))
        received = {peer: parts[rank] if peer == rank else allocator.tensor((part_size,), x.dtype) for peer in ranks}
        _exchange(parts, received, rank, transport)
        total = sums[rank].zero_()
        for peer in ranks:
            total += received[peer]
        _exchange(dict.fromkeys(ranks, total), sums, rank, transport)
        return whole.clone()


def _exchange(sent: dict[int, Tensor], received: dict[int, Tensor], rank: int, transport: Transport) -> None:
    """Exchange one tensor with every other rank. Empty tensors are not sent."""
    sends, receives = (
        [Packet(peer, "sums", tensor) for peer, tensor in tensors.items() if peer != rank and tensor.numel()]
        for tensors in (sent, received)
    )
    transport.exchange(sends, receives, False, "of an all-reduce").wait()
