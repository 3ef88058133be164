"""A kernel for meta tensors. It builds Triton's tile lists and returns results of the right shapes, as the GPU kernels
do.
"""

import torch

from distattn.kernels.triton.attention import prepare_tiles, scratch_of_numbers, tiles_for, workspace_bytes
from distattn.kernels.triton.sums import scratch_of_parts

__all__ = [
    "ACCUMULATES",
    "DIFFERENTIABLE_LSE",
    "FINISHES",
    "backward",
    "forward",
    "prepare",
    "unsupported_reason",
    "workspace_bytes",
]

DIFFERENTIABLE_LSE = ACCUMULATES = True
FINISHES = ("forward", "backward")
CAPABILITY, PROCESSORS = 90, 132
# the directions of the calls, in order
CALLS: list[str] = []


def unsupported_reason(requirements):
    return None


def prepare(mask, requirements):
    return prepare_tiles(mask, tiles_for(requirements, CAPABILITY), PROCESSORS)


def forward(q, k, v, schedule, score, into=None, merge=False, final=None):
    assert all(column.device == q.device for column in schedule.forward)
    CALLS.append("forward")
    if into is None:
        o = q.new_empty(*q.shape[:2], v.shape[2], dtype=torch.float32)
        return o, q.new_empty(q.shape[:2], dtype=torch.float32)
    return into


def backward(do, q, k, v, lse, delta, schedule, score, into=(None, None), add=(False, False), final=None):
    CALLS.append("backward")
    dq = q.new_empty(q.shape, dtype=torch.float32) if into[0] is None else into[0]
    dk, dv = into[1] or (x.new_empty(x.shape, dtype=torch.float32) for x in (k, v))
    scratch = scratch_of_numbers(lse), scratch_of_parts(dk, dv, schedule.dkdv, schedule.tiles.dkdv)
    assert all(x.device == q.device for x in scratch)
    return dq, dk, dv
