"""The predicted device memory of a recurrent layer matches its allocations on meta tensors."""

import itertools
from unittest import mock

import pytest
import torch
from imitated_nccl import GROUP
from meta_run import MetaBackend, Traffic, Watch
from torch.profiler import profile
from waits import META

import distattn as da

# this registers the operators
import distattn.ops.recurrence  # noqa: F401
from distattn.kernels.meta_bytes import MetaBytes
from distattn.kernels.recurrence.triton import kernel as triton_kernel
from distattn.ops.executable import Executable, checked_program
from distattn.ops.planned_op import IMPLEMENTATIONS
from distattn.parallel.runtime.arenas import ARENAS
from distattn.parallel.runtime.communication.transport import GroupTransport
from distattn.parallel.runtime.lowering.recurrence_workspace import recurrence_workspace

DIM, VALUE_DIM = 64, 128
PACKS = {"short": (128,) * 8, "long": (900, 36, 200)}


def plan_of(op, lengths, ranks, strategy="scan", heads=8, dtype="bfloat16"):
    shape = dict(heads=heads, kv_heads=4, head_dim=DIM, v_head_dim=VALUE_DIM, dtype=dtype, op=op)
    return da.make_plan(da.Mask.documents(lengths), da.Layout.zigzag(lengths, ranks), strategy=strategy, **shape)


def ready_for(plan, kernel):
    """Return an executable of a middle rank on meta tensors."""
    with mock.patch.object(triton_kernel, "unsupported_reason", lambda requirements: None):
        key, program = checked_program(plan, plan.call.ranks // 2, kernel, META, max_buffer_bytes=None, proven=False)
    return Executable(program, key, GroupTransport(GROUP, MetaBackend()))


def peak_on_meta(run):
    """Return (peak bytes of live meta tensors, result of `run`)."""
    traffic = Traffic()
    with Watch(traffic):
        result = run()
    return traffic.peak, result


def peak_on_cpu(run):
    """Return (peak bytes, result of `run`) from PyTorch's CPU allocator, as reported by its profiler."""
    with profile(profile_memory=True) as told:
        result = run()
    events = [event for event in told.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)), result


def peaks(ready, peak=peak_on_meta):
    """Return the peak bytes of a forward and a backward pass, not counting their inputs."""
    call, tokens, device = ready.program.call, ready.program.tokens, ready.key.device
    narrow, wide = getattr(torch, call.dtype), getattr(torch, call.accumulation_dtype)

    def tensor(*shape, dtype=narrow):
        return torch.ones(tokens, *shape, dtype=dtype, device=device) / DIM

    q, k = (tensor(call.kv_heads, DIM) for _ in range(2))
    v, do = (tensor(call.heads, VALUE_DIM) for _ in range(2))
    g = {
        "head": torch.empty(call.heads, dtype=wide, device=device),
        "token": -tensor(call.heads, dtype=wide),
        "channel": -tensor(call.heads, DIM, dtype=wide),
    }[call.op.decay]
    inputs = q, k, v, g, tensor(call.heads) if call.op.delta else None, None
    handle = ready.handle
    # each pass starts without an arena, so that the arena it allocates is counted
    ARENAS.free()
    forward, (_, _, kept) = peak(
        lambda: IMPLEMENTATIONS["distattn::recurrence_forward"](*inputs, handle, ready.kept_elements, 0)
    )
    ARENAS.free()
    return [forward, peak(lambda: IMPLEMENTATIONS["distattn::recurrence_backward"](do, None, *inputs, kept, handle))[0]]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("ranks", "pack"), [(1, "long"), (4, "short"), (4, "long")])
@pytest.mark.parametrize(
    ("op", "kernel"),
    [(op, kernel) for op in ("gated_delta_rule", "retention") for kernel in ("chunked", "triton_chunked")]
    + [("kda", "chunked")],
)
def test_the_memory_of_a_layer_is_predicted(op, kernel, ranks, pack):
    ready = ready_for(plan_of(op, PACKS[pack], ranks), kernel)
    for predicted, peak in zip(ready.memory().values(), peaks(ready), strict=True):
        assert predicted.workspace > predicted.results + predicted.states
        # other ranks' states may already be freed when the largest launch runs
        assert peak <= predicted.peak <= peak + predicted.states


def test_where_groups_of_heads_are_cut_queries_and_keys_of_each_head_are_counted():
    ready = ready_for(plan_of("gated_delta_rule", (600, 700), 8, "ulysses", heads=12), "triton_chunked")
    launch = next(step.launches[0] for step in ready.program.forward if step.launches)
    assert launch.heads.start % 3 or launch.heads.stop % 3
    for predicted, peak in zip(ready.memory().values(), peaks(ready), strict=True):
        # sizes of tensors kept for the backward pass are rounded up, which the prediction does not count
        assert abs(peak - predicted.peak) < 1024


def test_earlier_memory_is_not_counted_and_its_address_is_counted_when_reused():
    old = [torch.empty(100, dtype=torch.uint8, device=META) for _ in range(50)]
    with MetaBytes() as counted:
        views = [x[1:] for x in old]
        assert counted.peak == 0
        del views, old
        new = [torch.empty(10, dtype=torch.uint8, device=META) for _ in range(100)]
        assert counted.alive == 1000
        del new
    assert counted.alive == 0 and counted.peak == 1000


def test_fla_core_s_own_memory_is_not_known():
    ready = ready_for(plan_of("gated_delta_rule", (60,), 1), "chunked")
    assert recurrence_workspace(ready.program, "forward", object()) == 0


@pytest.mark.parametrize("op", ["gated_delta_rule", "kda"])
def test_the_allocator_of_cpus_is_asked_for_just_that(op):
    ready = da.prepare(plan_of(op, (150, 36, 70), 1, dtype="float32"))
    assert [memory.peak for memory in ready.memory().values()] == peaks(ready, peak_on_cpu)
