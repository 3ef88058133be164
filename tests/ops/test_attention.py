"""`attention` and its operators, in a single process and on real gloo ranks."""

import gc
import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from cases import LENGTHS, layouts, masks
from oracle import Inputs, Result, assert_close, dense, random_inputs
from processes import run_on_ranks
from torch.utils.checkpoint import checkpoint

import distattn as da
from distattn.ops import attention as functional  # noqa: F401  (defines the operators)
from distattn.ops import executable
from distattn.ops.executable import ExecutableCache
from distattn.parallel.make_plan import STRATEGIES

pytestmark = pytest.mark.sampled(3)


def plan_for(ranks: int, strategy: str = "ring", mask: str = "documents", layout: str = "zigzag", **shape) -> da.Plan:
    shape = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64") | shape
    return da.make_plan(masks()[mask], layouts(LENGTHS, ranks)[layout], strategy=strategy, **shape)


def local(plan: da.Plan, inputs: Inputs, rank: int) -> list[torch.Tensor]:
    parts = [plan.call.layout.shard(x.to(getattr(torch, plan.call.dtype)), rank) for x in inputs]
    return [x.requires_grad_() for x in parts[:3]] + [parts[3]]


def together(plan: da.Plan, parts: list[tuple]) -> Result:
    return Result(*(plan.call.layout.unshard(list(column)) for column in zip(*parts, strict=True)))


@pytest.mark.parametrize("policy", ["keep", "refetch-home"])
def test_operators_pass_opcheck(policy):
    plan = plan_for(1, backward=policy)
    ready = da.prepare(plan, kernel="reference")
    q, k, v, do = local(plan, random_inputs(200, 4, 2, 8), 0)
    sink, slopes = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.rand(4, dtype=torch.float64)
    results = torch.library.opcheck(
        torch.ops.distattn.forward, (q, k, v, sink, slopes, ready.handle, ready.kept_elements, 0.3, 5.0)
    )
    assert set(results.values()) == {"SUCCESS"}
    with torch.no_grad():
        o, lse, kept = torch.ops.distattn.forward(q, k, v, sink, slopes, ready.handle, ready.kept_elements, 0.3, 5.0)
        q, k, v, sink = (x.detach() for x in (q, k, v, sink))
    results = torch.library.opcheck(
        torch.ops.distattn.backward, (do, None, q, k, v, sink, slopes, o, lse, kept, ready.handle, 0.3, 5.0)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_one_rank_needs_no_process_group(kernel):
    plan, inputs = plan_for(1), random_inputs(200, 4, 2, 8)
    q, k, v, do = local(plan, inputs, 0)
    o, lse_HT = da.attention(q, k, v, plan, kernel=kernel, return_lse=True)
    o.backward(do)
    assert_close(
        together(plan, [(o.detach(), lse_HT.detach().t(), q.grad, k.grad, v.grad)]),
        dense(plan.call.mask, inputs),
        1e-11,
    )


def test_gradients_flow_through_the_log_sum_exp_if_the_kernel_supports_it():
    plan = da.make_plan(
        da.Mask.causal(9), da.Layout.zigzag([9], 1), strategy="ring", heads=2, kv_heads=1, head_dim=4, dtype="float64"
    )
    q, k, v, _ = local(plan, random_inputs(9, 2, 1, 4), 0)

    def both(q, k, v):
        return da.attention(q, k, v, plan, kernel="reference", return_lse=True)

    assert torch.autograd.gradcheck(both, (q, k, v))
    _, lse = da.attention(q, k, v, plan, kernel="cpu", return_lse=True)
    with pytest.raises(da.DistattnError, match="log-sum-exp"):
        lse.sum().backward()


def test_any_subset_of_inputs_may_require_gradients():
    plan, inputs = plan_for(1), random_inputs(200, 4, 2, 8)
    wanted = dense(plan.call.mask, inputs)
    q, k, v, do = local(plan, inputs, 0)
    da.attention(q.detach(), k, v.detach(), plan).backward(do)
    assert q.grad is None and v.grad is None and (k.grad - wanted.dk).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, k, v: (q[1:], k, v), r"q has shape \(199, 4, 8\); the plan needs \(200, 4, 8\)"),
        (lambda q, k, v: (q, k[:, :1], v), "k has shape"),
        (lambda q, k, v: (q, k, v.float()), "v is float32, the plan was made for float64"),
        (lambda q, k, v: (q, k.to("meta"), v), "k is on meta, q on cpu"),
    ],
)
def test_inputs_that_do_not_fit_the_plan_are_refused(change, sentence):
    plan = plan_for(1)
    q, k, v, _ = local(plan, random_inputs(200, 4, 2, 8), 0)
    with pytest.raises(da.DistattnError, match=sentence):
        da.attention(*change(q, k, v), plan)


