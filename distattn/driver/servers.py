"""Ranks that only compute attention: `serve`, and the words by which ranks with a model tell them what comes next."""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

from concurrent.futures import Future
from typing import NamedTuple

import torch
import torch.distributed as dist

from distattn.batch.planner import Shape, ShardedBatch
from distattn.driver.control_channel import BACKWARD, FORWARD, OVER, PREPARE, STOP, TELL
from distattn.driver.pool import Heard, Pool
from distattn.ir.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype


class Served(NamedTuple):
    """What a server did: passes it joined, forward and backward."""

    forward: int
    backward: int


def serve(group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> Served:
    """Compute attention for the other ranks of a pool until they close it. For its last ranks, without a model.

    The pool's other ranks make `Pool(group, servers=...)`; everything else this rank is told. Raises DistattnError when they are
    gone without a word, and what their plans raise.
    """
    device = torch.device(device)
    counts = {PREPARE: 0, FORWARD: 0, BACKWARD: 0}
    with Pool.joined(group, device) as pool:
        assert pool.words is not None
        steps: dict[int, Future[Heard]] = {}
        while (word := pool.words.listen()).phase != STOP:
            if word.phase == TELL:
                steps[word.number] = pool.hear()
            elif word.phase == OVER:
                steps.pop(word.number, None)
            else:
                counts[word.phase] += 1
                batch = _batch(steps, word.number)
                if word.phase == PREPARE:
                    batch.ready(word.shape, device)
                else:
                    join(batch, word.phase == FORWARD, word.shape, device, (word.scale, word.softcap))
    return Served(counts[FORWARD], counts[BACKWARD])


def _batch(steps: dict[int, Future[Heard]], number: int) -> ShardedBatch:
    """The batch of that number, of the steps that are not over."""
    for heard in steps.values():
        for batch in _answer(heard).made:
            if batch.number == number:
                return batch
    raise DistattnError(f"batch {number} is of a step that is over, or that nobody has told of.")


def _answer(heard: Future[Heard]) -> Heard:
    try:
        return heard.result()
    except RuntimeError as error:
        raise DistattnError(f"the pool's other ranks are gone: {error}") from None


def join(
    batch: ShardedBatch, forward: bool, shape: Shape, device: torch.device, score: tuple[float, float] = (1.0, 0.0)
) -> None:
    """Take part in one pass of a batch without tokens of one's own. score: scale and soft cap of the others' scores."""
    ready = batch.ready(shape, device)
    dtype = getattr(torch, shape.dtype)

    def nothing(heads: int, *width: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty((0, heads, *width), dtype=dtype, device=device)

    q, k, v = (
        nothing(shape.heads, shape.head_dim),
        nothing(shape.kv_heads, shape.head_dim),
        nothing(shape.kv_heads, shape.v_head_dim),
    )
    with torch.no_grad():
        if forward:
            torch.ops.distattn.forward(q, k, v, None, None, ready.handle, ready.kept, *score)
            return
        o = nothing(shape.heads, shape.v_head_dim)
        lse = torch.empty((shape.heads, 0), dtype=accumulation_dtype(dtype), device=device)
        kept = q.new_empty(ready.kept)
        torch.ops.distattn.backward(o, None, q, k, v, None, None, o, lse, kept, ready.handle, *score)
