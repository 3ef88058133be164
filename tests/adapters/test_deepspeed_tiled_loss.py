"""A tiled loss under ZeRO: the output layer's weight is available while its tiles are computed, even if it is
partitioned.
"""

import memory_run
import pytest
import small
import torch
from processes import run_on_ranks

import distattn as da
from distattn.adapters import deepspeed, pytorch
from distattn.memory.tiled_loss import TiledLoss


def step(rank, stage):
    import test_deepspeed

    test_deepspeed._start(rank)
    cp = da.ContextParallel(strategy="ring", layout="contiguous")
    engine = test_deepspeed.engine_of(cp, stage, 2, torch.float32)
    cp.loss_scale(deepspeed.ProbeTarget(engine))
    losses, gradients = [], []
    for batch in cp.shard_step(memory_run.batches()):
        losses.append(pytorch.local_loss(engine, batch, loss=TiledLoss(5)))
        engine.backward(losses[-1])
        if engine.is_gradient_accumulation_boundary():
            gradients = [
                test_deepspeed.safe_get_full_grad(parameter).float() for parameter in engine.module.parameters()
            ]
        engine.step()
    return cp.mean_loss(losses), gradients


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full), 3])
def test_gradients_match_one_process(stage):
    loss, wanted = small.in_one_process(small.build(torch.float32), memory_run.batches())
    for mean_loss, gradients in run_on_ranks(2, step, stage):
        assert mean_loss == pytest.approx(float(loss), rel=1e-5)
        for a, b in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
