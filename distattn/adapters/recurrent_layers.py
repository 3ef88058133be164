"""Computations around a batch's recurrence, shared by the recurrent layers of several trainers."""

# T tokens on this rank, H heads of values, G heads of queries and keys, K key dim, V value dim

from __future__ import annotations

import torch
from torch import Tensor

from distattn.batch.local_batch import LocalBatch
from distattn.kernels.merge import accumulation_dtype

# added to the sum of squares, as in flash-linear-attention's kernels
_NORM_EPSILON = 1e-6


def l2norm(x: Tensor) -> Tensor:
    """Divide x by its L2 norm along the last dimension, for queries and keys of delta rules. The result has x's dtype."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _NORM_EPSILON)).to(x.dtype)


def ssd_scan(
    batch: LocalBatch, x_THV: Tensor, dt_TH: Tensor, a_H: Tensor, k_TGK: Tensor, q_TGK: Tensor, skip_H1: Tensor | None
) -> Tensor:
    """Compute Mamba-2's SSD scan with time steps and skip. Returns (T, H, V) in the accumulation dtype, like mamba-ssm's kernels.

    The layer's convolution and gate are not included. dt_TH: time steps. a_H: the factors that turn time steps into the
    logarithms of decays. Both have the accumulation dtype. k_TGK and q_TGK are called B and C in mamba-ssm. skip_H1: the factor
    of x in the result, (H, 1) or (H, V).
    """
    wide = accumulation_dtype(x_THV.dtype)
    v_THV = (x_THV.to(wide) * dt_TH[..., None]).to(x_THV.dtype)
    o_THV = batch.recurrence(q_TGK, k_TGK, v_THV, "ssd", g=a_H * dt_TH, scale=1.0).to(wide)
    return o_THV if skip_H1 is None else o_THV + skip_H1.to(wide) * x_THV.to(wide)