def test_parts_of_a_fused_projection_need_no_copy_by_the_caller():
    plan, inputs = plan_for(1), random_inputs(200, 4, 4, 8)
    plan = da.make_plan(
        plan.call.mask, plan.call.layout, strategy="ring", heads=4, kv_heads=4, head_dim=8, dtype="float64"
    )
    q, k, v, do = local(plan, inputs, 0)
    fused = torch.stack([q, k, v], 1).detach().flatten(1).requires_grad_()
    parts = [part.unflatten(-1, (4, 8)) for part in fused.chunk(3, -1)]
    assert not parts[0].is_contiguous()
    o, wanted = da.attention(*parts, plan), da.attention(q, k, v, plan)
    (got,) = torch.autograd.grad(o, fused, do)
    assert torch.equal(o, wanted)
    assert torch.equal(got, torch.stack(torch.autograd.grad(wanted, (q, k, v), do), 1).flatten(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_it_does_for_pytorchs_own_attention(dtype):
    plan = plan_for(1)
    plan = da.make_plan(
        plan.call.mask, plan.call.layout, strategy="ring", heads=4, kv_heads=4, head_dim=8, dtype=str(dtype)[6:]
    )
    x = torch.randn(200, 4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        # the dtypes after rotary embeddings: q and k in fp32, v in low precision
        o = da.attention(x, x, x.to(dtype), plan)
        wanted = torch.nn.functional.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3, is_causal=True)
    assert o.dtype == wanted.dtype == dtype
    o.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()
    with (
        torch.autocast("cpu", dtype=dtype),
        pytest.raises(da.DistattnError, match="q is float64, the plan was made for"),
    ):
        da.attention(*[x.double()] * 3, plan)


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_impossible_scales_are_refused(scale):
    q, k, v, _ = local(plan_for(1), random_inputs(200, 4, 2, 8), 0)
    with pytest.raises(da.DistattnError, match="scale is a positive number"):
        da.attention(q, k, v, plan_for(1), scale=scale)


def test_second_derivatives_are_refused():
    plan = plan_for(1)
    q, k, v, do = local(plan, random_inputs(200, 4, 2, 8), 0)
    (dq,) = torch.autograd.grad(da.attention(q, k, v, plan), q, do, create_graph=True)
    with pytest.raises(da.DistattnError, match="no second derivative"):
        dq.sum().backward()


def test_a_handle_of_a_freed_plan_is_refused():
    with pytest.raises(da.DistattnError, match="handle 1000000 belongs to no executable"):
        torch.ops.distattn.forward(*[torch.zeros(1, 1, 8)] * 3, None, None, 1_000_000, 0, 1.0, 0.0)


def test_a_plan_for_more_ranks_needs_torch_distributed():
    with pytest.raises(da.DistattnError, match="init_process_group"):
        da.attention(*[torch.zeros(1, 1, 1)] * 3, plan_for(2))


def test_a_wrong_plan_is_never_run():
    plan = plan_for(1)
    rows = {name: column[1:] for name, column in plan.forward.tasks.items()}
    broken = da.Plan(plan.call, da.Table(rows, plan.forward.moves), plan.backward, plan.policy)
    q, k, v, _ = local(plan, random_inputs(200, 4, 2, 8), 0)
    with pytest.raises(da.PlanError, match="cells x heads are allowed"):
        da.attention(q, k, v, broken)


def test_programs_are_freed_with_their_plan():
    plan = plan_for(1)
    q, k, v, do = local(plan, random_inputs(200, 4, 2, 8), 0)
    o = da.attention(q, k, v, plan)
    gone = weakref.ref(plan)
    del plan
    gc.collect()
    # the graph still holds what the backward pass needs, but not the plan
    assert gone() is None
    o.backward(do)
    assert q.grad is not None


def _attention_on_rank(rank: int, plan: da.Plan, inputs: Inputs, recompute: bool, calls: int):
    q, k, v, do = local(plan, inputs, rank)
    for _ in range(calls):
        q.grad = k.grad = v.grad = None
        call = lambda q, k, v: da.attention(q, k, v, plan, return_lse=True)  # noqa: E731
        o, lse_HT = checkpoint(call, q, k, v, use_reentrant=False) if recompute else call(q, k, v)
        o.backward(do)
    return o.detach(), lse_HT.detach().t(), q.grad, k.grad, v.grad


GLOO = [
    (2, "ring", "causal", "zigzag", "float64", None),
    (4, "ring", "documents", "document_zigzag", "float32", None),
    (4, "ring", "window", "from_chunks", "float64", "keep"),
    (4, "allgather", "odd", "from_chunks", "float64", None),
    (3, "allgather", "documents", "contiguous", "float32", "refetch-follow"),
    (4, "ulysses", "causal", "contiguous", "float64", None),
    (2, "ulysses", "full", "zigzag", "float32", "refetch-home"),
    (4, "usp", "documents", "zigzag", "float64", "keep"),
    (4, "ulysses", "documents", "from_chunks", "bfloat16", None),
    (4, "double_ring", "full", "document_zigzag", "float64", None),
]


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize(("ranks", "strategy", "mask", "layout", "dtype", "policy"), GLOO)
def test_real_processes_equal_the_oracle(ranks, strategy, mask, layout, dtype, policy, recompute):
    plan = plan_for(ranks, strategy, mask, layout, dtype=dtype, backward=policy)
    inputs = random_inputs(200, 4, 2, 8)
    parts = run_on_ranks(ranks, _attention_on_rank, plan, inputs, recompute, 2)
    assert_close(
        together(plan, parts),
        dense(plan.call.mask, inputs),
        {"float64": 1e-11, "float32": 2e-5, "bfloat16": 2e-2}[dtype],
    )


def _six_heads(rank: int, inputs: Inputs):
    plan = plan_for(4, "ulysses", "causal", heads=6, kv_heads=2)
    return _attention_on_rank(rank, plan, inputs, False, 1)


def test_six_query_heads_on_four_ulysses_ranks():
    inputs = random_inputs(200, 6, 2, 8)
    plan = plan_for(4, "ulysses", "causal", heads=6, kv_heads=2)
    assert_close(together(plan, run_on_ranks(4, _six_heads, inputs)), dense(plan.call.mask, inputs), 1e-11)


def _wrong_group(rank: int):
    with pytest.raises(da.DistattnError, match="the plan is for 3 ranks, the process group has 2"):
        da.attention(*[torch.zeros(1, 1, 1)] * 3, plan_for(3))
    return rank


def test_a_group_of_another_size_is_refused():
    assert run_on_ranks(2, _wrong_group) == [0, 1]


def _breaks_in_a_trial(rank: int):
    def trials(*_):
        raise da.DistattnError("kernel gluon has broken the device")

    breaks = mock.patch.object(executable, "local_kernel_trials", trials) if rank == 0 else nullcontext()
    with breaks, pytest.raises(da.DistattnError) as error:
        da.prepare(plan_for(2))
    # the ranks are in step, so the next call works
    da.prepare(plan_for(2))
    return str(error.value)


def test_a_trial_that_fails_on_one_rank_is_reported_on_all():
    first, second = run_on_ranks(2, _breaks_in_a_trial)
    assert first == "kernel gluon has broken the device" and second == f"rank 0 refuses this plan: {first}"


def _count_bytes(rank: int, plan: da.Plan, inputs: Inputs):
    from oracle import Record, RecordingTransport

    transport = da.prepare(plan).transport
    record = Record()
    recording = RecordingTransport(transport, rank, record)
    with mock.patch.object(ExecutableCache, "transport", lambda cache, group, timeout=None: recording):
        _attention_on_rank(rank, plan, inputs, False, 1)
    return dict(record.bytes), [event for _, event in record.events]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_on_the_wire_are_the_plans_bytes(strategy):
    from oracle import planned_bytes

    plan, inputs = plan_for(4, strategy), random_inputs(200, 4, 2, 8)
    counted = {}
    for counts, _ in run_on_ranks(4, _count_bytes, plan, inputs):
        counted |= counts
    assert counted == planned_bytes(plan)
    # the simulator counts the same bytes
    timeline = da.simulate(plan, "h100-1x4")
    on_the_wire = sum(int(pass_.intra_node_bytes.sum() + pass_.inter_node_bytes.sum()) for pass_ in timeline.passes)
    assert on_the_wire == sum(counted.values())
