"""Convolutions with groups, activations and initial states, and token shifts, on real ranks match each document alone."""

import itertools
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from processes import run_on_ranks

import distattn as da
from distattn.ops import convolution as convolution_op

# the third document is shorter than its initial state
LENGTHS = (9, 37, 2, 40)
GROUPS, DIM, TAPS = 2, 3, 4
CHANNELS = GROUPS * DIM
DISTANCES = (1, 3, -2, 0, 50)


class Convolution(NamedTuple):
    """Inputs of a convolution, and gradients of its output and final states. The weight is (C, W) or (C, C / G, W)."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    initial: torch.Tensor
    dy: torch.Tensor
    dfinal: torch.Tensor


def inputs(grouped: bool, dtype: torch.dtype) -> Convolution:
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    weight = (CHANNELS, DIM, TAPS) if grouped else (CHANNELS, TAPS)
    states = (len(LENGTHS), CHANNELS, TAPS - 1)
    shapes = (n, CHANNELS), weight, (CHANNELS,), states, (n, CHANNELS), states
    return Convolution(*(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes))


def by_document(case: Convolution) -> list[torch.Tensor]:
    """Return (y, final states, dx, dweight, dbias, dinitial), computed by `conv1d` on each document after its initial
    state.
    """
    weight = case.weight if case.weight.dim() == 3 else case.weight[:, None]
    parts = zip(case.x.split(list(LENGTHS)), case.initial, strict=True)
    rows = [torch.cat([initial, part.t()], 1)[None] for part, initial in parts]
    groups = CHANNELS // weight.shape[1]
    y = F.silu(torch.cat([F.conv1d(row, weight, case.bias, groups=groups)[0].t() for row in rows]))
    final = torch.stack([row[0, :, 1 - TAPS :] for row in rows])
    grads = torch.autograd.grad([y, final], case[:4], [case.dy.detach(), case.dfinal.detach()])
    return [y.detach(), final.detach(), *grads]


def shifted(x: torch.Tensor, distance: int, fill: int = 0) -> torch.Tensor:
    out, begin = torch.full_like(x, fill), 0
    for length in LENGTHS:
        for t in range(max(distance, 0), min(length, length + distance)):
            out[begin + t] = x[begin + t - distance]
        begin += length
    return out


def layouts(ranks: int) -> list[da.Layout]:
    n = sum(LENGTHS)
    uneven = [[(50, n), (0, 10)], *([[]] * (ranks - 2)), [(10, 50)]] if ranks > 1 else [[(0, n)]]
    return [
        da.Layout.contiguous(LENGTHS, ranks),
        da.Layout.block_cyclic(LENGTHS, ranks, block=5),
        da.Layout.from_chunks(LENGTHS, uneven),
    ]


def plan_of(layout: da.Layout, op: str, dtype: torch.dtype, reach: int, heads: int = GROUPS) -> da.Plan:
    lengths = layout.lengths
    mask = da.Mask.token_shift(lengths, reach) if op == "token_shift" else da.Mask.documents(lengths, (reach, 0))
    shape = dict(heads=heads, kv_heads=heads, head_dim=1, v_head_dim=CHANNELS // heads, dtype=str(dtype)[6:])
    return da.make_plan(mask, layout, strategy="allgather", op=op, backward="keep", **shape)


def convolve(rank: int, layout: da.Layout, case: Convolution) -> list[torch.Tensor]:
    leaves = [layout.shard(case.x, rank), *case[1:4]]
    x, weight, bias, initial = (leaf.clone().requires_grad_() for leaf in leaves)
    plan = plan_of(layout, "convolution", x.dtype, TAPS - 1)
    how = dict(bias=bias, activation="silu", initial_state=initial)
    y, final = da.causal_conv1d(x, weight, plan, **how, return_final_state=True)
    grads = torch.autograd.grad([y, final], (x, weight, bias, initial), [layout.shard(case.dy, rank), case.dfinal])
    return [y.detach(), final.detach(), *grads]


def shift(rank: int, layout: da.Layout, x: torch.Tensor, dy: torch.Tensor, distance: int) -> list[torch.Tensor]:
    mine = layout.shard(x, rank).requires_grad_()
    # tokens may have any shape
    y = da.token_shift(mine.view(-1, 2, 1, DIM), plan_of(layout, "token_shift", x.dtype, distance)).flatten(1)
    labels = torch.arange(len(x) * CHANNELS).view(x.shape) % 97 - 100
    plan = plan_of(layout, "token_shift", torch.float64, distance)
    moved = da.token_shift(layout.shard(labels, rank), plan, fill=-100)
    return [y.detach(), *torch.autograd.grad(y, mine, layout.shard(dy, rank)), moved]


def work(rank: int, ranks: int) -> list[list[torch.Tensor]]:
    results = []
    for layout, dtype in itertools.product(layouts(ranks), (torch.float64, torch.float32)):
        results += [convolve(rank, layout, inputs(grouped, dtype)) for grouped in (False, True)]
        x, dy = inputs(False, dtype)[::4]
        results += [shift(rank, layout, x, dy, distance) for distance in DISTANCES]
    return results


def assert_close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert float((got - wanted).abs().max()) <= tolerance * max(float(wanted.abs().max()), 1.0)


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.parametrize("ranks", [4, 2, 1])
def test_ranks_equal_each_document_alone(ranks):
    by_rank = iter(zip(*run_on_ranks(ranks, work, ranks), strict=True))
    for layout, dtype in itertools.product(layouts(ranks), (torch.float64, torch.float32)):
        for grouped in (False, True):
            case = Convolution(*(value.requires_grad_() for value in inputs(grouped, torch.float64)))
            y, final, dx, *of_parameters = zip(*next(by_rank), strict=True)
            shifted_ = [layout.unshard(list(y)), sum(final), layout.unshard(list(dx)), *map(sum, of_parameters)]
            for a, b in zip(shifted_, by_document(case), strict=True):
                assert_close(a.double(), b, dtype)
        x, dy = inputs(False, dtype)[::4]
        labels = torch.arange(len(x) * CHANNELS).view(x.shape) % 97 - 100
        for distance in DISTANCES:
            shifted_ = [layout.unshard(list(each)) for each in zip(*next(by_rank), strict=True)]
            wanted = shifted(x, distance), shifted(dy, -distance), shifted(labels, distance, -100)
            assert all(torch.equal(a, b) for a, b in zip(shifted_, wanted, strict=True))
    assert next(by_rank, None) is None


@pytest.mark.parametrize("distance", [1, 3, -2])
def test_bytes_of_a_shift_do_not_depend_on_the_length(distance):
    for length in (512, 65536):
        layout = da.Layout.zigzag((length,), 8)
        plan = plan_of(layout, "token_shift", torch.float32, distance, heads=1)
        da.verify(plan)
        # 14 segments have a neighbour on another rank; x moves forward, its gradient backward
        assert int(plan.bytes()["bytes"].sum()) == 2 * 14 * abs(distance) * CHANNELS * 4


@pytest.mark.parametrize("sign", [1, -1])
def test_on_gpus_numbers_that_are_too_large_are_refused_by_an_assertion_of_the_device(sign, monkeypatch):
    plan = plan_of(da.Layout.contiguous(LENGTHS, 1), "token_shift", torch.float64, 3)
    x = torch.zeros(sum(LENGTHS), CHANNELS, dtype=torch.int64)
    monkeypatch.setattr(convolution_op, "has_streams", lambda device: True)
    asserted = mock.Mock(wraps=torch._assert_async)
    monkeypatch.setattr(torch, "_assert_async", asserted)
    x[5, 1] = sign * (2**52 - 1)
    assert x[5, 1] in da.token_shift(x, plan)
    x[5, 1] += sign
    # on the host PyTorch's assertion raises at once; on a device it raises when the device reaches it
    with pytest.raises(RuntimeError, match="whole numbers below 2.52") as refusal:
        da.token_shift(x, plan)
    assert type(refusal.value) is RuntimeError and asserted.call_count == 2


def test_wrong_arguments_are_refused_by_name():
    layout = da.Layout.contiguous(LENGTHS, 1)
    x, weight, bias, initial, *_ = inputs(True, torch.float32)
    convolution, shift_ = (plan_of(layout, op, torch.float32, 3) for op in ("convolution", "token_shift"))
    prefix = dict(heads=2, kv_heads=2, head_dim=1, v_head_dim=3, dtype="float32", op="token_shift")
    sums = da.make_plan(da.Mask.documents(LENGTHS), layout, strategy="ring", **prefix)
    for call, why in (
        (lambda: da.causal_conv1d(x, weight, shift_), "is of token_shift, not of a convolution"),
        (lambda: da.token_shift(x, convolution), "is of convolution, not of a token shift"),
        (lambda: da.token_shift(x, sums), "at one distance"),
        (lambda: da.token_shift(x, shift_, fill=1), "fill is for whole numbers"),
        (lambda: da.token_shift(x[:5], shift_), r"x has shape \(5, 6\)"),
        (lambda: da.token_shift(torch.full((88, 6), 1 << 60), shift_), "whole numbers below 2.52"),
        (
            lambda: da.causal_conv1d(x, weight[:, :2], convolution),
            r"for groups that the plan has as heads \(6, 3, taps\)",
        ),
        (lambda: da.causal_conv1d(x, weight, convolution, initial_state=initial[1:]), "of all documents"),
        (
            lambda: da.causal_conv1d(
                x, weight[:, :, :1], plan_of(layout, "convolution", x.dtype, 0), return_final_state=True
            ),
            "1 tap has no final state",
        ),
        (lambda: da.causal_conv1d(x, weight, convolution, activation="gelu"), 'activation is "silu" or None'),
    ):
        with pytest.raises(da.DistattnError, match=why):
            call()
