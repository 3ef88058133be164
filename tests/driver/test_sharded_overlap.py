"""Micro-batches that take turns in a model sharded by FSDP2 train as they do without turns, over many steps."""

import contextlib
from functools import partial

import pytest
import torch
import torch.distributed as dist
from packs_of_ranks import model_of, shared
from processes import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

import distattn as da
from distattn.adapters.pytorch import full_tensor, local_loss, shard_parameters
from distattn.memory.settings import MemorySettings

OPTIONS = dict(options=dict(tolerance=0.0, block=8))
STEPS = 4


def batches(rank, count):
    generator = torch.Generator().manual_seed(rank)
    packs = [[60 + 9 * rank, 9], [40, 11, 30], [30, 30], [64], [5, 5, 17]][:count]
    return [
        {"input_ids": torch.randint(0, 256, (1, sum(pack)), generator=generator), "document_lengths": pack}
        for pack in packs
    ]


def counting(calls, kind, original, *arguments, **options):
    calls[kind] = calls.get(kind, 0) + 1
    return original(*arguments, **options)


@contextlib.contextmanager
def counted_collectives(calls):
    """Count FSDP2's all-gathers of parameters and reductions of gradients inside the `with` block."""
    # the second name is used before PyTorch 2.13
    names = {
        "gathers": ("all_gather_single", "all_gather_into_tensor"),
        "reductions": ("reduce_scatter_single", "reduce_scatter_tensor"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for kind, alternatives in names.items():
            name = next(name for name in alternatives if hasattr(dist, name))

            patch.setattr(dist, name, partial(counting, calls, kind, getattr(dist, name)))
        yield


def trained_run(rank, turns, count, memory, frozen=False):
    """Return (loss, gradient norm) of each step, the final weights, and the counts of all-gathers and gradient
    reductions.
    """
    model = model_of()
    MemorySettings(**memory).apply(model)
    model.get_input_embeddings().requires_grad_(not frozen)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    shard_parameters(model, mesh)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, curve, calls = torch.optim.AdamW(trained, lr=0.01), [], {}
    with shared(**OPTIONS) as cp:
        schedule = da.OverlapSchedule(model.model.layers, model)
        for local in cp.steps([batches(rank, count)] * STEPS):
            with counted_collectives(calls):
                if turns:
                    losses = schedule.step([partial(local_loss, model, batch) for batch in local])
                else:
                    losses = [local_loss(model, batch) for batch in local]
                    for loss in losses:
                        loss.backward()
            norm = full_tensor(clip_grad_norm_(trained, 0.5))
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                evaluated = [local_loss(model, batch) for batch in local[:1]]
            curve.append((cp.mean_loss(losses), float(norm), cp.mean_loss(evaluated)))
    return curve, torch.cat([full_tensor(x.detach()).flatten() for x in model.parameters()]), calls


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "memory",
    [{}, {"activation_checkpointing": "full"}, {"activation_checkpointing": "save_attention", "offload": True}],
    ids=["plain", "checkpointed", "saved on the host"],
)
def test_many_steps_of_sharded_layers_train_as_without_turns(count, memory):
    plain = run_on_ranks(2, trained_run, False, count, memory)
    for (curve, weights, calls), (turned, turned_weights, turned_calls) in zip(
        plain, run_on_ranks(2, trained_run, True, count, memory), strict=True
    ):
        assert torch.allclose(torch.tensor(turned), torch.tensor(curve), rtol=1e-9, atol=0)
        assert (weights - turned_weights).abs().max() <= 1e-9 * weights.abs().max()
        # with turns, two layers and the root module reduce gradients once per step rather than once per micro-batch
        assert turned_calls["reductions"] == 3 * STEPS
        assert calls["reductions"] == 3 * STEPS * count
        assert turned_calls["gathers"] < calls["gathers"]


def test_layers_train_behind_frozen_embeddings():
    plain = run_on_ranks(2, trained_run, False, 2, {}, True)
    for (curve, weights, _), (turned, turned_weights, _) in zip(
        plain, run_on_ranks(2, trained_run, True, 2, {}, True), strict=True
    ):
        assert torch.allclose(torch.tensor(turned), torch.tensor(curve), rtol=1e-9, atol=0)
        assert (weights - turned_weights).abs().max() <= 1e-9 * weights.abs().max()


def refused_run(rank):
    mesh = init_device_mesh("cpu", (1,))
    layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)])
    fully_shard(layers[1], mesh=mesh)
    with pytest.raises(da.DistattnError, match="give OverlapSchedule the whole model"):
        da.OverlapSchedule(layers)
    fully_shard(layers[0][0], mesh=mesh)
    with pytest.raises(da.DistattnError, match="has sharded a FSDPLinear inside of a layer"):
        da.OverlapSchedule(layers, layers)
    layers[0] = layers[1]
    layers[1].gradient_checkpointing = True
    with pytest.raises(da.DistattnError, match="not checkpointed by transformers where micro-batches take turns"):
        da.OverlapSchedule(layers, layers)


def test_models_that_cannot_be_sharded_are_refused_in_a_sentence():
    run_on_ranks(1, refused_run)
