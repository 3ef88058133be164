"""Sums over the ranks whose tokens make up the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from distattn.parallel.runtime.communicator import sendable_device, timeout_of

if TYPE_CHECKING:
    from distattn.driver.context_parallel import ContextParallel


def sum_over_loss_group(cp: ContextParallel, x: torch.Tensor, what: str) -> torch.Tensor:
    """The sum of a tensor over the loss group, on the tensor's device, without gradient; a collective call.

    what: it is a sum for. Raises LostRankError, which says that, where a rank is lost.
    """
    total = x.detach().clone()
    if cp.loss_group is None:
        return total
    limit = cp.wait_timeout or timeout_of(cp.loss_group)
    cp.begin(what)
    total = total.to(sendable_device(cp.loss_group))
    work = dist.all_reduce(total, group=cp.loss_group, async_op=True)
    cp.guarded(lambda: work.wait(limit), what)
    return total.to(x.device)
