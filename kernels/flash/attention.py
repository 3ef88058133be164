"""Core attention by PyTorch's own variable-length flash attention (FlashAttention 2; 3 and 4 where they are activated).

`torch.nn.attention.activate_flash_attention_impl("FA3")` changes what the operators run; nothing here differs. They are private
to PyTorch (`aten::_flash_attention_forward` and `_backward`); a test watches that their arguments stay. Partial outputs come
in the precision of the inputs, as from every library that merges them. See `pieces` for how masks are said.
"""

# T query rows, S key rows, H query heads, K key/value heads, D head dim of queries, keys and values

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distattn.kernels.flash.pieces import LEAST_STEP, FlashCall, FlashSchedule, flash_schedule
from distattn.kernels.glue import Rows, add_rows, copy_rows, merge_rows
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.merge import output_with_delta
from distattn.kernels.spec import KernelRequirements, ScoreMod

# the operator takes o, not delta; a row with dO = 0 and delta != 0 cannot be told to it
DIFFERENTIABLE_LSE = False
ACCUMULATES = True
DTYPES = (torch.bfloat16, torch.float16)
forward_operator: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)
backward_operator: Any = getattr(torch.ops.aten, "_flash_attention_backward", None)


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Why this kernel cannot serve such a call, or None."""
    if requirements.device.type != "cuda":
        return f"PyTorch's variable-length flash attention runs on GPUs, not on {requirements.device.type}"
    if forward_operator is None or backward_operator is None:
        return "this PyTorch has no variable-length flash attention"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(requirements.device) < (8, 0):
        return "it needs compute capability 8.0 (A100) or later"
    if requirements.dtype not in DTYPES:
        return f"it computes bfloat16 and float16, not {str(requirements.dtype)[6:]}"
    if requirements.head_dim != requirements.v_head_dim or requirements.head_dim % 8 or requirements.head_dim > 256:
        dims = f"{requirements.head_dim} and {requirements.v_head_dim}"
        return f"its head dims are equal multiples of 8 up to 256, not {dims}"
    if requirements.softcap or requirements.alibi:
        return "it has no soft-capping and no ALiBi slopes"
    if requirements.lse:
        return "it has no gradient through the log-sum-exp"
    if 0 < requirements.least_step < LEAST_STEP:
        return f"its masks climb in steps of at least {LEAST_STEP} rows, not {requirements.least_step}"
    return None


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> FlashSchedule:
    """The calls that compute the mask. Raises DistattnError for masks that they cannot say."""
    return flash_schedule(mask)


def forward(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    schedule: FlashSchedule,
    score: ScoreMod,
    into: tuple[Tensor, Tensor] | None = None,
    merge: bool = False,
) -> tuple[Tensor, Tensor]:
    """(o_THD, lse_TH), in fp32 unless `into` is not; rows without keys have o = 0 and lse = -inf.

    into: (o, lse) to write the result to or, with `merge`, to merge it into.
    """
    if into is None:
        o_THD = q_THD.new_empty(q_THD.shape, dtype=torch.float32)
        into = o_THD, q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
    o_THD, lse_TH = into
    # several calls meet in single precision only
    wide_THD = o_THD if o_THD.dtype == torch.float32 else torch.empty_like(o_THD, dtype=torch.float32)
    if wide_THD is not o_THD and merge:
        wide_THD.copy_(o_THD)
    if not merge and not schedule.all_rows:
        wide_THD.zero_()
        lse_TH.fill_(-torch.inf)
    for call in schedule.calls:
        q, k, v = q_THD[call.rows, call.heads], k_SKD[call.keys, call.kv_heads], v_SKD[call.keys, call.kv_heads]
        part, lse_HT, *_ = forward_operator(q, k, v, *_how(call), **_window(call, score))
        # rows without keys have an infinite sum of nothing there
        part_lse = lse_HT.t().masked_fill(lse_HT.t() == torch.inf, -torch.inf)
        o, lse = wide_THD[:, call.heads], lse_TH[:, call.heads]
        for stretch in call.row_stretches:
            rows = Rows(stretch.start, stretch.stop - stretch.start)
            own = Rows(stretch.start - call.rows.start, rows.size)
            if stretch.first and not merge:
                copy_rows(o, rows, part, own)
                copy_rows(lse, rows, part_lse, own)
            else:
                merge_rows(o, lse, rows, part, part_lse, own)
    if wide_THD is not o_THD:
        o_THD.copy_(wide_THD)
    return o_THD, lse_TH


def backward(
    do_THD: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    schedule: FlashSchedule,
    score: ScoreMod,
    into: tuple[Tensor | None, tuple[Tensor, Tensor] | None] = (None, None),
    add: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_THD, dk_SKD, dv_SKD) of these cells, given the final lse and delta = rowsum(dO * O) of each row; fp32, or as `into` is.

    into: dq, and (dk, dv), to write results to; add: whether they are added to what is there, to dq, and to dk and dv.
    """
    places = into[0], *(into[1] or (None, None))
    adds = add[0], add[1], add[1]
    grads = [_single(place, x, adds_) for place, x, adds_ in zip(places, (q_THD, k_SKD, v_SKD), adds, strict=True)]
    reached = schedule.all_rows, schedule.all_keys, schedule.all_keys
    for total, adds_, overwritten in zip(grads, adds, reached, strict=True):
        if not adds_ and not overwritten:
            total.zero_()
    # the true o never travels to where tasks call
    o_THD = output_with_delta(do_THD, delta_TH)
    # weights are exp(score - lse): a row without keys has none
    lse_HT = lse_TH.masked_fill(lse_TH == -torch.inf, torch.inf).t()
    # of dropout, which there is none of
    random = q_THD.new_zeros(2, dtype=torch.uint64), q_THD.new_empty(0, dtype=torch.uint64)
    for call in schedule.calls:
        rows, keys = (call.rows, call.heads), (call.keys, call.kv_heads)
        lse = lse_HT[call.heads, call.rows].contiguous()
        given = do_THD[rows], q_THD[rows], k_SKD[keys], v_SKD[keys], o_THD[rows], lse
        starts = call.starts_q, call.starts_k, call.longest_q, call.longest_k, 0.0, _is_causal(call)
        dq_part, dk_part, dv_part = backward_operator(*given, *starts, *random, **_window(call, score))
        rows_of = call.row_stretches, call.rows.start, call.heads
        keys_of = call.key_stretches, call.keys.start, call.kv_heads
        for number, part, (stretches, first, heads) in (
            (0, dq_part, rows_of),
            (1, dk_part, keys_of),
            (2, dv_part, keys_of),
        ):
            for stretch in stretches:
                at = Rows(stretch.start, stretch.stop - stretch.start)
                # the first to write need not read
                put = copy_rows if stretch.first and not adds[number] else add_rows
                put(grads[number][:, heads], at, part, Rows(stretch.start - first, at.size))
    for place, total in zip(places, grads, strict=True):
        if place is not None and place is not total:
            place.copy_(total)
    return grads[0], grads[1], grads[2]


def _single(place: Tensor | None, like: Tensor, adds: bool) -> Tensor:
    """Where gradients are summed in single precision: the place itself, or a tensor for the meantime."""
    if place is not None and place.dtype == torch.float32:
        return place
    total = like.new_empty(like.shape, dtype=torch.float32)
    return total.copy_(place) if place is not None and adds else total


def _how(call: FlashCall) -> tuple[Any, ...]:
    """Arguments of the forward operator behind q, k and v: no dropout, no debug mask."""
    return call.starts_q, call.starts_k, call.longest_q, call.longest_k, 0.0, _is_causal(call), False


def _is_causal(call: FlashCall) -> bool:
    return (call.left, call.right) == (-1, 0)


def _window(call: FlashCall, score: ScoreMod) -> dict[str, Any]:
    return dict(scale=score.scale, window_size_left=call.left, window_size_right=call.right)
