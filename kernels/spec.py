"""The score of a query and a key, and what a call requires of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from distattn.ir.op import ATTENTION, Op

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ScoreMod(NamedTuple):
    """Score of query q and key k in head h: cap(scale * <q, k>) - slope_h * |q - k|.

    cap(s) = softcap * tanh(s / softcap), or s if softcap is 0. The distance |q - k| is in tokens of the axis, which inside a
    document equals the distance of positions (ALiBi, Press et al. 2022, arXiv 2108.12409). slopes_H: of the call's heads.
    """

    scale: float
    softcap: float = 0.0
    slopes_H: Tensor | None = None

    def for_heads(self, heads: slice) -> ScoreMod:
        """Return the score of a range of the heads."""
        return self if self.slopes_H is None else self._replace(slopes_H=self.slopes_H[heads])


class KernelRequirements(NamedTuple):
    """Requirements of a call: dtype, head dims, device, and modifications of scores.

    lse: gradients flow through the log-sum-exp. least_step: rows of the smallest step of staircase masks, 0 without such
    masks. op: the op to compute. grouped: filters of a convolution mix the channels of a head.
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


# the launches of a pass that `FinalRows` can number
MOST_TURNS = 1 << 15


class FinalRows(NamedTuple):
    """The tensor for finished rows of a result that several launches sum up, and the turn of each row.

    A launch writes the rows that it is the last to add to here, in this tensor's dtype, and all others to the sums, which have
    the same strides. It reads sums only of rows that an earlier launch has written. turns_T: int32, for each row the numbers of the first and the last
    launch that write it, first * MOST_TURNS + last. number: this launch's.
    """

    target_THD: Tensor
    turns_T: Tensor
    number: int


class LaunchShape(NamedTuple):
    """Sizes of the tensors of a kernel launch. dq_bytes: bytes per element of the tensor that dQ is written to."""

    rows: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dq_bytes: int = 4


# type of a kernel's `workspace_bytes`: direction, shape and schedule of a launch -> bytes
Workspace = Callable[[str, LaunchShape, Any], int]
