"""`serve`, which ranks without a model call to compute attention for the others."""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from distattn.batch.awaited_result import AwaitedResult
from distattn.batch.local_batch import LocalBatch
from distattn.batch.planner import AttentionShape
from distattn.driver.context_parallel import ContextParallel
from distattn.driver.control_channel import (
    ANNOUNCE_STEP,
    BACKWARD,
    CLOSE,
    FORWARD,
    NEW_SHAPE,
    RELEASE_STEP,
    ControlMessage,
)
from distattn.driver.step_exchange import GatheredStep
from distattn.ir.arguments import checked
from distattn.ir.errors import DistattnError
from distattn.kernels.devices import current_device
from distattn.kernels.merge import accumulation_dtype
from distattn.ops.executable import with_device_index


class ServerStats(NamedTuple):
    """The numbers of forward and backward passes that a server took part in."""

    forward: int
    backward: int


@checked
def serve(group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> ServerStats:
    """Compute attention for the other ranks of a group until they close their driver.

    The group's last ranks, which have no model, call this. The other ranks create `ContextParallel(group, servers=...)`, which
    sends the servers all settings. Raise LostRankError if one of them stops answering, and DistattnError if a plan is refused.
    """
    device = with_device_index(device)
    if not (dist.is_available() and dist.is_initialized()):
        raise DistattnError("a server needs torch.distributed; call init_process_group first.")
    counts = {FORWARD: 0, BACKWARD: 0}
    steps: dict[int, AwaitedResult[GatheredStep]] = {}
    with current_device(device), _joined(group) as cp:
        communicators = cp._communicators
        assert communicators is not None and communicators.control is not None
        while (message := communicators.control.receive()).kind != CLOSE:
            if message.kind == ANNOUNCE_STEP:
                steps[message.number] = cp.serve_step()
            elif message.kind == RELEASE_STEP:
                steps.pop(message.number, None)
            else:
                assert message.shape is not None
                batch = _batch(steps, message.number)
                if message.kind == NEW_SHAPE:
                    batch.executable(message.shape, device)
                else:
                    counts[message.kind] += 1
                    join_pass(batch, message, device)
    return ServerStats(counts[FORWARD], counts[BACKWARD])


def join_pass(batch: LocalBatch, message: ControlMessage, device: torch.device) -> None:
    """Take part in a forward or backward pass of a batch without local tokens."""
    shape = message.shape
    assert shape is not None
    executable = batch.executable(shape, device)
    score = message.scale, message.softcap
    q, k, v = (
        _empty(shape, shape.heads, shape.head_dim, device),
        _empty(shape, shape.kv_heads, shape.head_dim, device),
        _empty(shape, shape.kv_heads, shape.v_head_dim, device),
    )
    with torch.no_grad():
        if message.kind == FORWARD:
            torch.ops.distattn.forward(q, k, v, None, None, executable.handle, executable.kept_elements, *score)
            return
        o = _empty(shape, shape.heads, shape.v_head_dim, device)
        lse = torch.empty((0, shape.heads), dtype=accumulation_dtype(q.dtype), device=device)
        kept = q.new_empty(executable.kept_elements)
        torch.ops.distattn.backward(o, None, q, k, v, None, None, o, lse, kept, executable.handle, *score)


def _joined(group: dist.ProcessGroup | None) -> ContextParallel:
    """Return the driver of a server rank, with the other ranks' settings."""
    cp = ContextParallel.__new__(ContextParallel)
    cp._open(group, None, None)
    return cp


def _empty(shape: AttentionShape, heads: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.empty((0, heads, width), dtype=getattr(torch, shape.dtype), device=device)


def _batch(steps: dict[int, AwaitedResult[GatheredStep]], number: int) -> LocalBatch:
    """Find a batch by its number in the steps not yet released. Raise DistattnError if there is no such batch."""
    for step in steps.values():
        for batch in step.result().batches:
            if batch.number == number:
                return batch
    raise DistattnError(f"batch {number} is of a step that is over, or that was not announced.")
