"""Mixed precision on two ranks as each trainer does it (autocast, FSDP2's policy, low-precision weights), compared to a
single process.
"""

import os
from functools import partial

import pytest
import small
import torch
import torch.distributed as dist
from processes import run_on_ranks, sum_gradients
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import distattn as da
from distattn.adapters import pytorch
from distattn.adapters.pytorch import ProbeTarget, full_tensor, local_loss

# limits of the relative errors of losses and gradients, against one process in fp32, when every product is rounded
TOLERANCE = {"bfloat16": (2e-3, 5e-2), "float16": (3e-4, 8e-3)}
SHARING = {"ring": dict(strategy="ring"), "cad": small.CAD}


def batches_of(sharing: str, rank: int) -> list[dict]:
    return small.step(rank if sharing == "cad" else 0, 2)


def wanted(sharing: str):
    """Compute the loss and gradients of a single process in fp32."""
    ranks = (0, 1) if sharing == "cad" else (0,)
    return small.in_one_process(small.build(torch.float32), [batch for rank in ranks for batch in small.step(rank, 2)])


def assert_close(results, expected, dtype: str) -> None:
    loss, gradients = expected
    of_loss, of_gradients = TOLERANCE[dtype]
    for got_loss, got in results:
        assert got_loss == pytest.approx(float(loss), rel=of_loss)
        error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, gradients, strict=True)) ** 0.5
        assert error <= of_gradients * float(torch.cat([x.flatten() for x in gradients]).double().norm())


def _in_autocast(rank: int, sharing: str, dtype: str):
    """Train one step with fp32 weights under autocast. In fp16 the loss is scaled."""
    model, scale = small.build(torch.float32), 1024.0 if dtype == "float16" else 1.0
    with da.ContextParallel(**SHARING[sharing]) as cp:
        cp.loss_scale(ProbeTarget(model, reduce=partial(sum_gradients, model)))
        losses = []
        for batch in cp.shard_step(batches_of(sharing, rank)):
            with torch.autocast("cpu", dtype=getattr(torch, dtype)):
                losses.append(local_loss(model, batch))
            (losses[-1] * scale).backward()
        sum_gradients(model)
        return cp.mean_loss(losses), [parameter.grad / scale for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sharing", SHARING)
def test_a_loop_under_autocast(sharing, dtype):
    assert_close(run_on_ranks(2, _in_autocast, sharing, dtype), wanted(sharing), dtype)


def _by_fsdp(rank: int, sharing: str, dtype: str):
    """Train one step with fp32 weights that are gathered in low precision. Gradients are reduced in fp32."""
    model = small.build(torch.float32)
    per_rank = sharing == "cad"
    mesh = init_device_mesh("cpu", (2, 1) if per_rank else (1, 2), mesh_dim_names=("dp", "cp"))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    flat = pytorch.gradient_mesh(mesh)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=flat, mp_policy=policy)
    with pytorch.context_parallel(mesh, **SHARING[sharing]) as cp:
        cp.loss_scale(ProbeTarget(model))
        losses = []
        for batch in cp.shard_step(batches_of(sharing, rank)):
            losses.append(local_loss(model, batch))
            losses[-1].backward()
        return cp.mean_loss(losses), [full_tensor(parameter.grad) for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("sharing", SHARING)
def test_fsdp2s_mixed_precision(sharing, dtype):
    assert_close(run_on_ranks(2, _by_fsdp, sharing, dtype), wanted(sharing), dtype)


def _by_deepspeed(rank: int, sharing: str, dtype: str, config: dict):
    import test_deepspeed

    from distattn.adapters import deepspeed

    test_deepspeed._start(rank)
    cp = da.ContextParallel(**SHARING[sharing])
    weights = getattr(torch, dtype) if dtype in config or "bf16" in config else torch.float32
    engine = test_deepspeed.engine_of(cp, 2, 2, weights, **config)
    cp.loss_scale(deepspeed.ProbeTarget(engine))
    # in fp16 the gradients include the loss scale until the optimizer's step
    scale = engine.optimizer.loss_scale if "fp16" in config else 1.0
    losses, gradients = [], []
    for batch in cp.shard_step(batches_of(sharing, rank)):
        losses.append(local_loss(engine, batch))
        engine.backward(losses[-1])
        if engine.is_gradient_accumulation_boundary():
            gradients = [
                test_deepspeed.safe_get_full_grad(parameter).float() / scale for parameter in engine.module.parameters()
            ]
        engine.step()
    return cp.mean_loss(losses), gradients


AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(
    ("dtype", "config"),
    [("bfloat16", {"bf16": {"enabled": True}}), ("bfloat16", AUTOCAST), ("float16", FP16)],
    ids=["bf16", "autocast", "fp16"],
)
def test_deepspeeds_mixed_precision(sharing, dtype, config):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    if dtype == "float16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed computes fp16 on processors with AVX512-FP16 only")
    assert_close(run_on_ranks(2, _by_deepspeed, sharing, dtype, config), wanted(sharing), dtype)


