"""Core attention for Hopper in Gluon (tier B): tile sizes and launches. The kernels are in forward.py and backward.py.

It supports bfloat16 and float16 and head dims 64 and 128 on sm_90. Everything else works as in the plain Triton
kernels: masks, run lists, merging, score modifiers, any lengths and head groups. dQ is summed in no fixed order;
"gluon_split" is deterministic.
"""

# T query rows, S key rows, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16, float32
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from distattn.kernels.gluon.backward import backward_kernel
from distattn.kernels.gluon.forward import forward_kernel
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements, LaunchShape, ScoreMod
from distattn.kernels.split_tiles import split_long_tiles
from distattn.kernels.tile_runs import TileRuns, tile_runs, transposed_runs
from distattn.kernels.triton.attention import row_number_bytes, row_numbers_launch
from distattn.kernels.triton.launch import (
    TMA_LIMIT,
    SplitTileTensors,
    Tile,
    TileRunTensors,
    TritonLaunch,
    call_arguments,
    compute_capability,
    make_launch,
    multiprocessors,
    run_launch,
    split_tile_tensors,
    tensor_arguments,
    tile_run_tensors,
)
from distattn.kernels.triton.sums import part_bytes, scratch_of_parts, sums_launch

DIFFERENTIABLE_LSE = True
ACCUMULATES = True
# tile sizes by head dim. With 128 query rows at a time the backward spills more registers than with 64 (64 rows at head
# dim 128: 35 spills in Triton 3.6, 44 in 3.9)
FORWARD = {64: Tile(192, 128, 4, 3), 128: Tile(128, 128, 4, 2)}
BACKWARD = {64: Tile(64, 128, 4, 3), 128: Tile(64, 128, 4, 3)}
# tiles are assigned in advance if no program gets more than this multiple of the mean work
_UNEVEN = 1.15
# in a job of several ranks, tiles are assigned in advance only below this mean number of key tiles per query tile
_LONG = 64
_TYPES = {torch.bfloat16: bfloat16, torch.float16: float16, torch.float32: float32}


class TileSchedule(NamedTuple):
    """The run lists of both kernels, the number of forward programs, and the map from query heads to KV heads."""

    forward: TileRunTensors
    programs: int
    backward: SplitTileTensors
    group_size: int
    first_head: int


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return why this kernel cannot serve a call with these requirements, or None if it can."""
    if requirements.device.type != "cuda" or compute_capability(requirements.device) != 90:
        return "it is written for Hopper GPUs (sm_90)"
    if requirements.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bfloat16 and float16, not {str(requirements.dtype)[6:]}"
    if requirements.head_dim != requirements.v_head_dim or requirements.head_dim not in FORWARD:
        return f"its head dims are 64 and 128, not {requirements.head_dim} and {requirements.v_head_dim}"
    return None


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> TileSchedule:
    """Return the tile schedule for the mask, with tensors on the host."""
    forward, backward = FORWARD[requirements.head_dim], BACKWARD[requirements.head_dim]
    processors = multiprocessors(requirements.device)
    by_rows = tile_runs(mask, forward.rows, forward.keys)
    by_keys = transposed_runs(mask, backward.keys, backward.rows)
    return TileSchedule(
        tile_run_tensors(by_rows),
        forward_programs(by_rows, forward.keys, processors, mask.overlaps_messages, mask.in_larger_job),
        split_tile_tensors(split_long_tiles(by_keys, mask, backward.rows, processors)),
        mask.group_size,
        mask.first_head,
    )


def forward_programs(
    runs: TileRuns, keys: int, processors: int, overlaps_messages: bool = False, in_larger_job: bool = False
) -> int:
    """Return the number of programs of the forward launch: one per multiprocessor, or one per tile of each head.

    With one per multiprocessor, tiles are assigned in advance, back and forth over the programs. Each tile gets its own program
    if some programs would otherwise get far more work than others, or if messages are in flight: a program needs a
    multiprocessor's whole shared memory, so a program whose multiprocessor is busy with communication would start late and
    still have a full share of the work to do. If messages are merely possible (`in_larger_job`), short tiles are still assigned
    in advance, because a program with several tiles hides their first loads and last writes.
    """
    work = runs.work(keys)[runs.group][:, runs.order].T.ravel()
    programs = min(processors, len(work))
    if overlaps_messages or not programs or (in_larger_job and work.mean() >= _LONG):
        return len(work)
    dealt = np.pad(work, (0, -len(work) % programs)).reshape(-1, programs)
    dealt[1::2] = dealt[1::2, ::-1]
    # with one tile per program, the hardware balances the load: a program starts as soon as a multiprocessor is free
    return programs if dealt.sum(0).max() * programs <= _UNEVEN * work.sum() else len(work)


def forward(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKE: Tensor,
    schedule: TileSchedule,
    score: ScoreMod,
    into: tuple[Tensor, Tensor] | None = None,
    merge: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute (o_THE, lse_TH), in fp32 unless `into` has another dtype. Rows without keys get o = 0 and lse = -inf.

    into: the (o, lse) to write the result to, or with `merge`, to merge it into.
    """
    if into is None:
        o_THE = q_THD.new_empty(*q_THD.shape[:2], v_SKE.shape[2], dtype=torch.float32)
        into = o_THE, q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
    run_launch(forward_launch(q_THD, k_SKD, v_SKE, *into, schedule, score, merge=merge))
    return into


