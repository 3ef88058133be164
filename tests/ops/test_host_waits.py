"""No layer makes the host wait for the device: every op, forward and backward, on meta tensors that count waits."""

import contextlib
from unittest import mock

import meta_kernel
import pytest
import torch
from imitated_nccl import GROUP
from meta_run import MetaBackend
from waits import META, host_waits

import distattn as da
from distattn.ir.op import OPS, latent_op
from distattn.kernels.registry import KERNELS, choose_kernel
from distattn.ops.executable import Executable, checked_program, kernel_requirements
from distattn.parallel.runtime.communication.transport import GroupTransport

LENGTHS = (700, 40, 1, 330, 2, 90, 5, 64, 64, 1, 800)
HEADS, DIM, RANKS = 4, 16, 4
RECURRENT = [name for name, op in OPS.items() if op.kind == "recurrence"]


def ready_for(plan, kernel=None) -> Executable:
    """Return an executable of rank 1 with NCCL's message rules."""
    kernel = kernel or choose_kernel(None, kernel_requirements(plan.call, META))
    key, program = checked_program(plan, 1, kernel, META, max_buffer_bytes=None, proven=True)
    return Executable(program, key, GroupTransport(GROUP, MetaBackend()))


@pytest.fixture(autouse=True)
def a_kernel_for_meta_tensors():
    with mock.patch.dict(KERNELS, {"meta": meta_kernel.__name__}):
        yield


def plan_of(op="attention", strategy="ring", mask=None, lengths=LENGTHS, **shape):
    how = dict(heads=HEADS, kv_heads=2, head_dim=DIM, dtype="bfloat16", op=op) | shape
    return da.make_plan(mask or da.Mask.documents(lengths), da.Layout.zigzag(lengths, RANKS), strategy=strategy, **how)


def tensor(*shape, dtype=torch.bfloat16, grad=True):
    x = torch.empty(shape, dtype=dtype, device=META)
    return x.requires_grad_() if grad and dtype.is_floating_point else x


def differentiated(y, *leaves):
    leaves = [x for x in leaves if x is not None and x.requires_grad]
    return torch.autograd.grad(y, leaves, [torch.empty_like(x) for x in y])


def attention(strategy):
    ready = ready_for(plan_of(strategy=strategy), "meta")
    tokens = ready.program.tokens
    leaves = tensor(tokens, HEADS, DIM), tensor(tokens, 2, DIM), tensor(tokens, 2, DIM)
    slopes = tensor(HEADS, dtype=torch.float32, grad=False)

    def layer():
        o, lse = da.attention(*leaves, ready, softcap=20.0, alibi_slopes=slopes, return_lse=True)
        return differentiated([o, lse], *leaves)

    return layer


def latent():
    shape = dict(kv_heads=1, head_dim=DIM, v_head_dim=8, op=latent_op(4, 32))
    ready = ready_for(plan_of(strategy="allgather", **shape), "meta")
    tokens = ready.program.tokens
    leaves = tensor(tokens, HEADS, DIM), tensor(tokens, 4), tensor(tokens, 32), tensor(HEADS, DIM - 4 + 8, 32)
    return lambda: differentiated([da.latent_attention(*leaves, ready)], *leaves)


def recurrence(name, strategy="scan", heads=HEADS, **how):
    op = OPS[name]
    ready = ready_for(plan_of(op, strategy, heads=heads, **how))
    tokens, call = ready.program.tokens, ready.program.call
    shapes = {"none": None, "head": (heads,), "token": (tokens, heads), "channel": (tokens, heads, DIM)}
    shape = shapes[op.decay]
    g = None if shape is None else tensor(*shape, dtype=torch.float32, grad=op.decay != "head")
    beta = tensor(tokens, heads) if op.delta else None
    initial = tensor(len(call.documents), heads, DIM, DIM, dtype=torch.float32)
    leaves = tensor(tokens, 2, DIM), tensor(tokens, 2, DIM), tensor(tokens, heads, DIM)

    def layer():
        settings = dict(g=g, beta=beta, initial_state=initial, return_final_state=True)
        return differentiated(da.recurrence(*leaves, ready, **settings), *leaves, g, beta, initial)

    return layer


def convolution(grouped):
    mask = da.Mask.documents(LENGTHS, (3, 0))
    ready = ready_for(plan_of("convolution", mask=mask, kv_heads=HEADS, head_dim=DIM, v_head_dim=DIM))
    channels = HEADS * DIM
    x, weight = tensor(ready.program.tokens, channels), tensor(channels, *([DIM] if grouped else []), 4)
    bias, initial = tensor(channels), tensor(len(LENGTHS), channels, 3)

    def layer():
        y = da.causal_conv1d(
            x, weight, ready, bias=bias, activation="silu", initial_state=initial, return_final_state=True
        )
        return differentiated(y, x, weight, bias, initial)

    return layer


def token_shift(dtype, **how):
    whole = not dtype.is_floating_point
    shape = dict(
        heads=1, kv_heads=1, head_dim=1, v_head_dim=1 if whole else DIM, dtype="float64" if whole else "bfloat16"
    )
    ready = ready_for(plan_of("token_shift", mask=da.Mask.token_shift(LENGTHS, -2), **shape))
    x = tensor(ready.program.tokens, *([] if whole else [DIM]), dtype=dtype)
    return lambda: [da.token_shift(x, ready, **how)] if whole else differentiated([da.token_shift(x, ready)], x)


