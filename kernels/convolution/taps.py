"""Short convolutions in PyTorch on any device, tap by tap over the cells of a launch.

y_t = sum_d weight[W - 1 - d] x_(t - d) for distances d = 0 .. W - 1 inside a document, the same as a grouped
`torch.nn.functional.conv1d` on one document padded with W - 1 zeros in front. A launch computes the taps of its cells;
partial results of a row are added. A weight is (H, D, W), one filter per channel, or (H, D, D, W), from all channels of
a head to all of them. Without a weight every cell has weight 1.
"""

# T rows, S keys (tokens with an x), H heads of D channels each (E for output channels), W taps

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
    """One tap of heads [h0, h1): the rows that have a cell at `distance`, and the key of each row, that many tokens before it."""

    h0: int
    h1: int
    distance: int
    rows: Tensor
    keys: Tensor


class TapSchedule(NamedTuple):
    """All taps of a launch, and the launch's numbers of rows and keys."""

    taps: tuple[TapRows, ...]
    rows: int
    keys: int


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return None: this kernel computes every convolution on every device."""
    return None


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> TapSchedule:
    """Return the rows and keys of each tap, with tensors on the host."""
    rows_by_tap: dict[tuple[int, int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for band, (h0, h1), shift in zip(mask.bands, mask.band_heads.tolist(), mask.distance_shift.tolist(), strict=True):
        row = np.arange(int(band[Q0]), int(band[Q1]))
        begin, end = row_key_ranges(band[None].repeat(len(row), 0), row)
        i, key = expand_ranges(np.maximum(begin, band[K0]), np.minimum(end, band[K1]))
        distance = row[i] - key - shift
        for d in np.unique(distance).tolist():
            chosen = distance == d
            rows_by_tap.setdefault((h0, h1, d), []).append((row[i][chosen], key[chosen]))
    taps = []
    for (h0, h1, d), parts in sorted(rows_by_tap.items()):
        rows, keys = (torch.from_numpy(np.concatenate(side)) for side in zip(*parts, strict=True))
        taps.append(TapRows(h0, h1, d, rows, keys))
    return TapSchedule(tuple(taps), mask.rows, mask.keys)


def forward(x_SHD: Tensor, weight: Tensor | None, schedule: TapSchedule) -> Tensor:
    """Compute y_THD in the accumulation dtype. Rows without cells get 0."""
    wide = accumulation_dtype(x_SHD.dtype)
    x, weight = x_SHD.to(wide), None if weight is None else weight.to(wide)
    y_THD = x.new_zeros((schedule.rows, *x.shape[1:]))
    for tap in schedule.taps:
        heads = slice(tap.h0, tap.h1)
        # a row has at most one cell per distance, so no row is listed twice
        y_THD[tap.rows, heads] += _weighted(x[tap.keys, heads], _of_distance(weight, tap))
    return y_THD


def backward(
    do_THD: Tensor, x_SHD: Tensor, weight: Tensor | None, schedule: TapSchedule
) -> tuple[Tensor, Tensor | None]:
    """Compute the launch's contribution to (dx_SHD, gradient of the weight) in the accumulation dtype."""
    wide = accumulation_dtype(x_SHD.dtype)
    do, x, weight = do_THD.to(wide), x_SHD.to(wide), None if weight is None else weight.to(wide)
    dx_SHD, dweight = torch.zeros_like(x), None if weight is None else torch.zeros_like(weight)
    for tap in schedule.taps:
        heads = slice(tap.h0, tap.h1)
        of_rows, of_weight, total = do[tap.rows, heads], _of_distance(weight, tap), _of_distance(dweight, tap)
        if of_weight is not None and of_weight.dim() == 3:
            of_weight = of_weight.transpose(1, 2)
        dx_SHD[tap.keys, heads] += _weighted(of_rows, of_weight)
        if total is not None:
            of_keys = x[tap.keys, heads]
            # use a product and a sum: einsum is slower when only tokens are summed over
            total += (of_rows * of_keys).sum(0) if total.dim() == 2 else torch.einsum("the,thd->hed", of_rows, of_keys)
    return dx_SHD, dweight


def _of_distance(weight: Tensor | None, tap: TapRows) -> Tensor | None:
    """Return a view of the weight for a tap and the tap's heads, (H, D) or (H, E, D)."""
    return None if weight is None else weight[tap.h0 : tap.h1, ..., weight.shape[-1] - 1 - tap.distance]


def _weighted(x_THD: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x_THD
    return x_THD * weight if weight.dim() == 2 else torch.einsum("thd,hed->the", x_THD, weight)
