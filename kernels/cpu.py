"""CPU kernel: PyTorch's own flash attention for CPU, called once per run of tiles.

A band becomes runs of three kinds: full rectangles, rectangles causal from their top left corner, and row blocks with an
explicit mask (windows, block staircases). Partial results of a row are merged by log-sum-exp. The operators are private
to PyTorch (`aten::_scaled_dot_product_flash_attention_for_cpu` and its backward); a test watches that they stay.
"""

# T query rows, S key rows, H query heads, K key/value heads, D head dim of queries, keys and values

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.ir.bands import BK, BQ, K0, K1, Q0, Q1, areas, clip, row_key_ranges, tighten
from distattn.ir.intervals import Ints
from distattn.kernels.launch_mask import LaunchMask, WrittenRows, split_even_groups
from distattn.kernels.merge import accumulation_dtype, merge_
from distattn.kernels.spec import KernelRequirements, ScoreMod

# the operator takes o, not delta; a row with dO = 0 and delta != 0 cannot be told to it
DIFFERENTIABLE_LSE = False
ACCUMULATES = False
# rows of a block with an explicit mask: small enough that a window wastes little, large enough to amortise a call
_MASKED_ROWS = 256


class SdpaCall(NamedTuple):
    """Rows [q0, q1) of some heads against keys [k0, k1): all of them, causal from the corner, or only those of `band`."""

    heads: slice
    kv_heads: slice

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    band: Ints | None
    # no earlier run of the call has written these rows, these keys, in these heads
    first_rows: bool
    first_keys: bool


class SdpaSchedule(NamedTuple):
    """The runs of a call, and whether fresh ones reach every row and every key."""

    runs: list[SdpaCall]
    all_rows: bool
    all_keys: bool


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Why this kernel cannot serve such a call, or None."""
    if requirements.device.type != "cpu":
        return f"it runs on CPU tensors, not on {requirements.device.type}"
    if requirements.head_dim != requirements.v_head_dim:
        return f"PyTorch's CPU flash attention wants equal head dims, not {requirements.head_dim} and {requirements.v_head_dim}"
    if requirements.softcap or requirements.alibi:
        return "PyTorch's CPU flash attention has no soft-capping and no ALiBi slopes"
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return "this PyTorch has no flash attention for CPU"
    return None


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> SdpaSchedule:
    """The runs that compute these cells."""
    tight = tighten(mask.bands)
    some = tight[:, Q0] < tight[:, Q1]
    parts = [
        (
            slice(low, high),
            slice((mask.first_head + low) // mask.group_size, -(-(mask.first_head + high) // mask.group_size)),
            bands,
        )
        for (h0, h1), bands in _by_heads(mask.band_heads[some], tight[some])
        for low, high in split_even_groups(h0, h1, mask.group_size, mask.first_head)
    ]
    rows = WrittenRows(mask.rows, [0, mask.heads, *(end for heads, *_ in parts for end in (heads.start, heads.stop))])
    keys = WrittenRows(mask.keys, [0, mask.kv_heads, *(end for _, kv, _ in parts for end in (kv.start, kv.stop))])
    runs = []
    for heads, kv_heads, bands in parts:
        for q0, q1, k0, k1, causal, masked in _parts(bands):
            fresh = rows.mark(heads, slice(q0, q1)), keys.mark(kv_heads, slice(k0, k1))
            runs.append(SdpaCall(heads, kv_heads, q0, q1, k0, k1, causal, masked, *fresh))
    # else something must be cleared before
    return SdpaSchedule(runs, rows.unwritten == 0, keys.unwritten == 0)


def _by_heads(band_heads: Ints, bands: Ints) -> Iterator[tuple[tuple[int, int], Ints]]:
    """The bands of each head range."""
    for h0, h1 in sorted(set(map(tuple, band_heads.tolist()))):
        yield (h0, h1), bands[(band_heads == (h0, h1)).all(1)]


def forward(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, schedule: SdpaSchedule, score: ScoreMod
) -> tuple[Tensor, Tensor]:
    """(o_THD, lse_TH) in the accumulation dtype; rows in no run: o = 0, lse = -inf."""
    wide = accumulation_dtype(q_THD.dtype)
    o_THD = _blank(q_THD.shape, wide, 0.0, schedule.all_rows)
    lse_TH = _blank(q_THD.shape[:2], wide, -torch.inf, schedule.all_rows)
    # the operator returns the precision it is given, and partial results must not be rounded before they are summed
    q, k, v = (_heads_first(x.to(wide)) for x in (q_THD, k_SKD, v_SKD))
    for run in schedule.runs:
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, run.heads, run.q0 : run.q1],
            k[:, run.kv_heads, run.k0 : run.k1],
            v[:, run.kv_heads, run.k0 : run.k1],
            0.0,
            run.causal,
            attn_mask=_float_mask(run, q.dtype),
            scale=score.scale,
        )
        part_THD, part_lse_TH = part[0].transpose(0, 1), part_lse[0].transpose(0, 1)
        if len(schedule.runs) == 1 and schedule.all_rows:
            return part_THD, part_lse_TH
        at = slice(run.q0, run.q1), run.heads
        if run.first_rows:
            o_THD[at], lse_TH[at] = part_THD, part_lse_TH
        else:
            merge_(o_THD[at], lse_TH[at], part_THD, part_lse_TH)
    return o_THD, lse_TH


def backward(
    do_THD: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    schedule: SdpaSchedule,
    score: ScoreMod,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_THD, dk_SKD, dv_SKD) of these cells, given the final lse and delta = rowsum(dO * O) of each row."""
    wide = accumulation_dtype(q_THD.dtype)
    dq = _blank(q_THD.shape, wide, 0.0, schedule.all_rows)
    dk, dv = (_blank(x.shape, wide, 0.0, schedule.all_keys) for x in (k_SKD, v_SKD))
    do_THD = do_THD.to(wide)
    q, k, v, do = (_heads_first(x.to(wide)) for x in (q_THD, k_SKD, v_SKD, do_THD))
    o = _heads_first(_stand_in(do_THD, delta_TH))
    lse = lse_TH.transpose(0, 1)[None].contiguous()
    for run in schedule.runs:
        rows, keys = (run.heads, slice(run.q0, run.q1)), (run.kv_heads, slice(run.k0, run.k1))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do[:, *rows],
            q[:, *rows],
            k[:, *keys],
            v[:, *keys],
            o[:, *rows],
            lse[:, *rows],
            0.0,
            run.causal,
            attn_mask=_float_mask(run, q.dtype),
            scale=score.scale,
        )
        dq_part, dk_part, dv_part = (grad[0].transpose(0, 1) for grad in grads)
        if len(schedule.runs) == 1 and schedule.all_rows and schedule.all_keys:
            return dq_part, dk_part, dv_part
        for total, part, fresh in (
            (dq[rows[::-1]], dq_part, run.first_rows),
            (dk[keys[::-1]], dk_part, run.first_keys),
            (dv[keys[::-1]], dv_part, run.first_keys),
        ):
            # the first to write need not read
            total.copy_(part) if fresh else total.add_(part)
    return dq, dk, dv