def backward(
    do_THE: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKE: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    schedule: TileSchedule,
    score: ScoreMod,
    into: tuple[Tensor | None, tuple[Tensor, Tensor] | None] = (None, None),
    add: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mask's contribution to (dq_THD, dk_SKD, dv_SKE) from the final lse and delta = rowsum(dO * O).

    into: dq and (dk, dv) to write the results to; None allocates fp32 tensors. add: whether to add to dq, and whether to add to
    dk and dv; otherwise they are overwritten.
    """
    # the kernel accumulates dQ in fp32
    direct = into[0] is not None and into[0].dtype == torch.float32
    dq = into[0] if direct else q_THD.new_empty(q_THD.shape, dtype=torch.float32)
    assert dq is not None
    if not (direct and add[0]):
        dq.zero_()
    dk, dv = into[1] or (x.new_empty(x.shape, dtype=torch.float32) for x in (k_SKD, v_SKE))
    tensors = do_THE, q_THD, k_SKD, v_SKE, lse_TH, delta_TH
    for launch in backward_launch(*tensors, (dq, dk, dv), schedule, score, accumulate=add[1]):
        run_launch(launch)
    if into[0] is not None and not direct:
        into[0].add_(dq) if add[0] else into[0].copy_(dq)
    return dq, dk, dv


def workspace_bytes(direction: str, shape: LaunchShape, schedule: TileSchedule) -> int:
    """Return the bytes that a pass ("forward" or "backward") allocates on the device besides its operands and results."""
    if direction == "forward":
        return 0
    parts = part_bytes(shape, schedule.backward, BACKWARD[shape.head_dim])
    # dQ is accumulated in fp32
    dq = 0 if shape.dq_bytes == 4 else shape.rows * shape.heads * shape.head_dim * 4
    return row_number_bytes(shape) + parts + dq


def forward_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    schedule: TileSchedule,
    score: ScoreMod,
    *,
    merge: bool = False,
) -> TritonLaunch:
    """Return the forward launch. See `triton.attention.forward_launch`."""
    (rows, heads, dim), keys = q.shape, len(k)
    tile = FORWARD[dim]
    arguments = _operands(q=(q, 64), k=(k, tile.keys), v=(v, tile.keys))
    arguments |= tensor_arguments(o=o, lse=lse) | {"slopes_": o if score.slopes_H is None else score.slopes_H}
    arguments |= call_arguments(schedule.forward, rows, keys, heads, schedule.group_size, schedule.first_head, score)
    arguments |= dict(BM=tile.rows, BN=tile.keys, D=dim, E=v.shape[2], STAGES=tile.stages)
    arguments["MERGE"] = merge
    return make_launch(forward_kernel, schedule.programs, arguments, tile)


def backward_launch(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    grads: tuple[Tensor, ...],
    schedule: TileSchedule,
    score: ScoreMod,
    *,
    accumulate: bool = False,
) -> list[TritonLaunch]:
    """Return the backward launches. They add to dq, and with `accumulate` to dk and dv. grads: (dq, dk, dv), dq in fp32."""
    (rows, heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    tile = BACKWARD[dim]
    dq, dk, dv = grads
    numbers, first_launch = row_numbers_launch(lse, delta)
    half = tile.keys // 2
    arguments = _operands(q=(q, tile.rows), do=(do, tile.rows), k=(k, half), v=(v, half))
    arguments |= {"dq_": _descriptor(dq, tile.rows, dim // 2), "dq_head": dq.stride(1)}
    plain = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    arguments["numbers_"] = TensorDescriptor.from_tensor(numbers.flatten(0, 1), [1, tile.rows], plain)
    arguments |= tensor_arguments(dk=dk, dv=dv)
    arguments["slopes_"] = numbers if score.slopes_H is None else score.slopes_H
    split = schedule.backward
    parts = scratch_of_parts(dk, dv, split, tile)
    arguments |= dict(part_=split.part, parts_=parts)
    arguments |= call_arguments(split.runs, rows, keys, heads, schedule.group_size, schedule.first_head, score)
    arguments |= dict(kv_heads=kv_heads, BM=tile.rows, BN=tile.keys, D=dim, E=v.shape[2], STAGES=tile.stages)
    arguments["ACC"] = accumulate
    launches = [first_launch, make_launch(backward_kernel, len(split.runs.order) * kv_heads, arguments, tile)]
    return [*launches, sums_launch(parts, dk, dv, split, accumulate)] if split.slots else launches


def _operands(**tensors: tuple[Tensor, int]) -> dict[str, Any]:
    """Return TMA descriptors and head strides for the operands. tensors: each operand and its tiles' rows, by name."""
    arguments: dict[str, Any] = {}
    for name, (x, block) in tensors.items():
        far = max(x.shape[0], x.shape[1] * abs(x.stride(1))) >= TMA_LIMIT
        if x.stride(2) != 1 or any(stride % 8 for stride in x.stride()[:2]) or x.data_ptr() % 16 or far:
            x = x.clone(memory_format=torch.contiguous_format)
        arguments |= {f"{name}_": _descriptor(x, block, x.shape[2]), f"{name}_head": x.stride(1)}
    return arguments


def _descriptor(x: Tensor, block: int, width: int) -> TensorDescriptor:
    """Return a TMA descriptor of x as a matrix (tokens, heads * dim), with tiles of `block` rows and `width` columns."""
    layout = NVMMASharedLayout.get_default_for([block, width], _TYPES[x.dtype])
    if not x.numel():
        # add a row to an empty tensor, because a descriptor needs at least one; the row is never read
        x = x.new_empty(1, *x.shape[1:])
    columns = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return TensorDescriptor(x, [x.shape[0], columns], [x.stride(0), 1], [block, width], layout)
