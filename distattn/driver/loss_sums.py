"""Sums over the ranks whose tokens make up the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from distattn.parallel.runtime.communication.communicator import sendable_device, timeout_of

if TYPE_CHECKING:
    from distattn.driver.context_parallel import ContextParallel


def sum_over_loss_group(cp: ContextParallel, x: torch.Tensor, purpose: str) -> torch.Tensor:
    """Sum a tensor over the loss group, without gradient; return the sum on the tensor's device. A collective call.

    purpose: what the sum is for. If a rank is lost, raise LostRankError, which names the purpose.
    """
    total = x.detach().clone()
    if cp.loss_group is None:
        return total
    limit = cp.wait_timeout or timeout_of(cp.loss_group)
    cp.begin(purpose)
    total = total.to(sendable_device(cp.loss_group))
    work = dist.all_reduce(total, group=cp.loss_group, async_op=True)
    cp.guarded(lambda: work.wait(limit), purpose)
    return total.to(x.device)
