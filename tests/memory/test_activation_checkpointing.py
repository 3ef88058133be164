"""Checkpointed layers: what is recomputed, what is refused, and compiled layers."""

import pytest
import small
import torch
from processes import run_on_ranks
from torch import nn

import distattn as da
from distattn.adapters import pytorch
from distattn.ir.errors import DistattnError
from distattn.memory.activation_checkpointing import checkpoint_layers
from distattn.memory.host_offload import HostOffload
from distattn.parallel.runtime.execution import execute


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, scale=1.0):
        return x + torch.tanh(self.linear(x)) * scale


def gradients(save=None, offload=False, compiled=""):
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(2))
    if compiled == "before":
        for layer in layers:
            layer.forward = torch.compile(layer.forward, backend="aot_eager")
    if save is not None:
        checkpoint_layers(layers, save=save, offload=HostOffload() if offload else None)
    if compiled == "after":
        for layer in layers:
            layer.compile(backend="aot_eager")
    x = torch.ones(3, 8, requires_grad=True)
    y = x
    for layer in layers:
        y = layer(y, scale=0.5)
    y.sum().backward()
    return [x.grad, *(parameter.grad for parameter in layers.parameters())]


@pytest.mark.parametrize(
    "how",
    [
        dict(save="nothing", compiled="after"),
        dict(save="attention", compiled="after"),
        dict(save="nothing", offload=True, compiled="before"),
    ],
)
def test_compiled_layers_have_the_gradients_of_plain_ones(how):
    for a, b in zip(gradients(**how), gradients(), strict=True):
        torch.testing.assert_close(a, b)


def passes(rank, save, offload):
    """Return the number of attention forward passes that two layers make in one step."""
    model, calls = small.build(), []
    checkpoint_layers(model.model.layers, save=save, offload=HostOffload() if offload else None)
    right = execute.forward

    def counted(*arguments):
        calls.append(1)
        return right(*arguments)

    execute.forward = counted
    with da.ContextParallel(strategy="ring", kernel="reference") as cp:
        for batch in cp.shard_step([small.micro_batch([19, 12])]):
            pytorch.local_loss(model, batch).backward()
    return len(calls)


@pytest.mark.parametrize("offload", [False, True])
def test_saved_attention_is_not_recomputed(offload):
    assert run_on_ranks(2, passes, "attention", offload) == [2, 2]
    assert run_on_ranks(2, passes, "nothing", offload) == [4, 4]


def test_a_second_backward_pass_finds_what_the_first_did():
    layers = nn.ModuleList([Layer(), Layer()])
    checkpoint_layers(layers, offload=HostOffload(1))
    x = torch.ones(3, 8, requires_grad=True)
    y = layers[1](layers[0](x)).sum()
    first = torch.autograd.grad(y, [x, *layers.parameters()], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, [x, *layers.parameters()]), strict=True):
        assert torch.equal(a, b)


def checkpointed_by_transformers():
    model = small.build()
    model.gradient_checkpointing_enable()
    return model.model.layers


def checkpointed_twice():
    layers = [Layer()]
    checkpoint_layers(layers)
    return layers


@pytest.mark.parametrize(
    ("layers", "how", "message"),
    [
        (lambda: [Layer()], dict(save="logits"), "save is one of nothing, attention, not 'logits'"),
        (list, {}, "there are no layers"),
        (checkpointed_by_transformers, {}, r"LlamaDecoderLayer is checkpointed by transformers; call model.gradient"),
        (checkpointed_twice, {}, "Layer is checkpointed already"),
    ],
)
def test_impossible_settings_are_refused(layers, how, message):
    with pytest.raises(DistattnError, match=message):
        checkpoint_layers(layers(), **how)


def test_an_input_that_is_given_by_name_is_not_offloaded():
    (layer,) = layers = [Layer()]
    checkpoint_layers(layers, offload=HostOffload())
    with pytest.raises(DistattnError, match="Layer: its input is to be offloaded, but its first argument is no tensor"):
        layer(x=torch.ones(3, 8))
