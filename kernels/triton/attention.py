"""Core attention in plain Triton (tier A): tile sizes and launches. The kernels are in forward.py and backward.py.

It runs on NVIDIA GPUs from sm_80 on and, for tests, on the CPU in Triton's interpreter (TRITON_INTERPRET=1). Lengths,
runs and strides are run-time arguments, so a new batch never triggers a compilation.
"""

# T query rows, S key rows, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import FinalRows, KernelRequirements, LaunchShape, ScoreMod
from distattn.kernels.split_tiles import split_long_tiles
from distattn.kernels.tile_runs import tile_runs, transposed_runs
from distattn.kernels.triton.backward import dkdv_kernel, dq_kernel, row_numbers_kernel
from distattn.kernels.triton.forward import forward_kernel
from distattn.kernels.triton.launch import (
    TMA_LIMIT,
    SplitTileTensors,
    Tile,
    TileRunTensors,
    TritonLaunch,
    call_arguments,
    compute_capability,
    final_arguments,
    make_launch,
    multiprocessors,
    run_launch,
    split_tile_tensors,
    tensor_arguments,
    tile_run_tensors,
)
from distattn.kernels.triton.sums import part_bytes, scratch_of_parts, sums_launch
from distattn.kernels.triton.tiles import INTERPRETED

DIFFERENTIABLE_LSE = True
ACCUMULATES = True
FINISHES = ("forward", "backward")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tiles(NamedTuple):
    """The tile sizes of the three kernels."""

    forward: Tile
    dkdv: Tile
    dq: Tile


# keys: the largest D + E that a row of the table serves. These tile sizes did best in the compile lint, whose budgets record
# the remaining spills in loops
_HALF_90 = {
    128: Tiles(Tile(128, 128, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
    192: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 3), Tile(128, 64, 8, 3)),
    256: Tiles(Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3)),
    320: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2)),
    384: Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(128, 32, 8, 3)),
    512: Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(128, 32, 8, 2)),
}
# tile sizes for sm_80, which has less shared memory and no TMA
_HALF_80 = {
    128: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    192: Tiles(Tile(128, 64, 8, 3), Tile(32, 64, 4, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    320: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    384: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    512: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}
_SINGLE = {
    128: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    512: Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1)),
}
# rows per program of `row_numbers_kernel`; no tile has more rows
_ROW_BLOCK = 256


