"""An all-reduce over some ranks through the transport of their plans: every rank gets the same bits, and so do gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distattn.parallel.runtime.arenas import ARENAS, ArenaAllocator, aligned_bytes
from distattn.parallel.runtime.transport import Packet, Transport


def all_reduce_sum(x: Tensor, ranks: Sequence[int], rank: int, transport: Transport) -> Tensor:
    """The sum of what `ranks`, of which `rank` is this one, give in tensors of one shape and dtype. A collective call of them.

    Differentiable: the gradient is the sum of the ranks' gradients. Numbers are added in the order of the ranks. Raises
    LostRankError naming the peers that stopped answering.
    """
    summed: Tensor = _AllReduceSum.apply(x, ranks, rank, transport)
    return summed


class _AllReduceSum(torch.autograd.Function):
    """Its own gradient: every rank's sum depends alike on what every rank gave."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Sequence[int], rank: int, transport: Transport) -> Tensor:
        ctx.ranks, ctx.rank, ctx.transport = ranks, rank, transport
        return _summed(x, ranks, rank, transport)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _AllReduceSum.apply(grad, ctx.ranks, ctx.rank, ctx.transport), None, None, None


def _summed(x: Tensor, ranks: Sequence[int], rank: int, transport: Transport) -> Tensor:
    """A part of the numbers is added on each rank, and goes to all others: 2 (1 - 1/R) times the bytes of x, in two exchanges."""
    # the ranks' parts of x and of the sum, and what is given to this rank's part
    sizes = [part.numel() for part in x.reshape(-1).tensor_split(len(ranks))]
    own = sizes[list(ranks).index(rank)]
    nbytes = aligned_bytes(*(2 * [x.nbytes] + len(ranks) * [own * x.element_size()]))
    with ARENAS.borrowed(nbytes, x.device) as arena:
        allocator = ArenaAllocator(arena)
        parts = dict(zip(ranks, allocator.copy_of(x).view(-1).split(sizes), strict=True))
        whole = allocator.tensor(x.shape, x.dtype)
        sums = dict(zip(ranks, whole.view(-1).split(sizes), strict=True))
        given = {peer: parts[rank] if peer == rank else allocator.tensor((own,), x.dtype) for peer in ranks}
        _exchange(parts, given, rank, transport)
        total = sums[rank].zero_()
        for peer in ranks:
            total += given[peer]
        _exchange(dict.fromkeys(ranks, total), sums, rank, transport)
        return whole.clone()


def _exchange(sent: dict[int, Tensor], received: dict[int, Tensor], rank: int, transport: Transport) -> None:
    """One tensor to and one from each other rank; what has no numbers does not travel."""
    sends, receives = (
        [Packet(peer, "sums", tensor) for peer, tensor in tensors.items() if peer != rank and tensor.numel()]
        for tensors in (sent, received)
    )
    transport.exchange(sends, receives, False, "of an all-reduce").wait()
