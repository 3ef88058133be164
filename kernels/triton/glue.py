"""Triton kernels for `kernels.glue`. Each program processes a block of rows of one head."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.triton.tiles import merge_shares

# target number of elements per program, and its maximum number of rows
_NUMBERS, _MOST_ROWS = 4096, 64


@triton.jit
def _row_numbers(index_, start, r, inside, LISTED: tl.constexpr):
    """Return the row numbers of entries r of a range or a list, as int64 because row offsets may exceed 32 bits."""
    if LISTED:
        number = tl.load(index_ + r, mask=inside, other=0).to(tl.int64)
    else:
        number = (start + r).to(tl.int64)
    return number


@triton.jit(do_not_specialize=["start", "source_start", "count", "heads"])
def rows_kernel(
    target_, index_, start, target_row, target_head,
    source_, source_index_, source_start, source_row, source_head,
    count, heads, width,
    LISTED: tl.constexpr, SOURCE_LISTED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy source rows to target rows, or with ADD add them."""
    head = tl.cast(tl.program_id(0) % heads, tl.int64)
    r = (tl.program_id(0) // heads) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    there = r < count
    inside = there[:, None] & (column < width)[None, :]
    to = _row_numbers(index_, start, r, there, LISTED)[:, None] * target_row + head * target_head + column[None, :]
    row = _row_numbers(source_index_, source_start, r, there, SOURCE_LISTED)
    x = tl.load(source_ + row[:, None] * source_row + head * source_head + column[None, :], mask=inside)
    if ADD:
        held = tl.load(target_ + to, mask=inside)
        x = held + x.to(held.dtype)
    tl.store(target_ + to, x.to(target_.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "other_start", "count", "heads"])
def merge_kernel(
    o_, lse_, index_, start, o_row, o_head, lse_row, lse_head,
    other_, other_lse_, other_index_, other_start, other_row, other_head, other_lse_row, other_lse_head,
    count, heads, width,
    LISTED: tl.constexpr, OTHER_LISTED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge rows of another (o, lse) into rows of (o, lse)."""
    head = tl.cast(tl.program_id(0) % heads, tl.int64)
    r = (tl.program_id(0) // heads) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    there = r < count
    inside = there[:, None] & (column < width)[None, :]
    row = _row_numbers(index_, start, r, there, LISTED)
    other_row_ = _row_numbers(other_index_, other_start, r, there, OTHER_LISTED)
    lse_at = lse_ + row * lse_row + head * lse_head
    before = tl.load(lse_at, mask=there, other=-float("inf"))
    comes = tl.load(other_lse_ + other_row_ * other_lse_row + head * other_lse_head, mask=there, other=-float("inf"))
    old, fresh, merged = merge_shares(before, comes)
    tl.store(lse_at, merged, mask=there)
    at = o_ + row[:, None] * o_row + head * o_head + column[None, :]
    x = tl.load(other_ + other_row_[:, None] * other_row + head * other_head + column[None, :], mask=inside)
    held = tl.load(at, mask=inside)
    tl.store(at, held * old[:, None] + x.to(held.dtype) * fresh[:, None], mask=inside)


@triton.jit(do_not_specialize=["rows", "heads"])
def products_kernel(
    a_, b_, out_, a_row, a_head, b_row, b_head, rows, heads, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Compute out (rows, heads) = rowsum(a * b)."""
    head = tl.cast(tl.program_id(0) % heads, tl.int64)
    r = (tl.program_id(0) // heads) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    far = r.to(tl.int64)[:, None]
    inside = (r < rows)[:, None] & (column < width)[None, :]
    a = tl.load(a_ + far * a_row + head * a_head + column[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ + far * b_row + head * b_head + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ + r.to(tl.int64) * heads + head, tl.sum(a * b, 1), mask=r < rows)


@triton.jit(do_not_specialize=["start", "source_start", "count", "heads"])
def rows_with_products_kernel(
    target_, products_, index_, start, target_row, target_head, products_row, products_head,
    do_, o_, source_index_, source_start, do_row, do_head, o_row, o_head,
    count, heads, width,
    LISTED: tl.constexpr, SOURCE_LISTED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy rows of dO to target rows, and write rowsum(dO * O) to the same rows of products."""
    head = tl.cast(tl.program_id(0) % heads, tl.int64)
    r = (tl.program_id(0) // heads) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    there = r < count
    inside = there[:, None] & (column < width)[None, :]
    to = _row_numbers(index_, start, r, there, LISTED)
    row = _row_numbers(source_index_, source_start, r, there, SOURCE_LISTED)
    do = tl.load(do_ + row[:, None] * do_row + head * do_head + column[None, :], mask=inside, other=0.0)
    o = tl.load(o_ + row[:, None] * o_row + head * o_head + column[None, :], mask=inside, other=0.0)
    tl.store(target_ + to[:, None] * target_row + head * target_head + column[None, :], do, mask=inside)
    sums = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(products_ + to * products_row + head * products_head, sums, mask=there)


def run_rows(
    target: Tensor,
    start: int,
    index: Tensor | None,
    source: Tensor,
    source_start: int,
    source_index: Tensor | None,
    count: int,
    add: bool,
) -> None:
    """Copy rows, or add them if `add`. See `glue.copy_rows` and `glue.add_rows`."""
    target, source = _three_dims(target), _three_dims(source)
    assert target.stride(2) == source.stride(2) == 1 or target.shape[2] == 1, "rows of a head are contiguous"
    shape = _shape(target)
    if count:
        rows_kernel[_grid(shape, count, target.shape[1])](
            target, target if index is None else index, start, *target.stride()[:2],
            source, source if source_index is None else source_index, source_start, *source.stride()[:2],
            count, target.shape[1], target.shape[2],
            LISTED=index is not None, SOURCE_LISTED=source_index is not None, ADD=add, **shape,
        )  # fmt: skip


def run_merge(
    o: Tensor,
    lse: Tensor,
    start: int,
    index: Tensor | None,
    other_o: Tensor,
    other_lse: Tensor,
    other_start: int,
    other_index: Tensor | None,
    count: int,
) -> None:
    """Merge rows of another (o, lse) into rows of (o, lse). See `glue.merge_rows`."""
    assert o.stride(2) == other_o.stride(2) == 1 or o.shape[2] == 1, "rows of a head are contiguous"
    shape = _shape(o)
    if count:
        merge_kernel[_grid(shape, count, o.shape[1])](
            o, lse, o if index is None else index, start, *o.stride()[:2], *lse.stride(),
            other_o, other_lse, other_o if other_index is None else other_index, other_start,
            *other_o.stride()[:2], *other_lse.stride(), count, o.shape[1], o.shape[2],
            LISTED=index is not None, OTHER_LISTED=other_index is not None, **shape,
        )  # fmt: skip


def run_rows_with_products(
    target: Tensor,
    products: Tensor,
    start: int,
    index: Tensor | None,
    do: Tensor,
    o: Tensor,
    source_start: int,
    source_index: Tensor | None,
    count: int,
) -> None:
    """Copy rows of dO and write their rowsum(dO * O). See `glue.copy_rows_with_products`."""
    assert target.stride(2) == do.stride(2) == o.stride(2) == 1 or do.shape[2] == 1, "rows of a head lie in one piece"
    shape = _shape(target)
    if count:
        rows_with_products_kernel[_grid(shape, count, target.shape[1])](
            target, products, target if index is None else index, start, *target.stride()[:2], *products.stride(),
            do, o, do if source_index is None else source_index, source_start, *do.stride()[:2], *o.stride()[:2],
            count, target.shape[1], target.shape[2],
            LISTED=index is not None, SOURCE_LISTED=source_index is not None, **shape,
        )  # fmt: skip


def run_products(do_THE: Tensor, o_THE: Tensor) -> Tensor:
    """Return rowsum(dO * O), (T, H). See `glue.row_products`."""
    out = do_THE.new_empty(do_THE.shape[:2], dtype=accumulation_dtype(o_THE.dtype))
    rows, heads, width = do_THE.shape
    assert do_THE.stride(2) == o_THE.stride(2) == 1 or width == 1, "rows of a head are contiguous"
    shape = _shape(do_THE)
    if rows:
        products_kernel[_grid(shape, rows, heads)](
            do_THE, o_THE, out, *do_THE.stride()[:2], *o_THE.stride()[:2], rows, heads, width, **shape
        )
    return out


def _three_dims(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x[..., None]


def _shape(x: Tensor) -> dict[str, Any]:
    """Return the number of rows and columns of a program, both powers of two."""
    width = triton.next_power_of_2(x.shape[-1] if x.dim() == 3 else 1)
    return {"ROWS": min(_MOST_ROWS, max(_NUMBERS // width, 1)), "WIDTH": width}


def _grid(shape: dict[str, Any], count: int, heads: int) -> tuple[int]:
    return (triton.cdiv(count, shape["ROWS"]) * heads,)