class TileSchedule(NamedTuple):
    """The run lists of the three kernels, their tile sizes, and the map from query heads to KV heads."""

    forward: TileRunTensors
    dkdv: SplitTileTensors
    dq: TileRunTensors
    tiles: Tiles
    group_size: int
    first_head: int


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return why this kernel cannot serve a call with these requirements, or None if it can."""
    if requirements.device.type != "cuda" and not (INTERPRETED and requirements.device.type == "cpu"):
        return f"Triton kernels run on NVIDIA GPUs, not on {requirements.device.type}"
    if compute_capability(requirements.device) < 80:
        return "it needs compute capability 8.0 (A100) or later"
    if requirements.dtype not in _DTYPES:
        return f"it computes bfloat16, float16 and float32, not {str(requirements.dtype)[6:]}"
    for dim in (requirements.head_dim, requirements.v_head_dim):
        if not 16 <= dim <= 256 or len(_parts(dim)) > 2 or dim % 16:
            return f"head dims are powers of two or sums of two from 16 to 256 (80, 96, 192), not {dim}"
    return None


def tiles_for(requirements: KernelRequirements, capability: int) -> Tiles:
    """Return the tile sizes for a call with these requirements on a device with this compute capability (80, 90, ...)."""
    # consumer GPUs from sm_120 on have as little shared memory as sm_80
    table = _HALF_90 if 90 <= capability < 120 else _HALF_80
    table = _SINGLE if requirements.dtype == torch.float32 else table
    return table[min(dims for dims in table if dims >= requirements.head_dim + requirements.v_head_dim)]


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> TileSchedule:
    """Return the tile schedule for the mask, with tensors on the host."""
    tiles = tiles_for(requirements, compute_capability(requirements.device))
    return prepare_tiles(mask, tiles, multiprocessors(requirements.device))


def prepare_tiles(mask: LaunchMask, tiles: Tiles, processors: int) -> TileSchedule:
    """Return the schedule for the mask with these tile sizes, for a device with `processors` multiprocessors."""
    by_keys = transposed_runs(mask, tiles.dkdv.keys, tiles.dkdv.rows)
    return TileSchedule(
        tile_run_tensors(tile_runs(mask, tiles.forward.rows, tiles.forward.keys)),
        split_tile_tensors(split_long_tiles(by_keys, mask, tiles.dkdv.rows, processors)),
        tile_run_tensors(tile_runs(mask, tiles.dq.rows, tiles.dq.keys)),
        tiles,
        mask.group_size,
        mask.first_head,
    )


def forward(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKE: Tensor,
    schedule: TileSchedule,
    score: ScoreMod,
    into: tuple[Tensor, Tensor] | None = None,
    merge: bool = False,
    final: FinalRows | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Compute (o_THE, lse_TH), in fp32 unless `into` has another dtype. Rows without keys get o = 0 and lse = -inf.

    into: the (o, lse) to write the result to, or with `merge`, to merge it into. final: where finished rows of o go instead.
    """
    if into is None:
        o_THE = q_THD.new_empty(*q_THD.shape[:2], v_SKE.shape[2], dtype=torch.float32)
        into = o_THE, q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
    launch = forward_launch(q_THD, k_SKD, v_SKE, *into, schedule, score, precision=precision, merge=merge, final=final)
    run_launch(launch)
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
    final: FinalRows | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mask's contribution to (dq_THD, dk_SKD, dv_SKE) from the final lse and delta = rowsum(dO * O).

    into: dq and (dk, dv) to write the results to; None allocates fp32 tensors. add: whether to add to dq, and whether to add to
    dk and dv; otherwise they are overwritten. final: where to write finished rows of dq instead.
    """
    dq = q_THD.new_empty(q_THD.shape, dtype=torch.float32) if into[0] is None else into[0]
    dk, dv = into[1] or (x.new_empty(x.shape, dtype=torch.float32) for x in (k_SKD, v_SKE))
    tensors = do_THE, q_THD, k_SKD, v_SKE, lse_TH, delta_TH
    grads = dq, dk, dv
    for launch in backward_launch(*tensors, grads, schedule, score, precision=precision, accumulate=add, final=final):
        run_launch(launch)
    return dq, dk, dv


def forward_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    schedule: TileSchedule,
    score: ScoreMod,
    *,
    precision: str = "ieee",
    merge: bool = False,
    final: FinalRows | None = None,
) -> TritonLaunch:
    """Return the forward launch. It writes o (T, H, E) and lse (T, H), or with `merge` merges its result into them.

    final: where finished rows of o go instead.
    """
    (rows, heads, _), keys = q.shape, len(k)
    tile = schedule.tiles.forward
    arguments = _operands({"q": (q, tile.rows), "k": (k, tile.keys), "v": (v, tile.keys)})
    arguments |= tensor_arguments(o=o, lse=lse) | final_arguments(o, final)
    arguments |= {"slopes_": o if score.slopes_H is None else score.slopes_H}
    arguments |= call_arguments(schedule.forward, rows, keys, heads, schedule.group_size, schedule.first_head, score)
    arguments["PRECISION"] = precision
    arguments |= dict(BM=tile.rows, BN=tile.keys, MERGE=merge)
    return make_launch(forward_kernel, len(schedule.forward.order) * heads, arguments, tile)


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
    precision: str = "ieee",
    accumulate: tuple[bool, bool] = (False, False),
    final: FinalRows | None = None,
) -> list[TritonLaunch]:
    """Return the backward launches. grads: (dq, dk, dv). accumulate: whether to add to dq, and whether to add to dk and dv.

    final: where finished rows of dq go instead.
    """
    (rows, heads, _), (keys, kv_heads, _) = q.shape, k.shape
    dq, dk, dv = grads
    numbers, first_launch = row_numbers_launch(lse, delta)
    padded = numbers.shape[2]
    # pass a placeholder that always has the same alignment, because another alignment would compile another kernel
    slopes = numbers if score.slopes_H is None else score.slopes_H
    split = schedule.dkdv
    parts = scratch_of_parts(dk, dv, split, schedule.tiles.dkdv)
    of_keys = tensor_arguments(dk=dk, dv=dv) | dict(part_=split.part, parts_=parts, kv_heads=kv_heads)
    launches = [first_launch]
    for kernel, lists, tile, owners, acc, results in (
        (dkdv_kernel, split.runs, schedule.tiles.dkdv, kv_heads, accumulate[1], of_keys),
        (
            dq_kernel,
            schedule.dq,
            schedule.tiles.dq,
            heads,
            accumulate[0],
            tensor_arguments(dq=dq) | final_arguments(dq, final),
        ),
    ):
        on_rows, on_keys = tile.rows, tile.keys
        arguments = _operands({"q": (q, on_rows), "k": (k, on_keys), "v": (v, on_keys), "do": (do, on_rows)})
        arguments |= results | {"numbers_": numbers, "padded": padded, "plane": heads * padded, "slopes_": slopes}
        arguments |= call_arguments(lists, rows, keys, heads, schedule.group_size, schedule.first_head, score)
        arguments["PRECISION"] = precision
        arguments |= dict(BM=tile.rows, BN=tile.keys, ACC=acc)
        launches.append(make_launch(kernel, len(lists.order) * owners, arguments, tile))
    return [*launches, sums_launch(parts, dk, dv, split, accumulate[1])] if split.slots else launches


def row_numbers_launch(lse: Tensor, delta: Tensor) -> tuple[Tensor, TritonLaunch]:
    """Return a tensor (2, H, padded T) for log-sum-exp in base 2 and delta, and the launch that fills it."""
    rows, heads = lse.shape
    numbers = scratch_of_numbers(lse)
    padded = numbers.shape[2]
    arguments = tensor_arguments(lse=lse, delta=delta) | dict(numbers_=numbers, rows=rows, heads=heads, padded=padded)
    arguments |= dict(plane=heads * padded, BLOCK=_ROW_BLOCK)
    tile = Tile(_ROW_BLOCK, 0, 4, 1)
    return numbers, make_launch(row_numbers_kernel, padded // _ROW_BLOCK * heads, arguments, tile)


def scratch_of_numbers(lse: Tensor) -> Tensor:
    """Allocate the tensor for a launch's log-sum-exp in base 2 and delta: (2, H, padded T), fp32."""
    return lse.new_empty(2, lse.shape[1], _padded(len(lse)))


