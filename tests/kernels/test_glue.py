"""Copying, adding and merging rows: the interpreted Triton kernels and the PyTorch path match plain indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels import glue
from distattn.kernels.glue import RowSelection
from distattn.kernels.merge import merge_, output_with_delta

pytest.importorskip("triton", reason="Triton is not installed")

PATHS = ["triton", "torch"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setattr(glue, "_on_gpu", lambda x: request.param == "triton")


@st.composite
def rows_of(draw, total, count):
    if draw(st.booleans()):
        return RowSelection(draw(st.integers(0, total - count)), count)
    order = draw(st.permutations(range(total)))
    return RowSelection(0, count, torch.tensor(order[:count], dtype=torch.int64))


@st.composite
def cases(draw):
    count = draw(st.integers(0, 20))
    sizes = [count + draw(st.integers(0, 5)) for _ in range(2)]
    shape = draw(st.sampled_from([(1,), (3,), (2, 8), (3, 24), (4, 80)]))
    return shape, sizes, [draw(rows_of(size, count)) for size in sizes]


def strided(rows, shape, dtype=torch.float32):
    """Return a view of all but the outer heads of a wider tensor, and the wider tensor."""
    whole = torch.randn(rows, shape[0] + 2, *shape[1:]).to(dtype)
    return whole[:, 1:-1], whole


@pytest.mark.usefixtures("path")
@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.sampled_from(["copy", "add"]))
def test_rows_are_copied_and_added(case, dtype, action):
    shape, (to_size, from_size), (to_rows, from_rows) = case
    target, around = strided(to_size, shape)
    source, _ = strided(from_size, shape, dtype)
    before = around.clone()
    wanted = target.clone()
    part = source[from_rows.key].float()
    wanted[to_rows.key] = part if action == "copy" else wanted[to_rows.key] + part
    {"copy": glue.copy_rows, "add": glue.add_rows}[action](target, to_rows, source, from_rows)
    assert torch.equal(target, wanted)
    # the other heads are unchanged
    assert torch.equal(around[:, 0], before[:, 0]) and torch.equal(around[:, -1], before[:, -1])


@pytest.mark.usefixtures("path")
@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([torch.float32, torch.float16]))
def test_rows_are_merged(case, dtype):
    shape, (to_size, from_size), (to_rows, from_rows) = case
    shape = (*shape, 8)[:2]
    o, _ = strided(to_size, shape)
    other, _ = strided(from_size, shape, dtype)
    lse, other_lse = torch.randn(to_size, shape[0]), torch.randn(from_size, shape[0])
    # rows without keys in one input, in the other, or in both
    lse[::2], other_lse[::3] = -torch.inf, -torch.inf
    wanted, wanted_lse = o.clone(), lse.clone()
    held = wanted[to_rows.key].clone(), wanted_lse[to_rows.key].clone()
    merge_(*held, other[from_rows.key].float(), other_lse[from_rows.key])
    wanted[to_rows.key], wanted_lse[to_rows.key] = held
    glue.merge_rows(o, lse, to_rows, other, other_lse, from_rows)
    assert torch.allclose(o, wanted, atol=1e-5) and torch.allclose(lse, wanted_lse, atol=1e-5)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", [(0, 2, 8), (5, 1, 128), (70, 3, 80)])
def test_row_products(shape):
    do, o = torch.randn(shape).half(), torch.randn(shape).half()
    products = glue.row_products(do, o)
    assert products.dtype == torch.float32 and products.shape == shape[:2]
    assert torch.allclose(products, (do.double() * o.double()).sum(-1).float(), atol=1e-4)


@pytest.mark.usefixtures("path")
@settings(max_examples=30, deadline=None)
@given(cases(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_rows_are_copied_with_their_products(case, dtype):
    shape, (to_size, from_size), (to_rows, from_rows) = case
    shape = (*shape, 8)[:2]
    do, _ = strided(from_size, shape, dtype)
    o, _ = strided(from_size, shape, dtype)
    # target and products are slices of the same rows
    row = torch.full((to_size, shape[0] * (shape[1] + 1)), 7.0)
    target, products = row[:, : shape[0] * shape[1]].view(to_size, *shape), row[:, shape[0] * shape[1] :]
    wanted, wanted_products = target.clone(), products.clone()
    part, outputs = do[from_rows.key].float(), o[from_rows.key].float()
    wanted[to_rows.key], wanted_products[to_rows.key] = part, (part * outputs).sum(-1)
    glue.copy_rows_with_products(target, products, to_rows, do, o, from_rows)
    assert torch.equal(target, wanted) and torch.allclose(products, wanted_products, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_outputs_are_found_that_have_a_delta(dtype, size):
    torch.manual_seed(0)
    do = (torch.randn(50, 3, 64, dtype=torch.float64) * size).to(dtype)
    # give delta the magnitude that it has with outputs of ordinary size
    delta = (
        (do.double() * torch.randn(50, 3, 64).double())
        .sum(-1)
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
    )
    o = output_with_delta(do, delta)
    assert o.dtype == dtype and o.isfinite().all()
    far = ((do.double() * o.double()).sum(-1) - delta).norm() / delta.double().norm()
    assert far < {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]
    do[4] = 0
    assert (output_with_delta(do, delta)[4] == 0).all()
