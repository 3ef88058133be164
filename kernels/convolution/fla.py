"""Causal depthwise convolutions on GPUs with the kernel from flash-linear-attention (package `fla-core`, our extra `fla`).

Each band of a launch becomes a sequence: it ends at the band's last row, and tokens whose x belongs to another launch
are zeros. Only the results of the band's rows are added to the output.
"""

# T rows, S keys (tokens with an x), P tokens of all sequences, R rows of all bands, H heads of D channels each, W taps

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from fla.modules.causal_conv1d import causal_conv1d
from torch import Tensor

from distattn.ir.bands import K0, K1, Q0, Q1, row_key_ranges
from distattn.ir.op import TOKEN_SHIFT
from distattn.kernels.fla_sequences import sequence_offsets
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.triton.launch import compute_capability
from distattn.kernels.triton.tiles import INTERPRETED

ACCUMULATES = False
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Sequences(NamedTuple):
    """The sequences that one call convolves, for heads [h0, h1).

    ends: end offsets, on the host. offsets: 0 and the ends, as a tensor. key_P: the key of each token, or S for a token without a
    key. token_R, row_R: for each row of the bands, its index among the tokens of all sequences and its index in the launch.
    """

    h0: int
    h1: int
    ends: tuple[int, ...]
    offsets: Tensor
    key_P: Tensor
    token_R: Tensor
    row_R: Tensor


class SequenceSchedule(NamedTuple):
    """All sequences of a launch, and the launch's row and key counts."""

    sequences: tuple[Sequences, ...]
    rows: int
    keys: int


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return why this kernel cannot serve a call with these requirements, or None if it can."""
    device = requirements.device
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the kernels of fla-core run on GPUs, not on {device.type}"
    if device.type == "cuda" and compute_capability(device) < 80:
        return "it needs compute capability 8.0 (A100) or later"
    if requirements.op == TOKEN_SHIFT:
        return "it computes filters, and a shift has none"
    if requirements.grouped:
        return "it computes filters of one channel each, not of groups"
    if requirements.dtype not in _DTYPES:
        return f"it computes bfloat16, float16 and float32, not {str(requirements.dtype)[6:]}"
    return None


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> SequenceSchedule:
    """Return the sequences for each range of heads, with tensors on the host."""
    sequences_by_heads: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for band, (h0, h1), shift in zip(mask.bands, mask.band_heads.tolist(), mask.distance_shift.tolist(), strict=True):
        row = np.arange(int(band[Q0]), int(band[Q1]))
        begin, end = row_key_ranges(band[None].repeat(len(row), 0), row)
        begin, end = np.maximum(begin, band[K0]), np.minimum(end, band[K1])
        row, begin, end = (side[begin < end] for side in (row, begin, end))
        if len(row):
            # the key at distance 0 from each row
            place = row - shift
            key = np.arange(begin.min(), place.max() + 1)
            sequences_by_heads.setdefault((h0, h1), []).append(
                (np.where(key < end.max(), key, mask.keys), place - key[0], row)
            )
    sequences = []
    for (h0, h1), parts in sorted(sequences_by_heads.items()):
        keys, places, rows = zip(*parts, strict=True)
        ends = np.cumsum([len(key) for key in keys])
        token = [place + first for place, first in zip(places, [0, *ends[:-1]], strict=True)]
        lists = (torch.from_numpy(np.concatenate(side)) for side in (keys, token, rows))
        offsets = sequence_offsets(tuple(ends.tolist()))
        sequences.append(Sequences(h0, h1, tuple(ends.tolist()), offsets, *lists))
    return SequenceSchedule(tuple(sequences), mask.rows, mask.keys)


def forward(x_SHD: Tensor, weight_HDW: Tensor, schedule: SequenceSchedule) -> Tensor:
    """Compute y_THD in the accumulation dtype. Rows without cells get 0."""
    y_THD = x_SHD.new_zeros((schedule.rows, *x_SHD.shape[1:]), dtype=accumulation_dtype(x_SHD.dtype))
    for part in schedule.sequences:
        heads = slice(part.h0, part.h1)
        # disable autograd: the inputs may require gradients, but `backward` computes the gradients
        with torch.no_grad():
            y_1PC = _convolved(_gathered(x_SHD[:, heads], part), weight_HDW[heads].flatten(0, 1), part)
        y_RHD = y_1PC[0, part.token_R].unflatten(1, (part.h1 - part.h0, -1))
        y_THD[:, heads].index_add_(0, part.row_R, y_RHD.to(y_THD.dtype))
    return y_THD


def backward(do_THD: Tensor, x_SHD: Tensor, weight_HDW: Tensor, schedule: SequenceSchedule) -> tuple[Tensor, Tensor]:
    """Compute the launch's contribution to (dx_SHD, dweight_HDW) in the accumulation dtype."""
    wide = accumulation_dtype(x_SHD.dtype)
    dx_SHD = x_SHD.new_zeros((schedule.keys + 1, *x_SHD.shape[1:]), dtype=wide)
    dweight_HDW = torch.zeros_like(weight_HDW, dtype=wide)
    for part in schedule.sequences:
        heads = slice(part.h0, part.h1)
        x_1PC = _gathered(x_SHD[:, heads], part).requires_grad_()
        weight_CW = weight_HDW[heads].detach().flatten(0, 1).to(wide).requires_grad_()
        do_1PC = torch.zeros_like(x_1PC)
        do_1PC[0, part.token_R] = do_THD[part.row_R, heads].flatten(1).to(do_1PC.dtype)
        # autograd is disabled inside an operator: enable it for this function only
        with torch.enable_grad():
            y_1PC = _convolved(x_1PC, weight_CW, part)
        dx_1PC, dweight_CW = torch.autograd.grad(y_1PC, [x_1PC, weight_CW], do_1PC)
        # tokens without a key add to the extra last row, which is dropped
        dx_SHD[:, heads].index_add_(0, part.key_P, dx_1PC[0].unflatten(1, (part.h1 - part.h0, -1)).to(wide))
        dweight_HDW[heads] += dweight_CW.unflatten(0, (part.h1 - part.h0, -1))
    return dx_SHD[: schedule.keys], dweight_HDW


def _gathered(x_SHD: Tensor, part: Sequences) -> Tensor:
    """Return the tokens of all sequences, (1, P, channels), with zeros for tokens without a key."""
    x = x_SHD.detach().flatten(1)
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[part.key_P][None]


def _convolved(x_1PC: Tensor, weight_CW: Tensor, part: Sequences) -> Tensor:
    on_host = sequence_offsets(part.ends)
    y_1PC, _ = causal_conv1d(x_1PC, weight_CW, cu_seqlens=part.offsets, cu_seqlens_cpu=on_host)
    return y_1PC
