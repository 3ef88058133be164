"""Executables: agreed on by all ranks, compiled once for all plans, and kept when activations are recomputed."""

import contextlib
import gc
import inspect
from functools import partial

import pytest
import torch
from cases import LENGTHS, layouts, masks
from oracle import dense, random_inputs
from processes import run_on_ranks
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import distattn as da
from distattn.kernels.registry import kernel_preparer
from distattn.ops.executable import kernel_requirements
from distattn.parallel.runtime.lowering.lower import lower
from distattn.parallel.runtime.lowering.upload_program import copy_program_to_device, replace_tensors

SHAPE = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64")


def plan_for(mask, ranks=1, strategy="ring", layout="zigzag"):
    return da.make_plan(mask, layouts(LENGTHS, ranks)[layout], strategy=strategy, **SHAPE)


def _different_plans(rank, change):
    lengths = [100, 60, 40] if rank != 2 or change != "documents" else [100, 50, 50]
    inner = (9, 0) if rank == 2 and change == "mask" else "causal"
    ranks = {"layout": da.Layout.zigzag, "strategy": da.Layout.contiguous}
    make = ranks["layout"] if rank == 2 and change == "layout" else ranks["strategy"]
    strategy = "allgather" if rank == 2 and change == "strategy" else "ring"
    plan = da.make_plan(da.Mask.documents(lengths, inner), make(lengths, 4), strategy=strategy, **SHAPE)
    tokens = plan.call.layout.shard_sizes()[rank]
    q, k, v = (torch.zeros(tokens, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    with pytest.raises(da.PlanError) as refusal:
        da.attention(q, k, v, plan)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("change", "how"),
    [
        ("documents", "its documents differ from rank 0's from number 2 on."),
        ("mask", "its mask differ from rank 0's."),
        ("layout", "its layout differ from rank 0's."),
        ("strategy", "its strategy differ from rank 0's."),
    ],
)
def test_all_ranks_with_different_plans_report_them(change, how):
    sentences = run_on_ranks(4, _different_plans, change)
    assert len(set(sentences)) == 1
    assert sentences[0].startswith("rank 2 plans a different call (digest ") and sentences[0].endswith(how)


def _compiled(rank, plans, inputs):
    """Return the differences in losses and gradients between compiled and plain steps on batches with different plans,
    and the number of compilations.
    """
    compiled = 0

    def backend(graph, example):
        nonlocal compiled
        compiled += 1
        return graph.forward

    def step(q, k, v, ready):
        return (da.attention(q * 2, k, v, ready) ** 2).sum()

    fast = torch.compile(
        step,
        fullgraph=True,
        backend=aot_autograd(fw_compiler=backend, bw_compiler=lambda graph, example: graph.forward),
    )
    differences = []
    for plan in plans:
        layout, results = plan.call.layout, []
        for run in (step, fast):
            q, k, v = (layout.shard(x, rank).requires_grad_() for x in inputs[:3])
            ready = da.prepare(plan)
            run(q, k, v, ready).backward()
            results.append([q.grad, k.grad, v.grad])
        differences.append(max(float((a - b).abs().max()) for a, b in zip(*results, strict=True)))
    return differences, compiled


def compiled_plans(ranks, strategy):
    for lengths in ([120, 80], [10, 190], [66, 67, 67], [1, 199], [200]):
        layout = da.Layout.zigzag(lengths, ranks)
        yield da.make_plan(da.Mask.documents(lengths), layout, strategy=strategy, **SHAPE)


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "ring"), (2, "ring"), (2, "ulysses")])
def test_a_compiled_model_does_not_recompile_for_new_plans(ranks, strategy):
    inputs, plans = random_inputs(200, 4, 2, 8), list(compiled_plans(ranks, strategy))
    for differences, compiled in run_on_ranks(ranks, _compiled, plans, inputs):
        assert max(differences) < 1e-12
        # the second plan turns the handle and the kept sizes into variables; after that nothing is recompiled
        assert compiled <= 2


