"""What kernels allocate for themselves is what they say: nothing is launched, on meta tensors."""

import types

import pytest
import torch
from meta_run import META, Traffic, Watch

from distattn.ir.mask import Mask
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
