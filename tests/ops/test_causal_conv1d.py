"""Convolutions over ranks: halos, resets at document boundaries and gradients match conv1d on each document alone."""

import pytest
import torch
import torch.nn.functional as F
from cases import layouts
from oracle import Record, RecordingTransport, planned_bytes
from processes import run_on_ranks, sum_gradients

import distattn as da
from distattn.kernels.convolution import taps
from distattn.kernels.registry import kernel_preparer
from distattn.ops.executable import kernel_requirements
from distattn.parallel.make_plan import STRATEGIES
from distattn.parallel.runtime.communication.transport import InProcessNetwork
from distattn.parallel.runtime.execution import execute_convolution
from distattn.parallel.runtime.execution.execute import run_in_lock_step
from distattn.parallel.runtime.lowering.lower import lower

LENGTHS = (1, 7, 129, 2, 63)
HEADS, DIM, TAPS = 2, 3, 4


def plan_of(layout, strategy="allgather", dtype="float64", width=TAPS, **changes):
    mask = da.Mask.documents(layout.lengths, (width - 1, 0))
    shape = dict(heads=HEADS, kv_heads=HEADS, head_dim=1, v_head_dim=DIM, dtype=dtype, op="convolution")
    return da.make_plan(mask, layout, strategy=strategy, **shape | changes)


def inputs(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, HEADS * DIM), (HEADS * DIM, TAPS), (HEADS * DIM,), (n, HEADS * DIM)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_document(x, weight, bias, lengths):
    parts = x.split(list(lengths))
    padded = [F.pad(part.t()[None], (weight.shape[1] - 1, 0)) for part in parts]
    return torch.cat([F.conv1d(part, weight[:, None], bias, groups=len(weight))[0].t() for part in padded])


def run_in_process(plan, x, weight, dy):
    layout, record = plan.call.layout, Record()
    da.verify(plan)
    make = kernel_preparer("taps", kernel_requirements(plan.call, torch.device("cpu")))
    programs = [lower(plan, rank, make) for rank in range(layout.ranks)]
    by_heads = [y.reshape(-1, HEADS, DIM) for y in (x, dy)]
    local = [[layout.shard(y, rank) for y in by_heads] for rank in range(layout.ranks)]
    weight = weight.reshape(HEADS, DIM, TAPS)

    def transports():
        network = InProcessNetwork()
        return [RecordingTransport(network.transport(rank), rank, record) for rank in range(layout.ranks)]

    rows = list(zip(programs, transports(), local, strict=True))
    ahead = run_in_lock_step(execute_convolution.forward(p, t, taps, mine[0], weight) for p, t, mine in rows)
    rows = list(zip(programs, transports(), local, ahead, strict=True))
    back = run_in_lock_step(
        execute_convolution.backward(p, t, taps, mine[1], mine[0], weight, kept) for p, t, mine, (_, kept) in rows
    )
    y, dx = layout.unshard([y for y, _ in ahead]), layout.unshard([dx for dx, _ in back])
    return y.flatten(1), dx.flatten(1), sum(dw for _, dw in back).flatten(0, 1), record


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ranks", [4, 2, 1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_and_layout_equals_conv1d(strategy, ranks):
    x, weight, _, dy = inputs(sum(LENGTHS))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    wanted = by_document(x, weight, None, LENGTHS)
    dx, dweight = torch.autograd.grad(wanted, (x, weight), dy)
    for layout in layouts(LENGTHS, ranks).values():
        if strategy == "ulysses" and ranks > HEADS:
            continue
        plan = plan_of(layout, strategy)
        y, *grads, record = run_in_process(plan, x.detach(), weight.detach(), dy)
        torch.testing.assert_close(y, wanted.detach(), rtol=0, atol=1e-12)
        for got, right in zip(grads, (dx, dweight), strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-11)
        assert +record.bytes == +planned_bytes(plan)


def test_what_moves_does_not_depend_on_the_length():
    # zigzag on 8 ranks: 14 segments receive a halo of 3 tokens from another rank, for x twice and for its gradient once
    for length in (512, 65536):
        moved = plan_of(da.Layout.zigzag((length,), 8)).forward.moves
        assert int((moved["t1"] - moved["t0"]).sum()) == 3 * 14
        sizes = plan_of(da.Layout.zigzag((length,), 8)).bytes()
        assert int(sizes["bytes"].sum()) == 3 * 3 * 14 * HEADS * DIM * 8


def convolve(rank, layout):
    x, weight, bias, dy = inputs(layout.n)
    module = torch.nn.Module()
    module.weight, module.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    mine = layout.shard(x, rank).requires_grad_()
    y = da.causal_conv1d(mine, module.weight, plan_of(layout), bias=module.bias)
    y.backward(layout.shard(dy, rank))
    sum_gradients(module)
    return y.detach(), mine.grad, module.weight.grad, module.bias.grad


def test_real_ranks_equal_one_process():
    layout = da.Layout.zigzag(LENGTHS, 4)
    y, dx, dweight, dbias = zip(*run_on_ranks(4, convolve, layout), strict=True)
    x, weight, bias, dy = (value.requires_grad_() for value in inputs(layout.n))
    wanted = by_document(x, weight, bias, LENGTHS)
    grads = torch.autograd.grad(wanted, (x, weight, bias), dy.detach())
    results = layout.unshard(list(y)), layout.unshard(list(dx)), dweight[0], dbias[0]
    for a, b in zip(results, (wanted.detach(), *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_wrong_arguments_are_refused_by_name():
    layout = da.Layout.contiguous((40,), 1)
    x, weight, *_ = inputs(40)
    plan = plan_of(layout)
    with pytest.raises(da.DistattnError, match="weight has 3 taps, the plan's mask lets each token see 4"):
        da.causal_conv1d(x, weight[:, 1:], plan)
    with pytest.raises(da.DistattnError, match="x has shape"):
        da.causal_conv1d(x[:, 1:], weight, plan)
    with pytest.raises(da.DistattnError, match="not of a convolution"):
        da.causal_conv1d(x, weight, plan_of(layout, op="attention", v_head_dim=1, head_dim=1))
    full = da.make_plan(
        da.Mask.full(40),
        layout,
        strategy="ring",
        heads=2,
        kv_heads=2,
        head_dim=1,
        v_head_dim=3,
        dtype="float64",
        op="convolution",
    )
    with pytest.raises(da.DistattnError, match="none after them"):
        da.causal_conv1d(x, weight, full)


def test_times_match_those_of_copies():
    plan = plan_of(da.Layout.contiguous((1 << 20,), 8), heads=1, kv_heads=1, v_head_dim=4096, dtype="bfloat16")
    # each rank reads 1 GB and writes 1 GB
    assert 0.2e-3 < da.simulate(plan, "h100-1x8").forward.seconds < 3e-3


def test_a_compiled_convolution_is_the_same():
    torch._dynamo.reset()
    x, weight, bias, _ = (value.requires_grad_() for value in inputs(40))
    ready = da.prepare(plan_of(da.Layout.contiguous((13, 27), 1)))

    def layer(x):
        return F.silu(da.causal_conv1d(x, weight, ready, bias=bias))

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(f(x).square().sum(), (x, weight, bias)) for f in (layer, compiled)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
