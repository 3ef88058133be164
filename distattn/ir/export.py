"""Exact conversions of masks for other attention kernels. Masks without an exact conversion are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distattn.ir.arguments import checked
from distattn.ir.bands import BK, BQ, HI, K0, K1, LO, OK, OQ, Q0, Q1, row_key_ranges, tighten
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints, expand_ranges
from distattn.ir.mask import Mask

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

# maximum number of key intervals per row of a block mask; each interval costs two lookups per score
_MAX_ROW_INTERVALS = 16


class VarlenArguments(NamedTuple):
    """Arguments of varlen kernels. cu_seqlens: (documents + 1,) int32. window: (left, right), where -1 means no limit."""

    cu_seqlens: np.ndarray
    max_seqlen: int
    causal: bool
    window: tuple[int, int]


@checked
def cu_seqlens(mask: Mask) -> VarlenArguments:
    """Return the arguments of varlen kernels for packed documents (flash-attn's convention).

    window is flash-attn's `window_size`, in which -1 means no limit. With causal, the window's right side can be ignored. Raise
    DistattnError for any other mask.
    """
    if mask.heads is not None:
        raise DistattnError("varlen kernels take one mask for all heads; this one differs by head.")
    pieces = mask.pieces[np.argsort(mask.pieces[:, Q0], kind="stable")]
    q0, q1 = pieces[:, Q0], pieces[:, Q1]
    square = (pieces[:, [K0, K1]] == pieces[:, [Q0, Q1]]).all() and (pieces[:, [BQ, BK]] == 1).all()
    if not square or q0[0] != 0 or q1[-1] != mask.n or (q0[1:] != q1[:-1]).any():
        raise DistattnError("this mask is not one square band per document, side by side; use block_mask or dense.")
    # with blocks of one token, origins only shift the bounds of a band
    reach = q1 - q0 - 1
    shift = pieces[:, OK] - pieces[:, OQ]
    left = _common_window(-(pieces[:, LO] + shift), reach, "left")
    right = _common_window(pieces[:, HI] + shift, reach, "right")
    ends = np.append(0, q1).astype(np.int32)
    return VarlenArguments(ends, int((q1 - q0).max()), right == 0, (left, right))


@checked
def block_mask(mask: Mask, block: int = 128, device: torch.device | str = "cpu") -> BlockMask:
    """Build FlexAttention's BlockMask with blocks of block x block cells from runs of tiles, without visiting every cell.

    Its mask_mod looks up a row's intervals of keys. Raise DistattnError if a row has more than 16 of them.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    groups = [mask] if mask.heads is None else [_of_head(mask, head) for head in range(mask.heads)]
    tables = [_row_intervals(group) for group in groups]
    most = max(begin.shape[0] for begin, _ in tables)
    begin, end = (
        torch.from_numpy(np.stack([_padded(table[side], most) for table in tables])).to(device) for side in (0, 1)
    )
    many_heads = len(groups) > 1

    def mask_mod(b, h, q, k):  # noqa: ANN001, ANN202
        head = h if many_heads else 0
        allowed = (k >= begin[head, 0, q]) & (k < end[head, 0, q])
        for i in range(1, most):
            allowed = allowed | ((k >= begin[head, i, q]) & (k < end[head, i, q]))
        return allowed

    blocks = [_blocks(group, block) for group in groups]
    partial, full = (torch.from_numpy(np.stack([pair[side] for pair in blocks]))[None].to(device) for side in (0, 1))
    return BlockMask.from_kv_blocks(
        *_kv_block_lists(partial),
        *_kv_block_lists(full),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(mask.n, mask.n),
    )


def _common_window(reaches: Ints, most: Ints, side: str) -> int:
    """Return the size of the window on one side, which all documents must share; -1 if it has no limit."""
    if (reaches < 0).any():
        raise DistattnError("varlen kernels always allow the diagonal; this mask does not.")
    limited = np.unique(reaches[reaches < most])
    if not len(limited):
        return -1
    if len(limited) > 1 or (most[reaches >= most] > limited[0]).any():
        raise DistattnError(
            f"documents of this mask have different windows on the {side}; varlen kernels take one window."
        )
    return int(limited[0])


def _of_head(mask: Mask, head: int) -> Mask:
    assert mask.piece_heads is not None
    here = (mask.piece_heads[:, 0] <= head) & (head < mask.piece_heads[:, 1])
    return Mask(mask.pieces[here], mask.n)


def _row_intervals(mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts and ends of each row's key intervals, both (intervals, n) int32; empty intervals are (0, 0)."""
    tight = tighten(mask.pieces)
    piece, row = expand_ranges(tight[:, Q0], tight[:, Q1])
    first, last = row_key_ranges(tight[piece], row)
    order = np.argsort(row, kind="stable")
    row, first, last = row[order], first[order], last[order]
    number = np.arange(len(row)) - np.searchsorted(row, row)
    most = int(number.max(initial=0)) + 1
    if most > _MAX_ROW_INTERVALS:
        raise DistattnError(f"a row of this mask has {most} pieces; a block mask takes {_MAX_ROW_INTERVALS}.")
    begin, end = np.zeros((2, most, mask.n), np.int32)
    begin[number, row], end[number, row] = first, last
    return begin, end


def _padded(table: np.ndarray, most: int) -> np.ndarray:
    return np.pad(table, ((0, most - len(table)), (0, 0)))


def _blocks(mask: Mask, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two boolean arrays (rows, columns): which blocks are partially allowed, and which are fully allowed."""
    runs = mask.tiles(block, block)
    side = -(-mask.n // block)
    some, full = np.zeros((2, side, side), bool)
    for out, low, high in ((some, "begin", "end"), (full, "full_begin", "full_end")):
        i, column = expand_ranges(runs[low], runs[high])
        out[runs["tile"][i], column] = True
    return some & ~full, full


def _kv_block_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's number of chosen columns, and its column indices with the chosen columns first."""
    import torch

    order = torch.argsort((~chosen).to(torch.int8), dim=-1, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)
