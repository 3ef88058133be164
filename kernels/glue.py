"""Row operations around kernels: copy, add or merge rows of one tensor into another, and compute row sums of products.

Each is one operator. On GPUs it is one Triton kernel that reads and writes every element once; elsewhere it is plain
PyTorch. Rows are a range or a list. Tensors are (rows, heads, width) or (rows, heads), with any strides except that
width has stride 1.
"""

# T tokens, H heads, E value head dim

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.kernels.devices import on_device_of_tensors
from distattn.kernels.merge import accumulation_dtype, merge_


class RowSelection(NamedTuple):
    """A selection of a tensor's rows: the rows in `listed`, or `size` rows starting at `start`."""

    start: int
    size: int
    listed: Tensor | None = None

    @staticmethod
    def of(rows: slice | Tensor) -> RowSelection:
        """Return the selection for a slice without a step or for a tensor of row indices."""
        if isinstance(rows, slice):
            return RowSelection(rows.start, rows.stop - rows.start)
        return RowSelection(0, len(rows), rows)

    @property
    def key(self) -> Any:
        """The slice, or tensor of indices, that selects these rows."""
        return slice(self.start, self.start + self.size) if self.listed is None else self.listed


def copy_rows(target: Tensor, target_rows: RowSelection, source: Tensor, source_rows: RowSelection) -> None:
    """Assign target[target_rows] = source[source_rows], in the target's dtype."""
    count = target_rows.size
    assert count == source_rows.size, "both sides have the same number of rows"
    torch.ops.distattn.copy_rows(target, *target_rows[::2], source, *source_rows[::2], count)


def add_rows(target: Tensor, target_rows: RowSelection, source: Tensor, source_rows: RowSelection) -> None:
    """Compute target[target_rows] += source[source_rows] in the target's dtype. No target row may be listed twice."""
    count = target_rows.size
    assert count == source_rows.size, "both sides have the same number of rows"
    torch.ops.distattn.add_rows(target, *target_rows[::2], source, *source_rows[::2], count)


def merge_rows(
    o: Tensor, lse: Tensor, rows: RowSelection, other_o: Tensor, other_lse: Tensor, other_rows: RowSelection
) -> None:
    """Merge rows of a partial result into (o, lse) by log-sum-exp (see `merge_`). No row of (o, lse) may be listed twice."""
    count = rows.size
    assert count == other_rows.size, "both sides have the same number of rows"
    torch.ops.distattn.merge_rows(o, lse, *rows[::2], other_o, other_lse, *other_rows[::2], count)


def row_products(do_THE: Tensor, o_THE: Tensor) -> Tensor:
    """Return rowsum(dO * O), (T, H), in the accumulation dtype."""
    return torch.ops.distattn.row_products(do_THE, o_THE)  # type: ignore[no-any-return]


def copy_rows_with_products(
    target: Tensor,
    products: Tensor,
    target_rows: RowSelection,
    do_THE: Tensor,
    o_THE: Tensor,
    source_rows: RowSelection,
) -> None:
    """Assign target[target_rows] = dO[source_rows] and products[target_rows] = rowsum(dO * O)[source_rows], each in the
    dtype of its target."""
    count = target_rows.size
    assert count == source_rows.size, "both sides have the same number of rows"
    torch.ops.distattn.copy_rows_with_products(
        target, products, *target_rows[::2], do_THE, o_THE, *source_rows[::2], count
    )


_ROWS = "Tensor(a!) target, int start, Tensor? index, Tensor source, int source_start, Tensor? source_index, int count"
torch.library.define("distattn::copy_rows", f"({_ROWS}) -> ()")
torch.library.define("distattn::add_rows", f"({_ROWS}) -> ()")
torch.library.define(
    "distattn::merge_rows",
    "(Tensor(a!) o, Tensor(b!) lse, int start, Tensor? index, Tensor other_o, Tensor other_lse, int other_start,"
    " Tensor? other_index, int count) -> ()",
)
torch.library.define(
    "distattn::copy_rows_with_products",
    "(Tensor(a!) target, Tensor(b!) products, int start, Tensor? index, Tensor do, Tensor o, int source_start,"
    " Tensor? source_index, int count) -> ()",
)
torch.library.define("distattn::row_products", "(Tensor do, Tensor o) -> Tensor")


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _key(start: int, index: Tensor | None, count: int) -> Any:
    return slice(start, start + count) if index is None else index


def _read(source: Tensor, start: int, index: Tensor | None, count: int) -> Tensor:
    """Return rows of a tensor. For listed rows, index_select takes a third of the time of indexing."""
    return source[start : start + count] if index is None else source.index_select(0, index)


@torch.library.impl("distattn::copy_rows", "CompositeExplicitAutograd")
@on_device_of_tensors
def _copy_rows(target, start, index, source, source_start, source_index, count) -> None:  # noqa: ANN001
    if _on_gpu(target):
        from distattn.kernels.triton.glue import run_rows

        return run_rows(target, start, index, source, source_start, source_index, count, add=False)
    target[_key(start, index, count)] = _read(source, source_start, source_index, count).to(target.dtype)
    return None


@torch.library.impl("distattn::add_rows", "CompositeExplicitAutograd")
@on_device_of_tensors
def _add_rows(target, start, index, source, source_start, source_index, count) -> None:  # noqa: ANN001
    if _on_gpu(target):
        from distattn.kernels.triton.glue import run_rows

        return run_rows(target, start, index, source, source_start, source_index, count, add=True)
    target[_key(start, index, count)] += _read(source, source_start, source_index, count)
    return None


@torch.library.impl("distattn::merge_rows", "CompositeExplicitAutograd")
@on_device_of_tensors
def _merge_rows(o, lse, start, index, other_o, other_lse, other_start, other_index, count) -> None:  # noqa: ANN001
    if _on_gpu(o) and o.dtype != torch.float64:
        from distattn.kernels.triton.glue import run_merge

        return run_merge(o, lse, start, index, other_o, other_lse, other_start, other_index, count)
    at, other = _key(start, index, count), _key(other_start, other_index, count)
    held = o[at], lse[at]
    merge_(*held, other_o[other], other_lse[other])
    # a slice selected views, but a list of rows selected copies, which must be written back
    if index is not None:
        o[at], lse[at] = held
    return None


@torch.library.impl("distattn::copy_rows_with_products", "CompositeExplicitAutograd")
@on_device_of_tensors
def _copy_rows_with_products(target, products, start, index, do, o, source_start, source_index, count) -> None:  # noqa: ANN001
    if _on_gpu(o) and o.dtype != torch.float64:
        from distattn.kernels.triton.glue import run_rows_with_products

        return run_rows_with_products(target, products, start, index, do, o, source_start, source_index, count)
    at = _key(start, index, count)
    do, o = _read(do, source_start, source_index, count), _read(o, source_start, source_index, count)
    target[at] = do.to(target.dtype)
    products[at] = (do.to(products.dtype) * o.to(products.dtype)).sum(-1)
    return None


@torch.library.impl("distattn::row_products", "CompositeExplicitAutograd")
@on_device_of_tensors
def _row_products(do, o):  # noqa: ANN001, ANN202
    if _on_gpu(o) and o.dtype != torch.float64:
        from distattn.kernels.triton.glue import run_products

        return run_products(do, o)
    wide = accumulation_dtype(o.dtype)
    return (do.to(wide) * o.to(wide)).sum(-1)