def _blank(shape: Sequence[int], dtype: torch.dtype, value: float, overwritten: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype) if overwritten else torch.full(shape, value, dtype=dtype)


def _parts(bands: Ints) -> Iterator[tuple[int, int, int, int, bool, Ints | None]]:
    """(q0, q1, k0, k1, causal, band) of the calls that compute tight bands."""
    q0, q1, k0, k1 = bands[:, [Q0, Q1, K0, K1]].T
    whole = areas(bands) == (q1 - q0) * (k1 - k0)
    begin, _ = row_key_ranges(bands, q1 - 1)
    _, end = row_key_ranges(bands, q0)
    # one more key a row, and no key is ever dropped: a full block, then a triangle from its corner
    triangle = (bands[:, [BQ, BK]] == 1).all(1) & (begin == k0)
    kinds = np.stack([q0, q1, k0, k1, whole, triangle, end - 1], 1).tolist()
    for band, (first, last, low, high, full, causal, corner) in zip(bands, kinds, strict=True):
        if full:
            yield first, last, low, high, False, None
        elif causal:
            if corner > low:
                yield first, last, low, corner, False, None
            yield first, last, corner, high, True, None
        else:
            for top in range(first, last, _MASKED_ROWS):
                bottom = min(top + _MASKED_ROWS, last)
                block = tighten(clip(band[None], top, bottom, low, high))[0]
                yield top, bottom, int(block[K0]), int(block[K1]), False, block


def _float_mask(run: SdpaCall, dtype: torch.dtype) -> Tensor | None:
    if run.band is None:
        return None
    q = np.arange(run.q0, run.q1)
    begin, end = (torch.from_numpy(x)[:, None] for x in row_key_ranges(run.band[None].repeat(len(q), 0), q))
    key = torch.arange(run.k0, run.k1)
    return torch.zeros(len(q), len(key), dtype=dtype).masked_fill_((key < begin) | (key >= end), -torch.inf)


def _heads_first(x_THD: Tensor) -> Tensor:
    return x_THD.transpose(0, 1)[None]


def _stand_in(do_THD: Tensor, delta_TH: Tensor) -> Tensor:
    """Some o with rowsum(dO * o) = delta: all the operator uses o for. The true o never travels to where tasks run.

    It is zero but where |dO| of the row is largest, so that nothing overflows and tiny gradients do not vanish.
    """
    at = do_THD.abs().argmax(-1, keepdim=True)
    largest = do_THD.gather(-1, at)
    value = delta_TH[..., None] / largest.masked_fill(largest == 0, 1.0)
    return torch.zeros_like(do_THD).scatter_(-1, at, value)
