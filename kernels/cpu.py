"""CPU kernel: PyTorch's flash attention for CPU, called once per part of a band.

Each band is split into parts of three kinds: full rectangles, rectangles that are causal from their top left corner,
and row blocks with an explicit mask (windows, block staircases). Partial results of a row are merged by log-sum-exp.
The operators are private to PyTorch (`aten::_scaled_dot_product_flash_attention_for_cpu` and its backward). A test
checks that they exist.
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
from distattn.kernels.merge import accumulation_dtype, merge_, output_with_delta
from distattn.kernels.spec import KernelRequirements, ScoreMod

# the operator takes o instead of delta, but in a row with dO = 0, no o gives delta = rowsum(dO * O) != 0
DIFFERENTIABLE_LSE = False
ACCUMULATES = False
# query rows per call with an explicit mask: few enough to waste little work on windows, enough to amortize the call
_MASKED_ROWS = 256


class SdpaCall(NamedTuple):
    """One operator call: rows [q0, q1) attend to keys [k0, k1), either to all, causally from the top-left corner, or as
    `band` says."""

    heads: slice
    kv_heads: slice

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    band: Ints | None
    # True if no earlier call has written these rows (or keys) of these heads
    first_rows: bool
    first_keys: bool


class SdpaSchedule(NamedTuple):
    """The operator calls of a launch, and whether they write every row and every key."""

    calls: list[SdpaCall]
    all_rows: bool
    all_keys: bool


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return why this kernel cannot serve a call with these requirements, or None if it can."""
    if requirements.device.type != "cpu":
        return f"it runs on CPU tensors, not on {requirements.device.type}"
    if requirements.head_dim != requirements.v_head_dim:
        return f"PyTorch's CPU flash attention needs equal head dims, not {requirements.head_dim} and {requirements.v_head_dim}"
    if requirements.softcap or requirements.alibi:
        return "PyTorch's CPU flash attention has no soft-capping and no ALiBi slopes"
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return "this PyTorch has no flash attention for CPU"
    return None


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> SdpaSchedule:
    """Return the operator calls that cover the mask."""
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
    calls = []
    for heads, kv_heads, bands in parts:
        for q0, q1, k0, k1, causal, masked in _parts(bands):
            first_writes = rows.mark(heads, slice(q0, q1)), keys.mark(kv_heads, slice(k0, k1))
            calls.append(SdpaCall(heads, kv_heads, q0, q1, k0, k1, causal, masked, *first_writes))
    # record whether calls write all rows and keys, because other tensors must be cleared first
    return SdpaSchedule(calls, rows.unwritten == 0, keys.unwritten == 0)


def _by_heads(band_heads: Ints, bands: Ints) -> Iterator[tuple[tuple[int, int], Ints]]:
    """Yield each range of heads that has bands, with these bands."""
    for h0, h1 in sorted(set(map(tuple, band_heads.tolist()))):
        yield (h0, h1), bands[(band_heads == (h0, h1)).all(1)]


def forward(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, schedule: SdpaSchedule, score: ScoreMod
) -> tuple[Tensor, Tensor]:
    """Compute (o_THD, lse_TH) in the accumulation dtype. Rows without keys get o = 0 and lse = -inf."""
    wide = accumulation_dtype(q_THD.dtype)
    o_THD = _blank(q_THD.shape, wide, 0.0, schedule.all_rows)
    lse_TH = _blank(q_THD.shape[:2], wide, -torch.inf, schedule.all_rows)
    # the operator's results have its inputs' dtype, but partial results must not be rounded before they are summed
    q, k, v = (_heads_first(x.to(wide)) for x in (q_THD, k_SKD, v_SKD))
    for call in schedule.calls:
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, call.heads, call.q0 : call.q1],
            k[:, call.kv_heads, call.k0 : call.k1],
            v[:, call.kv_heads, call.k0 : call.k1],
            0.0,
            call.causal,
            attn_mask=_float_mask(call, q.dtype),
            scale=score.scale,
        )
        part_THD, part_lse_TH = part[0].transpose(0, 1), part_lse[0].transpose(0, 1)
        if len(schedule.calls) == 1 and schedule.all_rows:
            return part_THD, part_lse_TH
        at = slice(call.q0, call.q1), call.heads
        if call.first_rows:
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
    """Compute the launch's contribution to (dq_THD, dk_SKD, dv_SKD) from the final lse and delta = rowsum(dO * O)."""
    wide = accumulation_dtype(q_THD.dtype)
    dq = _blank(q_THD.shape, wide, 0.0, schedule.all_rows)
    dk, dv = (_blank(x.shape, wide, 0.0, schedule.all_keys) for x in (k_SKD, v_SKD))
    do_THD = do_THD.to(wide)
    q, k, v, do = (_heads_first(x.to(wide)) for x in (q_THD, k_SKD, v_SKD, do_THD))
    o = _heads_first(output_with_delta(do_THD, delta_TH))
    lse = lse_TH.transpose(0, 1)[None].contiguous()
    for call in schedule.calls:
        rows, keys = (call.heads, slice(call.q0, call.q1)), (call.kv_heads, slice(call.k0, call.k1))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do[:, *rows],
            q[:, *rows],
            k[:, *keys],
            v[:, *keys],
            o[:, *rows],
            lse[:, *rows],
            0.0,
            call.causal,
            attn_mask=_float_mask(call, q.dtype),
            scale=score.scale,
        )
        dq_part, dk_part, dv_part = (grad[0].transpose(0, 1) for grad in grads)
        if len(schedule.calls) == 1 and schedule.all_rows and schedule.all_keys:
            return dq_part, dk_part, dv_part
        for total, part, first_write in (
            (dq[rows[::-1]], dq_part, call.first_rows),
            (dk[keys[::-1]], dk_part, call.first_keys),
            (dv[keys[::-1]], dv_part, call.first_keys),
        ):
            # overwrite in a first write, which saves reading the old contents
            total.copy_(part) if first_write else total.add_(part)
    return dq, dk, dv


def _blank(shape: Sequence[int], dtype: torch.dtype, value: float, overwritten: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype) if overwritten else torch.full(shape, value, dtype=dtype)


def _parts(bands: Ints) -> Iterator[tuple[int, int, int, int, bool, Ints | None]]:
    """Yield (q0, q1, k0, k1, causal, band) for each operator call needed to compute tight bands."""
    q0, q1, k0, k1 = bands[:, [Q0, Q1, K0, K1]].T
    whole = areas(bands) == (q1 - q0) * (k1 - k0)
    begin, _ = row_key_ranges(bands, q1 - 1)
    _, end = row_key_ranges(bands, q0)
    # if each row attends to the keys of the row above and one more, use a full block, and a triangle to the right of it
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


def _float_mask(call: SdpaCall, dtype: torch.dtype) -> Tensor | None:
    if call.band is None:
        return None
    q = np.arange(call.q0, call.q1)
    begin, end = (torch.from_numpy(x)[:, None] for x in row_key_ranges(call.band[None].repeat(len(q), 0), q))
    key = torch.arange(call.k0, call.k1)
    return torch.zeros(len(q), len(key), dtype=dtype).masked_fill_((key < begin) | (key >= end), -torch.inf)


def _heads_first(x_THD: Tensor) -> Tensor:
    return x_THD.transpose(0, 1)[None]