def workspace_bytes(direction: str, shape: LaunchShape, schedule: TileSchedule) -> int:
    """Return the bytes that a pass ("forward" or "backward") allocates on the device besides its operands and results."""
    if direction == "forward":
        return 0
    return row_number_bytes(shape) + part_bytes(shape, schedule.dkdv, schedule.tiles.dkdv)


def row_number_bytes(shape: LaunchShape) -> int:
    """Return the bytes of the tensor that `scratch_of_numbers` allocates for a backward launch."""
    return 2 * shape.heads * _padded(shape.rows) * 4


def _padded(rows: int) -> int:
    # programs may read up to one tile past the last row
    return (-(-rows // _ROW_BLOCK) + 1) * _ROW_BLOCK


@cache
def _parts(dim: int) -> list[int]:
    """Return the powers of two that sum to a head dim, largest first."""
    return [1 << bit for bit in range(dim.bit_length() - 1, -1, -1) if dim >> bit & 1]


def _operands(tensors: dict[str, tuple[Tensor, int]]) -> dict[str, Any]:
    """Return arguments for the operands, their strides and the parts of their head dims.

    tensors: each operand (tokens, heads, dim) and the rows of its tiles, keyed by name. Operands are TMA descriptors if all of
    them can be.
    """
    tensors = {name: (x if x.stride(2) == 1 else x.contiguous(), block) for name, (x, block) in tensors.items()}
    tma = all(_fits_tma(x) for x, _ in tensors.values())
    arguments: dict[str, Any] = {"TMA": tma}
    for name, (x, block) in tensors.items():
        width, second = (*_parts(x.shape[2]), 0)[:2]
        arguments |= {f"{name}_row": x.stride(0), f"{name}_head": x.stride(1)}
        arguments[f"{name}_"] = first = _descriptor(x, block, width) if tma else x
        arguments[f"{name}1_"] = _descriptor(x, block, second) if tma and second else first
        if name in ("q", "v"):
            letter = "D" if name == "q" else "E"
            arguments |= {f"{letter}0": width, f"{letter}1": second}
    return arguments


def _fits_tma(x: Tensor) -> bool:
    if x.dtype == torch.float32 or not x.numel():
        return False
    if max(x.shape[0], x.shape[1] * abs(x.stride(1))) >= TMA_LIMIT:
        return False
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
    return aligned and (INTERPRETED or compute_capability(x.device) >= 90)


def _descriptor(x: Tensor, block: int, width: int) -> TensorDescriptor:
    """Return a TMA descriptor of x as a matrix (tokens, heads * dim), with tiles of `block` rows and `width` columns."""
    columns = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return TensorDescriptor(x, [x.shape[0], columns], [x.stride(0), 1], [block, width])
