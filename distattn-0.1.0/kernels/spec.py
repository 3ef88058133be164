"""How a score is made from a query and a key, and what a call requires of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from distattn.ir.op import ATTENTION, Op

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ScoreMod(NamedTuple):
    """The score of query q and key k in head h: cap(scale * <q, k>) - slope_h * |q - k|.

    cap(s) = softcap * tanh(s / softcap), or s where softcap is 0. The distance |q - k| is in tokens of the axis, which
    inside a document is that of positions (ALiBi, Press et al. 2022, arXiv 2108.12409); slopes_H of the heads at hand.
    """

    scale: float
    softcap: float = 0.0
    slopes_H: Tensor | None = None

    def for_heads(self, heads: slice) -> ScoreMod:
        """The same for a range of the heads."""
        return self if self.slopes_H is None else self._replace(slopes_H=self.slopes_H[heads])


class KernelRequirements(NamedTuple):
    """What a call requires of a kernel: dtype, head dims, device, and which changes of scores.

    lse: whether gradients go through the log-sum-exp. least_step: rows of the lowest step of its masks, where they climb in
    steps; 0 where they do not. op: what is computed. grouped: filters of a convolution mix the channels of a head.
    """

    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    device: torch.device
    softcap: bool = False
    alibi: bool = False
    lse: bool = False
    least_step: int = 0
    op: Op = ATTENTION
    grouped: bool = False


class LaunchShape(NamedTuple):
    """How large the tensors of a kernel launch are; dq_bytes: of one number of the tensor that dQ is written to."""

    rows: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dq_bytes: int = 4


# a kernel's `workspace_bytes`: direction, shape and schedule of a launch
Workspace = Callable[[str, LaunchShape, Any], int]
