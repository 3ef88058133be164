"""Core attention with PyTorch's variable-length flash attention (FlashAttention 2; 3 and 4 if they are activated).

`torch.nn.attention.activate_flash_attention_impl("FA3")` changes the operators' implementation. This module then only
differs in which calls it accepts. The operators are private to PyTorch (`aten::_flash_attention_forward` and
`_backward`); a test checks their arguments. Partial outputs have the inputs' precision, as in every library that merges
them. The operators accept only one head dim: if values have a different one from queries and keys (MLA: 128 and 192),
the narrower tensors are padded with zeros. `pieces` describes how masks are expressed.
"""

# T query rows, S key rows, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distattn.kernels.flash.pieces import LEAST_STEP, FlashCall, FlashSchedule, flash_schedule
from distattn.kernels.glue import RowSelection, add_rows, copy_rows, merge_rows
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.merge import output_with_delta
from distattn.kernels.spec import KernelRequirements, LaunchShape, ScoreMod
from distattn.kernels.triton.launch import multiprocessors

# the operator takes o instead of delta, but in a row with dO = 0, no o gives delta = rowsum(dO * O) != 0
DIFFERENTIABLE_LSE = False
ACCUMULATES = True
DTYPES = (torch.bfloat16, torch.float16)
# FlashAttention 3 splits keys into at most this many parts
_MOST_KEY_PARTS = 128
forward_operator: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)
backward_operator: Any = getattr(torch.ops.aten, "_flash_attention_backward", None)


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return why this kernel cannot serve a call with these requirements, or None if it can."""
    if requirements.device.type != "cuda":
        return f"PyTorch's variable-length flash attention runs on GPUs, not on {requirements.device.type}"
    if forward_operator is None or backward_operator is None:
        return "this PyTorch has no variable-length flash attention"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(requirements.device) < (8, 0):
        return "it needs compute capability 8.0 (A100) or later"
    if requirements.dtype not in DTYPES:
        return f"it computes bfloat16 and float16, not {str(requirements.dtype)[6:]}"
    dims = requirements.head_dim, requirements.v_head_dim
    if any(dim % 8 or dim > 256 for dim in dims):
        return f"its head dims must be multiples of 8 up to 256, not {dims[0]} and {dims[1]}"
    if why_not := _implementation_reason(implementation(), requirements.device, max(dims)):
        return why_not
    if requirements.softcap or requirements.alibi:
        return "it has no soft-capping and no ALiBi slopes"
    if requirements.lse:
        return "it has no gradient through the log-sum-exp"
    if 0 < requirements.least_step < LEAST_STEP:
        return f"its masks must climb in steps of at least {LEAST_STEP} rows, not {requirements.least_step}"
    return None


def implementation() -> str:
    """Return the active implementation: "FA2", or the one set by `torch.nn.attention.activate_flash_attention_impl`."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return (current and current()) or "FA2"


def _implementation_reason(name: str, device: torch.device, dim: int) -> str | None:
    """Return why an activated implementation cannot serve a call, or None if it can. The limits are in
    `torch/nn/attention/_fa3.py`, `_fa4.py`."""
    if name not in ("FA3", "FA4") or not torch.cuda.is_available():
        return None
    major = torch.cuda.get_device_capability(device)[0]
    if name == "FA3" and major != 9:
        return "FA3, which is activated, runs on Hopper GPUs (sm_90)"
    if name == "FA4" and major not in (9, 10):
        return "FA4, which is activated, runs on GPUs of compute capability 9 and 10"
    if name == "FA4" and major == 10 and dim > 128:
        return f"FA4, which is activated, takes head dims up to 128 on this GPU, not {dim}"
    return None


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> FlashSchedule:
    """Return the operator calls that cover the mask. Raise DistattnError for masks that they cannot express."""
    return flash_schedule(mask)