def test_a_plan_inside_torch_compile_is_refused_with_the_way_out():
    plan = plan_for(masks()["causal"])
    q, k, v, _ = random_inputs(200, 4, 2, 8)
    with pytest.raises(Exception, match="takes prepare"):
        torch.compile(lambda q, k, v: da.attention(q, k, v, plan), fullgraph=True, backend="eager")(q, k, v)


def _recomputed(rank, plan, inputs, save):
    layout = plan.call.layout
    q, k, v = (layout.shard(x, rank).requires_grad_() for x in inputs[:3])
    ready = da.prepare(plan)
    calls = 0
    exchange = ready.transport.exchange

    def counted(*args):
        nonlocal calls
        calls += 1
        return exchange(*args)

    ready.transport.exchange = counted
    policy = partial(create_selective_checkpoint_contexts, da.save_attention)
    how = {"context_fn": policy} if save else {}
    o = checkpoint(lambda q, k, v: da.attention(q.sin(), k, v, ready) ** 2, q, k, v, use_reentrant=False, **how)
    forward = calls
    o.backward(layout.shard(inputs.do, rank))
    return forward, calls - forward, (q.grad, k.grad, v.grad)


def test_selective_checkpointing_recomputes_without_communicating():
    plan, inputs = plan_for(masks()["causal"], 2, "allgather"), random_inputs(200, 4, 2, 8)
    steps = [table.steps for table in (plan.forward, plan.backward)]
    plain, saved = (run_on_ranks(2, _recomputed, plan, inputs, save) for save in (False, True))
    for (forward, backward, grads), (forward_saved, backward_saved, grads_saved) in zip(plain, saved, strict=True):
        assert forward == forward_saved == steps[0]
        assert backward == sum(steps) and backward_saved == steps[1]
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_saved, strict=True))


def test_a_plan_over_the_capacity_is_refused_before_it_starts():
    plan = plan_for(masks()["causal"], 1)
    da.prepare(plan, max_buffer_bytes=0)
    refusals = run_on_ranks(2, _over_capacity, plan_for(masks()["causal"], 2))
    assert all("more than max_buffer_bytes = 100." in refusal for refusal in refusals)


def _over_capacity(rank, plan):
    with pytest.raises(da.PlanError) as refusal:
        da.prepare(plan, max_buffer_bytes=100)
    return str(refusal.value)


def test_index_lists_move_to_the_device_together():
    plan = plan_for(masks()["odd"], 4, "ring", "from_chunks")
    program = lower(plan, 0, kernel_preparer("reference", kernel_requirements(plan.call, torch.device("cpu"))))
    moved, originals = [], []
    replace_tensors(
        copy_program_to_device(program, torch.device("meta")), lambda tensor: moved.append(tensor) or tensor
    )
    replace_tensors(program, lambda tensor: originals.append(tensor) or tensor)
    assert moved and all(tensor.device.type == "meta" for tensor in moved)
    assert [(x.shape, x.dtype) for x in moved] == [(x.shape, x.dtype) for x in originals]
    assert {torch.bool, torch.int64} <= {tensor.dtype for tensor in moved}


def test_empty_lists_move_to_the_device_whatever_their_strides():
    plan = plan_for(masks()["causal"], 1)
    # strides as torch.from_numpy returns them for empty arrays
    lists = torch.empty_strided((0,), (0,), dtype=torch.int32), torch.arange(3)[:, None].expand(3, 2)
    program = copy_program_to_device(lower(plan, 0, lambda mask: lists), torch.device("meta"))
    (schedule,) = [launch.schedule for step in program.forward for launch in step.launches]
    assert [(tuple(x.shape), x.dtype) for x in schedule] == [((0,), torch.int32), ((3, 2), torch.int64)]


def test_a_program_prepared_in_inference_mode_serves_training():
    plan = plan_for(masks()["causal"], 1)
    with torch.inference_mode():
        program = copy_program_to_device(lower(plan, 0, lambda mask: (torch.arange(3),)), torch.device("meta"))
    (schedule,) = [launch.schedule for step in program.forward for launch in step.launches]
    assert not any(tensor.is_inference() for tensor in schedule)


