"""Tiled feed-forward layers: the same outputs and gradients, one gradient per weight, and refusals by name."""

import pytest
import small
import torch
from processes import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distattn.ir.errors import DistattnError
from distattn.memory.tiled_mlp import tile_feed_forward

WIDTH = 8


class Gated(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.gate_proj, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.down(torch.nn.functional.silu(self.gate_proj(x)) * self.up(x)))


class Block(nn.Module):
    def __init__(self, mlp=None):
        super().__init__()
        self.mlp = mlp or Gated()

    def forward(self, x):
        return x + self.mlp(x)


def results(model, x, autocast=None):
    calls = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter))
        for parameter in model.parameters()
    ]
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    (y.float() ** 2).sum().backward()
    for hook in hooks:
        hook.remove()
    # a trainer's hook runs once per weight
    assert len(calls) == len(set(calls)) == len(list(model.parameters()))
    results_ = [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return results_


@pytest.mark.parametrize("shape", [(1, 11), (2, 7), (5,), (1, 3), (1, 0)])
def test_outputs_and_gradients_match_the_whole_layer(shape):
    torch.manual_seed(0)
    model, x = Block().double(), torch.randn(*shape, WIDTH, dtype=torch.float64)
    wanted = results(model, x)
    assert tile_feed_forward(model, 3) == 1
    for a, b in zip(results(model, x), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted[0], rtol=1e-12, atol=1e-14)


def test_under_autocast_the_backward_pass_computes_as_the_forward_pass_did():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(1, 11, WIDTH)
    wanted = results(model, x, "bfloat16")
    tile_feed_forward(model, 3)
    for a, b in zip(results(model, x, "bfloat16"), wanted, strict=True):
        assert a.dtype == b.dtype and float((a - b).norm()) <= 1e-2 * float(b.norm())


def test_norms_are_tiled_as_well_those_of_queries_along_their_tokens():
    torch.manual_seed(0)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q_norm, self.mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH // 2), Gated()

        def forward(self, x):
            heads = self.q_norm(self.norm(x).unflatten(-1, (2, -1)))
            return self.mlp(heads.flatten(-2))

    model, x = Normed().double(), torch.randn(1, 7, WIDTH, dtype=torch.float64)
    wanted = results(model, x)
    assert tile_feed_forward(model, 3) == 1
    shapes = []
    model.q_norm.forward.forward = lambda x, right=model.q_norm.forward.forward: (shapes.append(x.shape), right(x))[1]
    for a, b in zip(results(model, x), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert {shape[1:3] for shape in shapes} == {(3, 2), (1, 2)}


def test_frozen_weights_and_inputs_have_no_gradient():
    torch.manual_seed(0)
    model = Block()
    tile_feed_forward(model, 2)
    model.mlp.up.requires_grad_(False)
    model(torch.randn(1, 5, WIDTH)).sum().backward()
    assert model.mlp.up.weight.grad is None and model.mlp.down.weight.grad is not None


def test_tiling_twice_takes_the_last_number():
    model = small.build()
    assert tile_feed_forward(model, 4) == tile_feed_forward(model, 2) == 2
    assert all(layer.mlp.forward.tile_tokens == 2 for layer in model.model.layers)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Block(Experts()), r"mlp \(Experts\) sends tokens to experts \(experts\)"),
        (Block(Gated(0.1)), r"mlp \(Gated\) has dropout \(drop\)"),
        (nn.Linear(2, 2), "Linear has no module called mlp or feed_forward"),
    ],
)
def test_layers_that_cannot_be_tiled_are_refused_by_name(model, message):
    with pytest.raises(DistattnError, match=message):
        tile_feed_forward(model, 4)


def test_parameters_that_zero_3_holds_are_refused():
    model = Block()
    tile_feed_forward(model, 2)
    model.mlp.up.weight.ds_id = 1
    with pytest.raises(DistattnError, match="ZeRO 3 would gather"):
        model(torch.zeros(1, 1, WIDTH))


def uneven(rank):
    """Run ranks with 11, 0 and 2 tokens: four tiles, no tile, and too few tokens to tile. Return this rank's number of
    all-gathers and its gradients.
    """
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    mesh = init_device_mesh("cpu", (3,))
    for part in (*model, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    tile_feed_forward(model, 3)
    x = torch.randn(1, 11, WIDTH, generator=torch.Generator().manual_seed(1))[:, : (11, 0, 2)[rank]]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x).square().sum().backward()
    gathers = sum(event.count for event in profile.key_averages() if event.key == "c10d::_allgather_base_")
    return gathers, [parameter.grad.full_tensor() for parameter in model.parameters()]


def test_ranks_with_unequally_many_tiles_gather_weights_once_a_layer():
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(1, 11, WIDTH, generator=torch.Generator().manual_seed(1))
    sum(model(x[:, :tokens]).square().sum() for tokens in (11, 0, 2)).backward()
    for gathers, gradients in run_on_ranks(3, uneven):
        # two layers, each gathered once forward and once backward, except that the last layer may stay gathered,
        # because its backward pass follows immediately
        assert 3 <= gathers <= 4
        for a, b in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(3 * a, b.grad, rtol=1e-4, atol=1e-5)


def shards_of_its_own(rank):
    model, mesh = Block(), init_device_mesh("cpu", (2,))
    fully_shard(model.mlp.up, mesh=mesh)
    with pytest.raises(DistattnError, match="FSDP2 shards up separately"):
        tile_feed_forward(model, 4)


def test_parts_that_fsdp2_gathers_for_themselves_are_refused():
    run_on_ranks(2, shards_of_its_own)
