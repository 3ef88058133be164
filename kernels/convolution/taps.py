"""Causal depthwise convolution on any device in PyTorch: tap by tap, over the cells of a launch.

y_t = sum_d weight[W - 1 - d] x_(t - d) for distances d = 0 .. W - 1 inside a document, as `torch.nn.functional.conv1d` with
groups computes it on one document with W - 1 zeros before it. A launch computes the taps of its cells; parts of a row are added.
"""

# T rows, S keys (tokens whose x is there), H heads of D channels each, W taps

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.ir.bands import K0, K1, Q0, Q1, row_key_ranges
from distattn.ir.intervals import expand_ranges
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.spec import KernelRequirements

ACCUMULATES = False


class TapRows(NamedTuple):
    """For some heads and one distance: the rows, and the key that many tokens before each of them."""

    h0: int
    h1: int
    distance: int
    rows: Tensor
    keys: Tensor


class TapSchedule(NamedTuple):
    """All taps of a launch, and the shape of its results."""

    taps: tuple[TapRows, ...]
    rows: int
    keys: int


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> TapSchedule:
    """The rows of each tap."""
    found: dict[tuple[int, int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for band, (h0, h1), shift in zip(mask.bands, mask.band_heads.tolist(), mask.distance_shift.tolist(), strict=True):
        row = np.arange(int(band[Q0]), int(band[Q1]))
        begin, end = row_key_ranges(band[None].repeat(len(row), 0), row)
        i, key = expand_ranges(np.maximum(begin, band[K0]), np.minimum(end, band[K1]))
        distance = row[i] - key - shift
        for d in np.unique(distance).tolist():
            chosen = distance == d
            found.setdefault((h0, h1, d), []).append((row[i][chosen], key[chosen]))
    taps = []
    for (h0, h1, d), parts in sorted(found.items()):
        rows, keys = (torch.from_numpy(np.concatenate(side)) for side in zip(*parts, strict=True))
        taps.append(TapRows(h0, h1, d, rows, keys))
    return TapSchedule(tuple(taps), mask.rows, mask.keys)


def forward(x_SHD: Tensor, weight_HDW: Tensor, schedule: TapSchedule) -> Tensor:
    """y_THD in the accumulation dtype; rows without a cell are 0."""
    wide = accumulation_dtype(x_SHD.dtype)
    x, weight = x_SHD.to(wide), weight_HDW.to(wide)
    y_THD = x.new_zeros((schedule.rows, *x.shape[1:]))
    for tap in schedule.taps:
        heads = slice(tap.h0, tap.h1)
        # a row has one cell at each distance, so that nothing is added twice
        y_THD[tap.rows, heads] += x[tap.keys, heads] * _of_distance(weight, tap)[heads]
    return y_THD


def backward(do_THD: Tensor, x_SHD: Tensor, weight_HDW: Tensor, schedule: TapSchedule) -> tuple[Tensor, Tensor]:
    """(dx_SHD, dweight_HDW) of these cells, in the accumulation dtype."""
    wide = accumulation_dtype(x_SHD.dtype)
    do, x, weight = do_THD.to(wide), x_SHD.to(wide), weight_HDW.to(wide)
    dx_SHD, dweight_HDW = torch.zeros_like(x), torch.zeros_like(weight)
    for tap in schedule.taps:
        heads = slice(tap.h0, tap.h1)
        of_rows = do[tap.rows, heads]
        dx_SHD[tap.keys, heads] += of_rows * _of_distance(weight, tap)[heads]
        _of_distance(dweight_HDW, tap)[heads] += (of_rows * x[tap.keys, heads]).sum(0)
    return dx_SHD, dweight_HDW


def _of_distance(weight_HDW: Tensor, tap: TapRows) -> Tensor:
    return weight_HDW[..., weight_HDW.shape[-1] - 1 - tap.distance]