def prefix_max():
    ready = ready_for(plan_of("prefix_max", "scan", kv_heads=HEADS, head_dim=1, v_head_dim=3, dtype="float32"))
    x = tensor(ready.program.tokens, HEADS, 3, dtype=torch.float32, grad=False)
    initial = tensor(len(LENGTHS), HEADS, 3, dtype=torch.float32, grad=False)
    return lambda: da.prefix_max(x, ready, initial_state=initial, return_final_state=True)


def prefix_softmax():
    shape = dict(heads=HEADS, latents=3, v_head_dim=DIM, dtype="bfloat16")
    layout, mask = da.Layout.zigzag(LENGTHS, RANKS), da.Mask.documents(LENGTHS)
    plans = da.make_prefix_softmax_plans(mask, layout, **shape)
    plans = type(plans)(*map(ready_for, plans))
    tokens = plans.maximum.program.tokens
    leaves = tensor(tokens, HEADS, 3), tensor(tokens, HEADS, 3), tensor(tokens, HEADS, DIM)
    shapes = (len(LENGTHS), HEADS, 3), (len(LENGTHS), HEADS, 3), (len(LENGTHS), HEADS, 3, DIM)
    state = da.PrefixSoftmaxState(*(tensor(*shape, dtype=torch.float32) for shape in shapes))

    def layer():
        o, final = da.prefix_softmax(*leaves, plans, initial_state=state, return_final_state=True)
        return differentiated([o, final.total, final.weighted], *leaves, state.total, state.weighted)

    return layer


LAYERS = {
    "attention": lambda: attention("ring"),
    "attention, usp": lambda: attention("usp"),
    "latent attention": latent,
    **{name: lambda name=name: recurrence(name) for name in RECURRENT},
    "retention by heads": lambda: recurrence("retention", options={"schedule": "head_sharded"}),
    # a launch contains only some of the heads that share queries and keys
    "groups of heads that are cut": lambda: recurrence("gated_delta_rule", "ulysses", heads=6, lengths=(600, 700)),
    "convolution": lambda: convolution(False),
    "convolution of groups": lambda: convolution(True),
    "token shift": lambda: token_shift(torch.bfloat16),
    "token shift of labels": lambda: token_shift(torch.int64, fill=-100),
    "prefix maximum": prefix_max,
    "prefix softmax": prefix_softmax,
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_waits_for_the_device(name):
    layer = LAYERS[name]()
    with host_waits() as watch:
        layer()
    assert not watch.waits, "\n".join(watch.waits)
    assert watch.launches.total()


def ways_to_wait(x):
    yield "a list", lambda: torch.tensor([1, 2], device=META)
    yield "a list", lambda: x.new_tensor([1.0])
    yield "a list", lambda: torch.as_tensor([1.0], device=META)
    yield "a number", lambda: x.sum().item()
    yield "a number", lambda: int(x.max())
    yield "copied to the host", lambda: x.cpu()
    yield "copied to the host", lambda: x.tolist()
    yield "nonzero", lambda: x.nonzero()
    yield "boolean mask", lambda: x[x > 0]
    yield "copies between host and device", lambda: torch.ones(3).to(META)
    yield "copies between host and device", lambda: torch.ones(3).to(META, non_blocking=True)
    yield "copies between host and device", lambda: x.copy_(torch.ones(3))
    # a Python scalar assigned to a list of rows is copied to the device, unlike a scalar assigned to a slice
    rows = torch.empty(2, dtype=torch.int64, device=META)
    yield "a number is copied to the device", lambda: x.__setitem__(rows, 1.0)
    yield "index_put_ copies", lambda: x.__setitem__(rows, torch.ones(()))
    yield "index_put_ copies", lambda: x.index_put_((rows,), torch.ones(()), accumulate=True)
    yield "index_put copies", lambda: x.index_put((rows,), torch.ones(()))
    yield "masked_fill_ reads", lambda: x.masked_fill_(x > 0, x.sum())
    yield "index_fill_ reads", lambda: x.index_fill_(0, rows, x.sum())
    yield "repeat_interleave", lambda: x.repeat_interleave(torch.ones_like(x, dtype=torch.int64))


def test_every_way_to_wait_is_counted_except_a_pinned_copy():
    x = torch.empty(3, device=META)
    for reason, wait in ways_to_wait(x):
        # meta tensors have no values, so an error follows, but the wait is recorded first
        with host_waits() as watch, contextlib.suppress(RuntimeError, NotImplementedError):
            wait()
        assert watch.waits and reason in watch.waits[0], (reason, watch.waits)
    with host_waits() as watch:
        torch.empty(3, pin_memory=True).to(META, non_blocking=True)
        (x * 2.0)[1:2].fill_(1)
        x[1:] = 1.0
        x[torch.empty(2, dtype=torch.int64, device=META)] = torch.ones_like(x[:2])
        x.masked_fill_(x > 0, 1.0)
    assert not watch.waits