def _by_the_trainer(rank: int, folder, degree: int, shared: bool, changes: dict):
    import test_hf_trainer

    return test_hf_trainer._train(rank, folder, degree, 2, changes, torch.float32, shared=shared)


@pytest.mark.full
@pytest.mark.parametrize("changes", [{"bf16": True}], ids=["bf16"])
def test_hugging_faces_trainer(tmp_path, changes):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ((curve, norms, evaluated, _),) = run_on_ranks(1, _by_the_trainer, tmp_path, 1, False, {})
    for ranks, degree, shared in ((2, 2, False), (2, 1, True)):
        for got in run_on_ranks(ranks, _by_the_trainer, tmp_path, degree, shared, changes):
            assert got[0] == pytest.approx(curve, rel=1e-2)
            assert got[1] == pytest.approx(norms, rel=5e-2)
            assert got[2] == pytest.approx(evaluated, rel=2e-2)


def _by_megatron(rank: int, cp: int, changes: dict, half: bool, shared: bool):
    import megatron_models as ours
    from megatron.core import parallel_state
    from megatron.core.transformer.module import Float16Module

    ours.start(cp=cp)
    config = ours.config_of(cp=cp, calculate_per_token_loss=True, **changes)
    model = ours.megatron.use_batch_positions(ours.build(config))
    if half:
        model = Float16Module(config, model)
    chunk = ours.wrapped(config, model, False)
    chunks = ours.megatron.ProbeTarget([chunk], 2)
    driver = ours.context_parallel(shared)
    driver.loss_scale(chunks)
    chunk.zero_grad_buffer()
    parts = driver.shard_step(small.step(parallel_state.get_data_parallel_rank(), 2))
    reports = ours.schedule(chunk, config, parts)
    loss, tokens = (sum(report[name] for report in reports).double() for name in ("loss_sum", "tokens"))
    for number in (loss, tokens):
        dist.all_reduce(number)
    return float(loss / tokens), [chunks._gathered_gradient(parameter).clone() for parameter in model.parameters()]


HALF = dict(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)


@pytest.mark.parametrize("shared", [False, True], ids=["split", "shared"])
@pytest.mark.parametrize(
    ("changes", "half"),
    [(HALF, True), (dict(enable_autocast=True, autocast_dtype=torch.bfloat16), False)],
    ids=["bf16", "autocast"],
)
def test_megatrons_mixed_precision(changes, half, shared):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    ((loss, gradients),) = run_on_ranks(1, _by_megatron_stock, 2 if shared else 1)
    results = run_on_ranks(2, _by_megatron, 1 if shared else 2, changes, half, shared)
    assert_close(results, (loss, gradients), "bfloat16")


def _by_megatron_stock(rank: int, replicas: int):
    import test_megatron as ours

    return ours._stock(rank, 2, replicas, {})
