"""The last launch of a backward pass that split long tiles: it adds up the partial sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.spec import LaunchShape
from distattn.kernels.triton.launch import SplitTileTensors, Tile, TritonLaunch, make_launch, tensor_arguments

# rows per program
_BLOCK = 16


@triton.jit
def _add_up(x_, x_row, parts_, stride, count, first_row, row, rows, WIDTH: tl.constexpr, PADDED: tl.constexpr,
            BLOCK: tl.constexpr, ACC: tl.constexpr, PLANE: tl.constexpr):  # fmt: skip
    """Sum rows [row, row + BLOCK) of a result over `count` parts, which are PLANE rows apart. PADDED: a power of two >= WIDTH."""
    i = tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    inside = ((row + i) < rows)[:, None] & (column < WIDTH)[None, :]
    at = x_ + (row + i).to(tl.int64)[:, None] * x_row + column[None, :]
    total = tl.zeros([BLOCK, PADDED], tl.float32)
    if ACC:
        total += tl.load(at, mask=inside, other=0.0)
    for part in range(count):
        far = (first_row + part * PLANE + i).to(tl.int64)
        total += tl.load(parts_ + far[:, None] * stride + column[None, :], mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


@triton.jit(do_not_specialize=["keys", "kv_heads"])
def sum_parts_kernel(
    parts_, sums_, dk_, dv_, keys, kv_heads, dk_row, dk_head, dv_row, dv_head,
    D: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of the split tiles from parts (slots, BN, kv_heads, D + E), in fp32."""
    blocks: tl.constexpr = BN // BLOCK
    # a head's offset may exceed 32 bits
    kv_head = tl.cast(tl.program_id(0) % kv_heads, tl.int64)
    place = tl.program_id(0) // kv_heads
    entry = sums_ + place // blocks * 3
    within = place % blocks * BLOCK
    row = tl.load(entry) * BN + within
    first_row = tl.load(entry + 1) * BN + within
    count = tl.load(entry + 2)
    stride = kv_heads * (D + E)
    from_ = parts_ + kv_head * (D + E)
    _add_up(dk_ + kv_head * dk_head, dk_row, from_, stride, count, first_row, row, keys, D, PADDED, BLOCK, ACC, BN)
    _add_up(dv_ + kv_head * dv_head, dv_row, from_ + D, stride, count, first_row, row, keys, E, PADDED, BLOCK, ACC, BN)


def scratch_of_parts(dk: Tensor, dv: Tensor, lists: SplitTileTensors, tile: Tile) -> Tensor:
    """Allocate the tensor for partial sums of split tiles: (slots, keys per tile, kv_heads, D + E), fp32."""
    return lists.part.new_empty(lists.slots, tile.keys, dk.shape[1], dk.shape[2] + dv.shape[2], dtype=torch.float32)


def part_bytes(shape: LaunchShape, lists: SplitTileTensors, tile: Tile) -> int:
    """Return the bytes that `scratch_of_parts` allocates for a launch of this shape."""
    return lists.slots * tile.keys * shape.kv_heads * (shape.head_dim + shape.v_head_dim) * 4


def sums_launch(parts: Tensor, dk: Tensor, dv: Tensor, lists: SplitTileTensors, accumulate: bool) -> TritonLaunch:
    """Return the launch that sums the parts into dk and dv, or with `accumulate` adds them."""
    _, keys_of_tile, kv_heads, _ = parts.shape
    dims = dk.shape[2], dv.shape[2]
    arguments = dict(
        parts_=parts, sums_=lists.sums, keys=len(dk), kv_heads=kv_heads, D=dims[0], E=dims[1], ACC=accumulate
    )
    arguments |= tensor_arguments(dk=dk, dv=dv)
    arguments |= dict(PADDED=triton.next_power_of_2(max(dims)), BN=keys_of_tile, BLOCK=_BLOCK)
    programs = len(lists.sums) * (keys_of_tile // _BLOCK) * kv_heads
    return make_launch(sum_parts_kernel, programs, arguments, Tile(_BLOCK, 0, 4, 1))
