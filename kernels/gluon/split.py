"""The Gluon forward with the backward of the plain Triton kernels, so that results are bitwise reproducible."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from distattn.kernels.gluon import attention as gluon_attention
from distattn.kernels.gluon.attention import unsupported_reason
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements, LaunchShape, ScoreMod
from distattn.kernels.triton import attention as triton_attention

DIFFERENTIABLE_LSE = True
ACCUMULATES = True
FINISHES = ("backward",)


class SplitTileSchedule(NamedTuple):
    """The schedule of the Gluon forward and that of the plain Triton backward."""

    forward: gluon_attention.TileSchedule
    backward: triton_attention.TileSchedule


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> SplitTileSchedule:
    """Return the tile schedules for the mask, with tensors on the host."""
    return SplitTileSchedule(gluon_attention.prepare(mask, requirements), triton_attention.prepare(mask, requirements))


def forward(
    q: Tensor, k: Tensor, v: Tensor, schedule: SplitTileSchedule, score: ScoreMod, **into: Any
) -> tuple[Tensor, Tensor]:
    """Compute (o, lse). See `gluon.attention.forward`."""
    return gluon_attention.forward(q, k, v, schedule.forward, score, **into)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    schedule: SplitTileSchedule,
    score: ScoreMod,
    **into: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dq, dk, dv). See `triton.attention.backward`."""
    return triton_attention.backward(do, q, k, v, lse, delta, schedule.backward, score, **into)


def workspace_bytes(direction: str, shape: LaunchShape, schedule: SplitTileSchedule) -> int:
    """Return the bytes that a pass allocates. See `triton.attention.workspace_bytes`."""
    return triton_attention.workspace_bytes(direction, shape, schedule.backward)


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
