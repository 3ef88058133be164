"""The score of a query and a key, the requirements that a call places on a kernel, and the shape of a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from distattn.ir.op import ATTENTION, Op

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ScoreMod(NamedTuple):
    """The score of query q and key k in head h: cap(scale * <q, k>) - slope_h * |q - k|.

    cap(s) = softcap * tanh(s / softcap), or s if softcap is 0. The distance |q - k| is counted in tokens on the axis;
    within a document it equals the difference of positions. slopes_H: the ALiBi slopes of the call's heads (Press et
    al. 2022, arXiv 2108.12409).
    """

    scale: float
    softcap: float = 0.0
    slopes_H: Tensor | None = None

    def for_heads(self, heads: slice) -> ScoreMod:
        """Return the score for a range of heads."""
        return self if self.slopes_H is None else self._replace(slopes_H=self.slopes_H[heads])


class KernelRequirements(NamedTuple):
    """What a call requires of a kernel: the dtype, head dims, device and score modifiers to support.

    lse: gradients flow through the log-sum-exp. least_step: the number of rows in the smallest step of staircase masks, or 0 if
    no mask is a staircase. op: the op to compute. grouped: a convolution's filters mix the channels of a head.
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


# maximum number of launches of a pass that `FinalRows` can number
MOST_TURNS = 1 << 15


class FinalRows(NamedTuple):
    """The tensor for finished rows of a result that several launches sum up, and the turn of each row.

    The last launch that adds to a row writes it here, in this tensor's dtype. All other launches write the row to the sums, which
    have the same strides. A launch reads sums only in rows that an earlier launch has written. turns_T: int32, for each row the
    numbers of the first and the last launch that write it, first * MOST_TURNS + last. number: the number of this launch.
    """

    target_THD: Tensor
    turns_T: Tensor
    number: int


class LaunchShape(NamedTuple):
    """The tensor sizes of a kernel launch. dq_bytes: bytes per element of the tensor that receives dQ."""

    rows: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dq_bytes: int = 4


# the type of a kernel's `workspace_bytes`: (direction, shape, schedule) -> bytes
Workspace = Callable[[str, LaunchShape, Any], int]
