"""Kernels allocate exactly the workspace that they announce. The tests use meta tensors without launches."""

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
    monkeypatch.setattr(gluon_attention, "TensorDescriptor", types.SimpleNamespace(from_tensor=lambda *args: 0))
    monkeypatch.setattr(gluon_attention, "NVMMASharedLayout", lambda **how: 0)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: 512)


@pytest.mark.parametrize("dq_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [triton_attention, tf32, gluon_attention, split])
def test_the_predicted_workspace_is_allocated(kernel, dq_dtype, no_launches):
    # key tiles that all rows see are split
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
    """Allocate the same memory as `mha_varlen_fwd` in PyTorch's flash_api.cpp."""
    few = [torch.empty(2, dtype=torch.uint64, device=META), torch.empty((), dtype=torch.uint64, device=META)]
    return torch.empty_like(q), torch.empty(q.shape[1], len(q), device=META), *few, None


def flash_backward(do, q, k, v, o, lse, starts_q, starts_k, *how, **window):
    """Allocate the same memory as `mha_varlen_bwd` in PyTorch's flash_api.cpp."""
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


def key_parts(longest_q, longest_k, heads, kv_heads, dim, is_causal):
    """Return the result of FlashAttention 3's `get_num_splits` and `num_splits_heuristic` for bf16 on an H100."""
    block_m, block_n = (192, 128) if dim <= 96 else (128, 176 if dim == 128 and not is_causal else 128)
    m_blocks, n_blocks = -(-longest_q * (heads // kv_heads) // block_m), -(-longest_k // block_n)
    blocks, size = kv_heads * m_blocks, longest_k * 2 * dim * 2
    if blocks >= 0.8 * 132:
        return min(-(-size // (50 << 20)), 128) if size > 50 << 20 and m_blocks >= 264 and not is_causal else 1
    if n_blocks <= 4:
        return 1
    waves = [blocks * parts / 132 for parts in range(1, min(128, 132, n_blocks) + 1)]
    efficiency = [w / -(-w // 1) for w in waves]
    return next(parts for parts, e in enumerate(efficiency, 1) if e >= 0.85 * max(efficiency))


def fa3_forward(q, k, v, starts_q, starts_k, longest_q, longest_k, dropout, is_causal, *how, **window):
    """Allocate the same memory as `mha_fwd` in FlashAttention 3's flash_api.cpp."""
    parts = key_parts(longest_q, longest_k, q.shape[1], k.shape[1], q.shape[2], is_causal)
    out = torch.empty_like(q), torch.empty(q.shape[1], len(q), device=META)
    semaphore = torch.empty(len(starts_q), dtype=torch.int32, device=META)
    if parts > 1:
        accumulated = torch.empty(parts, q.shape[1], len(q), q.shape[2] + 1, device=META)
        del accumulated
    del semaphore
    return *out, None


def fa3_backward(do, q, k, v, o, lse, starts_q, starts_k, longest_q, longest_k, *how, **window):
    """Allocate the same memory as `mha_bwd` in FlashAttention 3's flash_api.cpp, with blocks of 128 rows and keys."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    sequences, (heads, kv_heads), dim = len(starts_q) - 1, (q.shape[1], k.shape[1]), q.shape[2]
    rows, keys = (-(-(len(x) + 128 * sequences) // 128) * 128 for x in (q, k))
    sums = [torch.empty(heads, rows, device=META) for _ in range(2)]
    sums += [torch.empty(heads, rows, dim, device=META)]
    sums += [torch.empty(kv_heads, keys, dim, device=META) for _ in range(2)]
    semaphores = torch.empty(-(-longest_q // 64), sequences, heads, dtype=torch.int32, device=META)
    del sums, semaphores
    return grads


@pytest.mark.parametrize("tokens", [TOKENS, 1500, 130_000])
@pytest.mark.parametrize("is_causal", [True, False])
def test_what_flash_attention_3_allocates_is_within_the_bound(tokens, is_causal, monkeypatch):
    monkeypatch.setattr(flash, "implementation", lambda: "FA3")
    monkeypatch.setattr(flash, "forward_operator", fa3_forward)
    monkeypatch.setattr(flash, "backward_operator", fa3_backward)
    mask = Mask.causal(tokens) if is_causal else Mask.full(tokens)
    check_flash(LaunchMask.from_mask(mask, HEADS, KV_HEADS), DIM, torch.bfloat16)


@pytest.mark.parametrize("v_dim", [128, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_flash_allocates_is_within_its_bound(v_dim, dtype, monkeypatch):
    monkeypatch.setattr(flash, "forward_operator", flash_forward)
    monkeypatch.setattr(flash, "backward_operator", flash_backward)
    mask = LaunchMask.from_mask(Mask.documents([TOKENS - 3000, 2000, 1000], (4095, 0)), HEADS, KV_HEADS)
    assert len(flash.prepare(mask, KernelRequirements(torch.bfloat16, DIM, v_dim, META)).calls) > 1
    check_flash(mask, v_dim, dtype)


def check_flash(mask, v_dim, dtype):
    """Compare the memory that both passes allocate with the bound. dtype: the dtype of the results."""
    schedule = flash.prepare(mask, KernelRequirements(torch.bfloat16, DIM, v_dim, META))

    def tensor(heads, width, dtype=torch.bfloat16):
        return torch.empty(mask.rows, heads, width, dtype=dtype, device=META)

    q, do, k, v = tensor(HEADS, DIM), tensor(HEADS, v_dim), tensor(KV_HEADS, DIM), tensor(KV_HEADS, v_dim)
    lse, delta = (torch.empty(mask.rows, HEADS, device=META) for _ in range(2))
    o, dq, dk, dv = (tensor(x.shape[1], x.shape[2], dtype) for x in (do, q, k, v))
    shape = LaunchShape(mask.rows, mask.keys, HEADS, KV_HEADS, DIM, v_dim, dtype.itemsize)
    for direction, run in (
        ("forward", lambda: flash.forward(q, k, v, schedule, ScoreMod(1.0), into=(o, lse))),
        ("backward", lambda: flash.backward(do, q, k, v, lse, delta, schedule, ScoreMod(1.0), into=(dq, (dk, dv)))),
    ):
        traffic = Traffic()
        with Watch(traffic):
            run()
        bound = flash.workspace_bytes(direction, shape, schedule)
        assert 0 < traffic.peak <= bound < 4 * traffic.peak, (direction, traffic.peak, bound)
