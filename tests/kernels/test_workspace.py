"""What kernels allocate for themselves is what they say: nothing is launched, on meta tensors."""

import types

import pytest
import torch
from meta_run import META, Traffic, Watch

from distattn.ir.mask import Mask
from distattn.kernels.flash import attention as flash
from distattn.kernels.gluon import attention as gluon_attention
from distattn.kernels.gluon import split
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements, LaunchShape, ScoreMod
from distattn.kernels.triton import attention as triton_attention
from distattn.kernels.triton import tf32

TOKENS, HEADS, KV_HEADS, DIM = 20_000, 8, 2, 128


@pytest.fixture
def no_launches(monkeypatch):
    for module in (gluon_attention, triton_attention):
        monkeypatch.setattr(module, "run_launch", lambda launch: None)
        monkeypatch.setattr(module, "_descriptor", lambda x, *how: x)
        monkeypatch.setattr(module, "compute_capability", lambda device: 90)
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(gluon_attention, "TensorDescriptor", types.SimpleNamespace(from_tensor=lambda *given: 0))
    monkeypatch.setattr(gluon_attention, "NVMMASharedLayout", lambda **how: 0)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: 512)


@pytest.mark.parametrize("dq_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [triton_attention, tf32, gluon_attention, split])
def test_workspace_is_what_is_allocated(kernel, dq_dtype, no_launches):
    # tiles of keys that all rows see are cut
    mask = LaunchMask.from_mask(Mask.sliding_window(TOKENS, 255, sink_tokens=4), HEADS, HEADS // KV_HEADS)
    schedule = kernel.prepare(mask, KernelRequirements(torch.bfloat16, DIM, DIM, META))

    def tensors(heads, dtype=torch.bfloat16, count=2):
        return [torch.empty(TOKENS, heads, DIM, dtype=dtype, device=META) for _ in range(count)]

    (q, do), (k, v), ((dq,), dkv) = tensors(HEADS), tensors(KV_HEADS), (tensors(HEADS, dq_dtype, 1), tensors(KV_HEADS))
    lse, delta = (torch.empty(TOKENS, HEADS, device=META) for _ in range(2))
    traffic = Traffic()
    with Watch(traffic):
        kernel.backward(do, q, k, v, lse, delta, schedule, ScoreMod(1.0), into=(dq, tuple(dkv)))
    shape = LaunchShape(TOKENS, TOKENS, HEADS, KV_HEADS, DIM, DIM, dq_dtype.itemsize)
    assert traffic.peak == kernel.workspace_bytes("backward", shape, schedule) > 2 * HEADS * TOKENS * 4
    traffic = Traffic()
    with Watch(traffic):
        kernel.forward(q, k, v, schedule, ScoreMod(1.0), into=(do, lse))
    assert traffic.peak == kernel.workspace_bytes("forward", shape, schedule) == 0


def flash_forward(q, k, v, starts_q, starts_k, longest_q, longest_k, *how, **window):
    """Allocate what `mha_varlen_fwd` of PyTorch's flash_api.cpp does."""
    few = [torch.empty(2, dtype=torch.uint64, device=META), torch.empty((), dtype=torch.uint64, device=META)]
    return torch.empty_like(q), torch.empty(q.shape[1], len(q), device=META), *few, None


def flash_backward(do, q, k, v, o, lse, starts_q, starts_k, *how, **window):
    """Allocate what `mha_varlen_bwd` of PyTorch's flash_api.cpp does."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    long = len(q) + 128 * (len(starts_q) - 1)
    dim = q.shape[2]
    softmax_d = torch.empty(q.shape[1], long, device=META)
    dq_accum = torch.empty(
        long, q.shape[1], -(-dim // (32 if dim <= 128 else 64)) * (32 if dim <= 128 else 64), device=META
    )
    expanded = [torch.empty(len(k), q.shape[1], dim, dtype=q.dtype, device=META) for _ in range(2)]
    del softmax_d, dq_accum, expanded
    return grads


@pytest.mark.parametrize("v_dim", [128, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_flash_allocates_is_within_its_bound(v_dim, dtype, monkeypatch):
    monkeypatch.setattr(flash, "forward_operator", flash_forward)
    monkeypatch.setattr(flash, "backward_operator", flash_backward)
    mask = LaunchMask.from_mask(Mask.documents([TOKENS - 3000, 2000, 1000], (4095, 0)), HEADS, KV_HEADS)
    schedule = flash.prepare(mask, KernelRequirements(torch.bfloat16, DIM, v_dim, META))
    assert len(schedule.calls) > 1

    def tensor(heads, width, dtype=torch.bfloat16):
        return torch.empty(TOKENS, heads, width, dtype=dtype, device=META)

    q, do, k, v = tensor(HEADS, DIM), tensor(HEADS, v_dim), tensor(KV_HEADS, DIM), tensor(KV_HEADS, v_dim)
    lse, delta = (torch.empty(TOKENS, HEADS, device=META) for _ in range(2))
    o, dq, dk, dv = (tensor(x.shape[1], x.shape[2], dtype) for x in (do, q, k, v))
    shape = LaunchShape(TOKENS, TOKENS, HEADS, KV_HEADS, DIM, v_dim, dtype.itemsize)
    for direction, run in (
        ("forward", lambda: flash.forward(q, k, v, schedule, ScoreMod(1.0), into=(o, lse))),
        ("backward", lambda: flash.backward(do, q, k, v, lse, delta, schedule, ScoreMod(1.0), into=(dq, (dk, dv)))),
    ):
        traffic = Traffic()
        with Watch(traffic):
            run()
        bound = flash.workspace_bytes(direction, shape, schedule)
        assert 0 < traffic.peak <= bound < 4 * traffic.peak, (direction, traffic.peak, bound)