def _owns_a_communicator(rank):
    plan = plan_for(masks()["causal"], 2)
    transport = da.prepare(plan).transport
    again = da.prepare(plan_for(masks()["full"], 2)).transport
    with contextlib.suppress(Exception):
        torch.distributed.barrier()
    world = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    return transport is again and transport._backend is not world


def test_messages_have_their_own_communicator():
    assert run_on_ranks(2, _owns_a_communicator) == [True, True]


def _two_groups(rank, plan, inputs):
    """Run forward on one group and on another with the ranks reversed, then both backward passes."""
    runs, layout = [], plan.call.layout
    for ranks in ([0, 1], [1, 0]):
        keep = (
            {"sort_ranks": False} if "sort_ranks" in inspect.signature(torch.distributed.new_group).parameters else {}
        )
        group = torch.distributed.new_group(ranks, **keep)
        at = torch.distributed.get_rank(group)
        q, k, v = (layout.shard(x, at).requires_grad_() for x in inputs[:3])
        runs.append((at, (q, k, v), da.attention(q, k, v, plan, group)))
    results = []
    for at, leaves, o in runs:
        o.backward(layout.shard(inputs.do, at))
        results.append((at, [leaf.grad for leaf in leaves]))
    return results


def test_a_plan_may_run_on_several_groups_at_once():
    plan, inputs = plan_for(masks()["documents"], 2), random_inputs(200, 4, 2, 8)
    wanted = dense(plan.call.mask, inputs)
    for results in run_on_ranks(2, _two_groups, plan, inputs):
        for at, grads in results:
            for got, whole in zip(grads, (wanted.dq, wanted.dk, wanted.dv), strict=True):
                assert (got - plan.call.layout.shard(whole, at)).abs().max() < 1e-11


def _communicators_end_with_their_group(rank, plan):
    transport = da.prepare(plan).transport
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    gc.collect()
    with pytest.raises(da.DistattnError, match="has been destroyed"):
        transport.exchange([], [], True)
    torch.distributed.init_process_group = torch.distributed.barrier = lambda *_, **__: None
    torch.distributed.destroy_process_group = lambda: None
    return True


def test_communicators_end_with_their_group():
    assert run_on_ranks(2, _communicators_end_with_their_group, plan_for(masks()["causal"], 2)) == [True, True]


def _later(rank, kind):
    """Run a plan that all ranks have. Then rank 1 makes a new plan, either an equal plan or a different plan."""
    mask, layout = masks()["documents"], layouts(LENGTHS, 2)["zigzag"]
    plan = da.make_plan(mask, layout, strategy="ring", **SHAPE)
    q, k, v = (torch.ones(len(layout.tokens(rank)), heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    first = da.attention(q, k, v, plan)
    if kind == "an equal one":
        again = da.make_plan(mask, layout, strategy="ring", **SHAPE) if rank else plan
        return torch.equal(da.attention(q, k, v, again), first)
    other = da.make_plan(masks()["causal"], layout, strategy="ring", **SHAPE) if rank else plan
    with pytest.raises(da.PlanError, match="rank 1 plans a different call .*: its mask"):
        da.attention(q, k, v, other)
    return True


@pytest.mark.parametrize("kind", ["an equal one", "a different one"])
def test_plans_are_compared_also_when_only_some_ranks_have_a_new_one(kind):
    assert run_on_ranks(2, _later, kind) == [True, True]


def _one_refuses(rank, change):
    plan = plan_for(masks()["causal"], 2)
    with pytest.raises(da.DistattnError) as refusal:
        da.prepare(plan, **(change if rank == 1 else {}))
    return str(refusal.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_buffer_bytes": 10}, "more than max_buffer_bytes = 10."),
        ({"kernel": "nope"}, "there are auto, reference, cpu, flash, triton, triton_tf32, gluon, gluon_split."),
    ],
)
def test_if_one_rank_refuses_all_ranks_do(change, sentence):
    other, refusal = run_on_ranks(2, _one_refuses, change)
    assert refusal.endswith(sentence) and other == f"rank 1 refuses this plan: {refusal}"
