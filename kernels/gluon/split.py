"""The gluon forward with the backward of the plain Triton kernels: results are the same bits every time."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from distattn.kernels.gluon import attention as gluon_attention
from distattn.kernels.gluon.attention import refusal
from distattn.kernels.launch_mask import Cells
from distattn.kernels.spec import Demand, Score
from distattn.kernels.triton import attention as triton_attention

DIFFERENTIABLE_LSE = True
ACCUMULATES = True


class Work(NamedTuple):
    """The lists of both tiers."""

    forward: gluon_attention.Work
    backward: triton_attention.Work


def prepare(cells: Cells, demand: Demand) -> Work:
    """The lists of tiles that compute these cells."""
    return Work(gluon_attention.prepare(cells, demand), triton_attention.prepare(cells, demand))


def forward(q: Tensor, k: Tensor, v: Tensor, work: Work, score: Score, **into: Any) -> tuple[Tensor, Tensor]:
    """See `gluon_attention.forward`."""
    return gluon_attention.forward(q, k, v, work.forward, score, **into)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, work: Work, score: Score, **into: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """See `triton_attention.backward`."""
    return triton_attention.backward(do, q, k, v, lse, delta, work.backward, score, **into)


__all__ = ["ACCUMULATES", "DIFFERENTIABLE_LSE", "backward", "forward", "prepare", "refusal"]