def forward(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKE: Tensor,
    schedule: FlashSchedule,
    score: ScoreMod,
    into: tuple[Tensor, Tensor] | None = None,
    merge: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute (o_THE, lse_TH), in fp32 unless `into` has a different dtype. Rows without keys get o = 0 and lse = -inf.

    into: the (o, lse) to write the result to or, if `merge` is set, to merge it into.
    """
    dim = v_SKE.shape[2]
    if into is None:
        o_THE = q_THD.new_empty(*q_THD.shape[:2], dim, dtype=torch.float32)
        into = o_THE, q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
    o_THE, lse_TH = into
    # results of several calls are always merged in fp32
    wide_THE = o_THE if o_THE.dtype == torch.float32 else torch.empty_like(o_THE, dtype=torch.float32)
    if wide_THE is not o_THE and merge:
        wide_THE.copy_(o_THE)
    if not merge and not schedule.all_rows:
        wide_THE.zero_()
        lse_TH.fill_(-torch.inf)
    q_all, k_all, v_all = _of_one_dim(q_THD, k_SKD, v_SKE)
    for call in schedule.calls:
        q, k, v = q_all[call.rows, call.heads], k_all[call.keys, call.kv_heads], v_all[call.keys, call.kv_heads]
        part, lse_HT, *_ = forward_operator(q, k, v, *_how(call), **_window(call, score))
        part = part[..., :dim]
        # the operator returns lse = +inf for rows without keys
        part_lse = lse_HT.t().masked_fill(lse_HT.t() == torch.inf, -torch.inf)
        o, lse = wide_THE[:, call.heads], lse_TH[:, call.heads]
        for segment in call.row_segments:
            rows = RowSelection(segment.start, segment.stop - segment.start)
            part_rows = RowSelection(segment.start - call.rows.start, rows.size)
            if segment.first and not merge:
                copy_rows(o, rows, part, part_rows)
                copy_rows(lse, rows, part_lse, part_rows)
            else:
                merge_rows(o, lse, rows, part, part_lse, part_rows)
    if wide_THE is not o_THE:
        o_THE.copy_(wide_THE)
    return o_THE, lse_TH


def backward(
    do_THE: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKE: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    schedule: FlashSchedule,
    score: ScoreMod,
    into: tuple[Tensor | None, tuple[Tensor, Tensor] | None] = (None, None),
    add: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mask's contribution to (dq_THD, dk_SKD, dv_SKE) from the final lse and delta = rowsum(dO * O).

    into: dq and (dk, dv) to write the results to; None allocates fp32 tensors. add: whether to add to dq, and whether to add to
    dk and dv; otherwise they are overwritten.
    """
    places = into[0], *(into[1] or (None, None))
    adds = add[0], add[1], add[1]
    grads = [_single(place, x, adds_) for place, x, adds_ in zip(places, (q_THD, k_SKD, v_SKE), adds, strict=True)]
    reached = schedule.all_rows, schedule.all_keys, schedule.all_keys
    for total, adds_, overwritten in zip(grads, adds, reached, strict=True):
        if not adds_ and not overwritten:
            total.zero_()
    # the rank that computes a task receives delta instead of o: construct an o with the same delta
    o_THE = output_with_delta(do_THE, delta_TH)
    do_all, q_all, k_all, v_all, o_all = _of_one_dim(do_THE, q_THD, k_SKD, v_SKE, o_THE)
    # weights are exp(score - lse), and must be 0 in a row without keys
    lse_HT = lse_TH.masked_fill(lse_TH == -torch.inf, torch.inf).t()
    # the operator expects RNG state for dropout, which is disabled
    random = q_THD.new_zeros(2, dtype=torch.uint64), q_THD.new_empty(0, dtype=torch.uint64)
    for call in schedule.calls:
        rows, keys = (call.rows, call.heads), (call.keys, call.kv_heads)
        lse = lse_HT[call.heads, call.rows].contiguous()
        inputs = do_all[rows], q_all[rows], k_all[keys], v_all[keys], o_all[rows], lse
        starts = call.starts_q, call.starts_k, call.longest_q, call.longest_k, 0.0, _is_causal(call)
        dq_part, dk_part, dv_part = backward_operator(*inputs, *starts, *random, **_window(call, score))
        rows_of = call.row_segments, call.rows.start, call.heads
        keys_of = call.key_segments, call.keys.start, call.kv_heads
        for number, part, (segments, first, heads) in (
            (0, dq_part, rows_of),
            (1, dk_part, keys_of),
            (2, dv_part, keys_of),
        ):
            for segment in segments:
                target_rows = RowSelection(segment.start, segment.stop - segment.start)
                # overwrite in a first write, which saves reading the old contents
                put = copy_rows if segment.first and not adds[number] else add_rows
                total = grads[number]
                put(
                    total[:, heads],
                    target_rows,
                    part[..., : total.shape[2]],
                    RowSelection(segment.start - first, target_rows.size),
                )
    for place, total in zip(places, grads, strict=True):
        if place is not None and place is not total:
            place.copy_(total)
    return grads[0], grads[1], grads[2]


def workspace_bytes(direction: str, shape: LaunchShape, schedule: FlashSchedule) -> int:
    """Return an upper bound on the bytes that a pass allocates on the device besides its operands and results.

    The bound covers the allocations of this module and of the operators. FlashAttention 2 (`mha_varlen_fwd` and
    `mha_varlen_bwd` in PyTorch's `aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`) allocates dQ in
    fp32 and softmax_d, both with 128 extra rows per sequence, and dK and dV for every query head. It splits keys only
    in calls with one query row. FlashAttention 3 (`mha_fwd` and `mha_bwd` in `hopper/flash_api.cpp` of
    Dao-AILab/flash-attention) also rounds the total number of rows up to full blocks. It allocates fp32 accumulators
    for dK and dV, a second log-sum-exp and semaphores, and in the forward pass fp32 partial results for each part of
    the keys. The allocations of FlashAttention 4 are unknown.
    """
    widest = max(shape.head_dim, shape.v_head_dim)
    rows, keys = shape.rows * shape.heads, shape.keys * shape.kv_heads
    # 16-bit copies of the operands, padded to the wider head dim
    padded = 0 if shape.head_dim == shape.v_head_dim else 2 * widest * (rows + 2 * keys)
    calls = [_call_bytes(direction, call, widest) for call in schedule.calls]
    # a call's results stay alive until the next call has returned its results
    of_calls = 2 * max((results for results, _ in calls), default=0) + max((other for _, other in calls), default=0)
    if direction == "forward":
        return 4 * rows * shape.v_head_dim + padded + of_calls
    sums = 4 * ((shape.dq_bytes != 4) * rows * shape.head_dim + keys * (shape.head_dim + shape.v_head_dim))
    # fp32 temporaries and the 16-bit result of `output_with_delta`, padded o and dO, the log-sum-exp and its mask
    outputs = rows * (3 * 4 * shape.v_head_dim + 2 * 2 * widest + 4 + 1)
    return sums + outputs + padded + of_calls


def _call_bytes(direction: str, call: FlashCall, dim: int) -> tuple[int, int]:
    """Return the bytes of a call's results, and the bytes of the other memory that it holds until it returns."""
    heads, kv_heads = call.heads.stop - call.heads.start, call.kv_heads.stop - call.kv_heads.start
    rows, keys = call.rows.stop - call.rows.start, call.keys.stop - call.keys.start
    # every call allocates two integers of RNG state, in blocks of 512 bytes
    few = 2 * 512
    if direction == "forward":
        # fp32 partial results for each part of the keys
        parts = _key_parts(call, dim)
        of_parts = (parts > 1) * parts * rows * heads * 4 * (dim + 1) + 4 * (len(call.starts_q) + 1)
        # results: o, the log-sum-exp and its masked copy
        return rows * heads * (2 * dim + 4 + 4), rows * heads * 2 + few + of_parts
    sequences = len(call.starts_q) - 1
    rounded = -(-dim // 64) * 64
    # add one block of rows per sequence, and one for rounding
    long_rows, long_keys = rows + 128 * (sequences + 1), keys + 128 * (sequences + 1)
    # one semaphore per block of each sequence, counted as if all sequences were as long as the longest: for dQ and, in
    # deterministic mode, for dK and dV
    semaphores = 4 * sequences * (-(-call.longest_q // 64) * heads + 2 * -(-call.longest_k // 64) * kv_heads)
    # under torch.use_deterministic_algorithms, several groups of programs each accumulate their own dQ
    splits = 1
    if torch.are_deterministic_algorithms_enabled():
        splits = -(-multiprocessors(call.starts_q.device) // (sequences * heads))
    of_rows = long_rows * heads * 4 * (splits * rounded + 2)
    of_keys = 0 if heads == kv_heads else 2 * max(keys * heads * 2 * dim, long_keys * kv_heads * 4 * rounded)
    results = 2 * dim * (rows * heads + 2 * keys * kv_heads) + 4 * long_rows * heads
    return results, of_rows + of_keys + semaphores + 4 * rows * heads + few


def _key_parts(call: FlashCall, dim: int) -> int:
    """Return an upper bound on the number of parts that FlashAttention 3 splits keys into in the forward pass.

    It is 1 if keys are not split. The rule follows `get_num_splits` (`hopper/flash_api.cpp`) and `num_splits_heuristic`
    (`hopper/heuristics.h`). PyTorch relies on them except in deterministic mode (`torch/nn/attention/_fa3.py`).
    """
    if implementation() != "FA3" or torch.are_deterministic_algorithms_enabled():
        return 1
    heads, kv_heads = call.heads.stop - call.heads.start, call.kv_heads.stop - call.kv_heads.start
    processors = multiprocessors(call.starts_q.device)
    # keys and values of a head that exceed the L2 cache are split into parts that fit in it
    part_counts = [1] if _is_causal(call) else [-(-4 * dim * call.longest_k // (50 << 20))]
    # the kernel uses 64, 128 or 192 query rows per block, and at least 64 keys
    for block in (64, 128, 192):
        blocks = kv_heads * -(-call.longest_q * (heads // kv_heads) // block)
        most = min(_MOST_KEY_PARTS, processors, -(-call.longest_k // 64))
        if blocks < 0.8 * processors and most > 1:
            # an upper bound on the rule's result: the first number of parts that keeps at least 85 % of the
            # multiprocessors busy
            waves = ((parts, blocks * parts / processors) for parts in range(1, most + 1))
            part_counts.append(next((parts for parts, w in waves if w >= 0.85 * math.ceil(w)), most))
    return min(max(part_counts), _MOST_KEY_PARTS)


def _single(place: Tensor | None, like: Tensor, adds: bool) -> Tensor:
    """Return a tensor in which to accumulate gradients in fp32: `place` if it is in fp32, otherwise a temporary tensor."""
    if place is not None and place.dtype == torch.float32:
        return place
    total = like.new_empty(like.shape, dtype=torch.float32)
    return total.copy_(place) if place is not None and adds else total


def _of_one_dim(*tensors: Tensor) -> list[Tensor]:
    """Pad the last dimension of all tensors with zeros to the widest tensor's."""
    dim = max(x.shape[2] for x in tensors)
    return [x if x.shape[2] == dim else torch.nn.functional.pad(x, (0, dim - x.shape[2])) for x in tensors]


def _how(call: FlashCall) -> tuple[Any, ...]:
    """Return the forward operator's arguments after q, k and v, with dropout and the debug mask disabled."""
    return call.starts_q, call.starts_k, call.longest_q, call.longest_k, 0.0, _is_causal(call), False


def _is_causal(call: FlashCall) -> bool:
    return (call.left, call.right) == (-1, 0)


def _window(call: FlashCall, score: ScoreMod) -> dict[str, Any]:
    return dict(scale=score.scale, window_size_left=call.left, window_size_right=call.right)
